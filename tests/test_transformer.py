"""The example transformer against a float64 NumPy one that loops over tokens, heads and experts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_wideep.flax.transformer import Transformer, TransformerConfig, compile_steps, make_transformer

CONFIG = TransformerConfig(vocab=32, hidden=128, num_layers=2, num_heads=4, ffn=16, num_experts=16, top_k=2)


@pytest.fixture
def make_model():
    """Makes Transformers over the first 8 devices, or others, and closes their groups at the end."""
    groups = []

    def make(config=CONFIG, num_ranks=8, axis_type=jax.sharding.AxisType.Auto, **settings):
        devices = jax.devices()[:num_ranks]
        mesh = jax.make_mesh((num_ranks,), ("data",), axis_types=(axis_type,), devices=devices)
        groups.append(config.make_group(mesh, **settings))
        return Transformer(config, groups[-1], rngs=nnx.Rngs(0))

    yield make
    for group in groups:
        group.close()


def random_tokens(*shape):
    return np.random.default_rng(sum(shape)).integers(0, CONFIG.vocab, shape, np.int32)


# ---- the NumPy transformer ----


def norm(x, module):
    scale = np.asarray(module.scale[...], np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def rotated(head, position):
    """One head's vector as complex numbers turned by their frequencies."""
    half = head.size // 2
    turned = (head[:half] + 1j * head[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def softmax(scores):
    raised = np.exp(scores - np.max(scores))
    return raised / np.sum(raised)


def attention(x, module):
    """x [seq, hidden]."""
    qkv = x @ np.asarray(module.qkv.kernel[...], np.float64)
    seq, hidden = x.shape
    heads = qkv.reshape(seq, 3, CONFIG.num_heads, CONFIG.head_dim)
    out = np.zeros((seq, CONFIG.num_heads, CONFIG.head_dim))
    for head in range(CONFIG.num_heads):
        keys = np.stack([rotated(heads[t, 1, head], t) for t in range(seq)])
        for t in range(seq):
            scores = keys[: t + 1] @ rotated(heads[t, 0, head], t) / np.sqrt(CONFIG.head_dim)
            out[t, head] = softmax(scores) @ heads[: t + 1, 2, head]
    return out.reshape(seq, hidden) @ np.asarray(module.out.kernel[...], np.float64)


def moe(x, module):
    """x [tokens, hidden] -> outputs, and selections per expert."""
    gate, wi, wo = (np.asarray(p[...], np.float64) for p in (module.gate.kernel, module.wi, module.wo))
    out, counts = np.zeros_like(x), np.zeros(CONFIG.num_experts, int)
    for t, token in enumerate(x):
        scores = softmax(token @ gate)
        chosen = np.argsort(-scores)[: CONFIG.top_k]
        for expert in chosen:
            gated, up = np.split(token @ wi[expert], 2)
            inner = gated / (1 + np.exp(-gated)) * up
            out[t] += scores[expert] / np.sum(scores[chosen]) * (inner @ wo[expert])
            counts[expert] += 1
    return out, counts


def reference(model, tokens):
    """tokens [batch, seq] -> logits, and selections per layer and expert."""
    counts = np.zeros((CONFIG.num_layers, CONFIG.num_experts), int)
    logits = []
    for sequence in tokens:
        x = np.asarray(model.embedding[...], np.float64)[sequence]
        for layer, block in enumerate(model.blocks):
            x = x + attention(norm(x, block.attention_norm), block.attention)
            out, chosen = moe(norm(x, block.moe_norm), block.moe)
            x, counts[layer] = x + out, counts[layer] + chosen
        logits.append(norm(x, model.norm) @ np.asarray(model.unembed.kernel[...], np.float64))
    return np.stack(logits), counts


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.max(np.abs(want)))


# ---- tests ----


@pytest.mark.parametrize("batch", [8, 3], ids=["batch of 8", "batch that does not divide"])
def test_logits_and_expert_counts(make_model, batch):
    model = make_model()
    tokens = random_tokens(batch, 7)
    logits, stats = nnx.jit(lambda model, tokens: model(tokens, return_stats=True))(model, tokens)
    want, counts = reference(model, tokens)
    close(logits, want)
    np.testing.assert_array_equal(stats.tokens_per_expert, counts)
    assert stats.overflow.shape == stats.aux_loss.shape == stats.z_loss.shape == (CONFIG.num_layers,)
    assert not np.any(stats.overflow)


@pytest.mark.parametrize("batch", [8, 3], ids=["batch of 8", "batch that does not divide"])
@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_prefill_and_decode_steps_give_the_logits_of_the_whole(make_model, batch, backend):
    """In two pieces of prompt, then token by token, over a wire that is exact."""
    config = TransformerConfig(**{**CONFIG.__dict__, "quantize": None})
    model = make_model(config, backend=backend, chunk=4)
    tokens = random_tokens(batch, 9)
    want, _ = reference(model, tokens)
    prefill, decode_step = compile_steps(model)
    cache = model.init_cache(batch, max_len=12)
    for first, past in ((0, 3), (3, 5)):
        logits, cache = prefill(jnp.asarray(tokens[:, first:past]), cache)
        close(logits, want[:, past - 1])
    for position in range(5, 9):
        logits, cache = decode_step(jnp.asarray(tokens[:, position]), cache)
        close(logits, want[:, position])
    assert int(cache.length) == 9


def test_decode_over_the_fp8_wire_is_close(make_model):
    """e4m3 keeps 4 significant bits, so a row is off by up to 1/16 of each value, at random."""
    model = make_model()
    tokens = random_tokens(8, 6)
    want, _ = reference(model, tokens)
    prefill, decode_step = compile_steps(model)
    _, cache = prefill(jnp.asarray(tokens[:, :5]), model.init_cache(8, max_len=6))
    logits, _ = decode_step(jnp.asarray(tokens[:, 5]), cache)
    error = np.asarray(logits) - want[:, 5]
    assert 0 < np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(want[:, 5] ** 2))


