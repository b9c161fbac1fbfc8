"""What families need of moe_ffn and of the layers: biases, the clamped activation, weights on the input, a gated shared
expert, a router with a bias; each against a loop over experts on all tokens."""

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jax_wideep as wep
from jax_wideep._expert_bias import add_expert_bias

RANKS, EXPERTS, HIDDEN, FFN, TOKENS = 4, 8, 16, 6, 9


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def relative(got, want, tolerance=1e-5):
    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.abs(b).max() > 0, path
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, got, want)


# ---- the bias of rows in groups ----


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("form", ["rows", "slabs"])
@pytest.mark.parametrize("bias_dtype", [jnp.float32, jnp.bfloat16])
def test_bias_and_its_gradient_ignore_rows_of_no_group(form, implementation, bias_dtype):
    """Whatever those rows hold, or their cotangents: here NaN."""
    rng = np.random.default_rng(0)
    sizes = np.array([2, 0, 4, 1], np.int32)
    if form == "rows":
        shape, member = (12, 5), np.repeat([0, 1, 2, 3, -1], [*sizes, 5])
    else:
        shape = (4, 6, 5)
        member = np.where(np.arange(6) < sizes[:, None], np.arange(4)[:, None], -1)
    rows = np.where(member[..., None] < 0, np.nan, rng.normal(size=shape)).astype(bias_dtype)
    dout = np.where(member[..., None] < 0, np.nan, rng.integers(-8, 8, shape)).astype(bias_dtype)
    bias = rng.normal(size=(4, 5)).astype(bias_dtype)

    out, backward = jax.vjp(
        lambda rows, bias: add_expert_bias(rows, bias, jnp.asarray(sizes), implementation), rows, bias
    )
    drows, dbias = backward(jnp.asarray(dout))
    kept = member >= 0
    np.testing.assert_array_equal(np.asarray(out)[kept], (rows + bias[member])[kept])
    np.testing.assert_array_equal(np.asarray(drows)[kept], dout[kept])
    want = np.stack([dout[member == group].sum(axis=0, dtype=np.float32) for group in range(4)])
    assert dbias.dtype == bias_dtype and want.any()
    np.testing.assert_array_equal(np.asarray(dbias, np.float32), want)


def test_clamped_swiglu_at_and_beyond_its_limits():
    act = wep.ClampedSwiGLU(alpha=2.0, limit=3.0)
    gate = np.array([-10.0, -3, 0.5, 3, 3.5, 3.5, np.nan], np.float32)
    up = np.array([0.5, -3, 3, -3.5, 3.5, -1, 1], np.float32)

    def value(gate, up):
        return act(jnp.stack([gate, up]))[0]

    g, u = np.minimum(gate, 3), np.clip(up, -3, 3)
    want = g / (1 + np.exp(-2.0 * g)) * (u + 1)
    got, (dgate, dup) = jax.vmap(jax.value_and_grad(value, argnums=(0, 1)))(gate, up)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # Nothing through what was clamped; all of it at the limit itself.
    np.testing.assert_array_equal(np.asarray(dgate) == 0, [False, False, False, False, True, True, False])
    sigmoid = 1 / (1 + np.exp(-2.0 * g))
    np.testing.assert_allclose(
        np.asarray(dup)[:6], np.where([0, 0, 0, 1, 1, 0], 0, (g * sigmoid)[:6]), rtol=1e-6
    )
    assert np.isnan(got[6])
    np.testing.assert_array_equal(np.asarray(dup)[1:3] != 0, True)


# ---- moe_ffn ----


def run_moe(group, topk_idx, activation, weigh_input, **settings):
    def body(x, weights, wi, wo, bi, bo, topk_idx):
        return wep.moe_ffn(
            x, topk_idx, weights, wi, wo, group,
            bi=bi, bo=bo, activation=activation, weigh_input=weigh_input, **settings,
        )[0]  # fmt: skip

    spec = PartitionSpec("expert")
    run = jax.shard_map(body, mesh=group.mesh, in_specs=spec, out_specs=spec)
    return lambda *floats: run(*floats, topk_idx)


def dense_moe(topk_idx, activation, weigh_input):
    def run(x, weights, wi, wo, bi, bo):
        def all_experts(x):
            hidden = activation(jnp.einsum("th,ehf->tef", x, wi) + bi)
            return jnp.einsum("tef,efh->teh", hidden, wo) + bo

        out = jnp.zeros_like(x)
        for k in range(topk_idx.shape[1]):
            weight = weights[:, k, None]
            chosen = jax.nn.one_hot(topk_idx[:, k], EXPERTS)  # of -1: zeros
            y = all_experts(x * weight) if weigh_input else all_experts(x) * weight[:, None]
            out += jnp.einsum("te,teh->th", chosen, y)
        return out

    return run