def test_every_parameter_gets_a_gradient(make_model):
    model = make_model()
    tokens = random_tokens(8, 16)

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda model: jnp.mean(jnp.square(model(tokens))))(model)

    for path, gradient in nnx.to_flat_state(nnx.state(gradients(model), nnx.Param)):
        value = np.asarray(gradient[...])
        assert np.all(np.isfinite(value)) and np.any(value != 0), path


def test_sequences_and_experts_are_spread_over_the_devices(make_model):
    model = make_model()
    assert model.blocks[0].moe.wi[...].addressable_shards[0].data.shape[0] == CONFIG.num_experts // 8
    cache = model.init_cache(16, max_len=4)
    assert cache.keys.addressable_shards[0].data.shape == (2, 2, 4, 4, 32)
    _, decode_step = compile_steps(model)
    _, cache = decode_step(jnp.zeros(16, jnp.int32), cache)
    assert cache.values.addressable_shards[0].data.shape == (2, 2, 4, 4, 32)


def test_parameters_made_where_they_lie_are_the_same(make_model):
    model = make_model()
    made = make_transformer(CONFIG, model.group, seed=0)
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(each))) for each in (made, model))
    assert ours.keys() == theirs.keys()
    for path, param in theirs.items():
        value = ours[path][...]
        np.testing.assert_allclose(value, param[...], rtol=1e-6, atol=1e-7, err_msg=str(path))
        assert value.sharding.is_equivalent_to(param[...].sharding, value.ndim), path


COLLECTIVES = r"all[-_]reduce|all[-_]gather|all[-_]to[-_]all|collective[-_]permute|reduce[-_]scatter"


@pytest.mark.parametrize("call", ["prefill", "decode_step", "with statistics"])
def test_only_the_exchange_connects_the_ranks_of_a_step(make_model, call):
    """Several processes on one GPU have no other way: NCCL wants a GPU for each."""
    model = make_model()
    graph, state = nnx.split(model)

    def step(state, tokens, cache):
        model = nnx.merge(graph, state)
        if call == "with statistics":
            return model(tokens[:, None], return_stats=True)
        return getattr(model, call)(tokens[:, None] if call == "prefill" else tokens, cache)

    tokens = jax.device_put(random_tokens(16), NamedSharding(model.group.mesh, PartitionSpec("data")))
    lowered = jax.jit(step).lower(state, tokens, model.init_cache(16, max_len=4))
    texts = lowered.as_text(), lowered.compile().as_text()
    for text in texts:
        assert "wideep_" in text
        # So that the pattern is one that can be found.
        assert bool(re.search(COLLECTIVES, text)) == (call == "with statistics")


def test_heads_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="hidden: expected a multiple of 2 \\* num_heads=6, got 128"):
        TransformerConfig(hidden=128, num_heads=3)


def test_explicit_axes_are_an_error(make_model):
    with pytest.raises(ValueError, match="expected a mesh of Auto axes"):
        make_model(axis_type=jax.sharding.AxisType.Explicit)