@pytest.mark.parametrize(
    ("top_k", "weigh_input", "settings"),
    [
        (3, False, {}),
        (3, True, {}),
        (3, True, {"backend": "xla"}),
        (2, True, {"capacity": 5, "overflow": "spill"}),
        (3, False, {"expert_chunk": 7, "microbatches": 2}),
        (3, False, {"mode": "low_latency", "quantize": None}),
        (1, True, {"mode": "low_latency", "quantize": None}),
    ],
    ids=str,
)
def test_biases_and_weights_on_the_input(make_group, top_k, weigh_input, settings):
    rng = np.random.default_rng(1)
    settings = dict(settings)
    backend = settings.pop("backend", "cpu")
    group = make_group(RANKS, num_experts=EXPERTS, top_k=top_k, hidden=HIDDEN, chunk=4, backend=backend)
    topk_idx = np.argsort(rng.random((RANKS * TOKENS, EXPERTS)), axis=1)[:, :top_k].astype(np.int32)
    topk_idx[rng.random(topk_idx.shape) < 0.2] = -1
    topk_idx[topk_idx == 5] = -1  # an expert without rows
    activation = wep.ClampedSwiGLU(limit=1.0)
    floats = (
        draw(rng, RANKS * TOKENS, HIDDEN),
        draw(rng, RANKS * TOKENS, top_k),
        draw(rng, EXPERTS, HIDDEN, 2 * FFN) / 4,
        draw(rng, EXPERTS, FFN, HIDDEN) / 2,
        draw(rng, EXPERTS, 2 * FFN),
        draw(rng, EXPERTS, HIDDEN),
    )
    pull = draw(rng, RANKS * TOKENS, HIDDEN)

    def step(run):
        def loss(*floats):
            out = run(*floats)
            return jnp.sum(out * pull), out

        return jax.jit(jax.grad(loss, argnums=tuple(range(6)), has_aux=True))(*floats)

    got = step(run_moe(group, topk_idx, activation, weigh_input, **settings))
    want = step(dense_moe(topk_idx, activation, weigh_input))
    relative(got, want)
    for gradient in got[0][2:]:
        np.testing.assert_array_equal(gradient[5], 0)


def test_errors(make_group):
    group = make_group(RANKS, num_experts=EXPERTS, top_k=2, hidden=HIDDEN, backend="xla")
    rng = np.random.default_rng(0)
    topk_idx = np.zeros((RANKS * TOKENS, 2), np.int32)
    floats = [
        draw(rng, RANKS * TOKENS, HIDDEN), draw(rng, RANKS * TOKENS, 2), draw(rng, EXPERTS, HIDDEN, 2 * FFN),
        draw(rng, EXPERTS, FFN, HIDDEN), draw(rng, EXPERTS, 2 * FFN), draw(rng, EXPERTS, HIDDEN),
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"weigh_input: expected top_k = 1 in mode 'low_latency', got 2; use"
    ):
        run_moe(group, topk_idx, "swiglu", True, mode="low_latency")(*floats)
    with pytest.raises(ValueError, match=r"moe_ffn: bi: expected shape \[2, 12\], got \[2, 11\]; one bias"):
        run_moe(group, topk_idx, "swiglu", False)(*floats[:4], floats[4][:, :-1], floats[5])
    with pytest.raises(ValueError, match=r"moe_ffn: bo: expected dtype float32, got bfloat16; cast x and"):
        run_moe(group, topk_idx, "swiglu", False)(*floats[:5], floats[5].astype(jnp.bfloat16))
    config = wep.RouterConfig(EXPERTS, 2, use_logit_bias=True)
    with pytest.raises(
        ValueError, match="router_logits: bias must be an array with use_logit_bias=True, got None"
    ):
        wep.routing.router_logits(floats[0], jnp.ones((HIDDEN, EXPERTS)), config)
    with pytest.raises(
        ValueError, match=r"router_logits: bias must be a float array \[num_experts\] = \[8\]"
    ):
        wep.routing.router_logits(floats[0], jnp.ones((HIDDEN, EXPERTS)), config, bias=jnp.ones(7))
    with pytest.raises(
        ValueError, match="MoE: shared_gate: expected False without a shared expert, got True"
    ):
        wep.flax.MoE(HIDDEN, FFN, EXPERTS, 2, group, rngs=nnx.Rngs(0), shared_gate=True)


# ---- the layers ----


def test_linen_and_nnx_are_the_same_layer(make_group):
    group = make_group(RANKS, num_experts=EXPERTS, top_k=2, hidden=HIDDEN, backend="xla")
    settings = {
        "hidden": HIDDEN, "ffn": FFN, "num_experts": EXPERTS, "top_k": 2, "group": group, "shared_ffn": 4,
        "shared_gate": True, "use_bias": True, "weigh_input": True, "activation": wep.ClampedSwiGLU(limit=0.5),
        "router": wep.RouterConfig(EXPERTS, 2, use_logit_bias=True),
    }  # fmt: skip
    layer = wep.flax.MoE(**settings, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    values = {}
    for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        values[".".join(path)] = leaf[...] = draw(rng, *leaf.shape)
    assert set(values) == {
        "gate.kernel", "gate.bias", "wi", "wo", "bi", "bo", "shared_wi", "shared_wo", "shared_gate",
    }  # fmt: skip
    nnx.update(layer, nnx.from_flat_state([(tuple(n.split(".")), nnx.Param(v)) for n, v in values.items()]))
    linen = wep.flax.linen.MoE(**settings)
    x = draw(rng, 4, 3, HIDDEN)
    made = nn.meta.unbox(jax.eval_shape(linen.init, jax.random.key(0), x))["params"]
    params = {"gate": {name: values[f"gate.{name}"] for name in ("kernel", "bias")}}
    params |= {name: value for name, value in values.items() if "." not in name}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, made)
    got = layer(x)
    np.testing.assert_array_equal(linen.apply({"params": params}, x), got)

    tokens = x.reshape(-1, HIDDEN)
    logits = tokens @ values["gate.kernel"] + values["gate.bias"]
    routing = wep.routing.route(logits, wep.RouterConfig(EXPERTS, 2))
    dense = dense_moe(np.asarray(routing.topk_idx), settings["activation"], True)
    want = dense(tokens, routing.topk_weights, *(values[name] for name in ("wi", "wo", "bi", "bo")))
    shared = settings["activation"](tokens @ values["shared_wi"]) @ values["shared_wo"]
    want += shared / (1 + jnp.exp(-tokens @ values["shared_gate"]))
    relative(got, want.reshape(got.shape))
