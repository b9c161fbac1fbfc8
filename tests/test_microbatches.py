"""Microbatches, experts in chunks, and what the backward pass keeps: the same values and gradients, less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec

import jax_wideep as wep
import jax_wideep.flax.linen
from jax_wideep.flax.transformer import Transformer, TransformerConfig

RANKS, EXPERTS, TOP_K, HIDDEN, FFN = 4, 8, 3, 16, 8
SPEC = PartitionSpec("expert")
# Compiling is most of these tests' time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def swiglu(h):
    gate, up = jnp.split(h, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up


def inputs(tokens, seed=0, hidden=HIDDEN, ffn=FFN):
    rng = np.random.default_rng(seed)
    topk_idx = oracle.random_topk(rng, RANKS, tokens, EXPERTS, TOP_K, kind="zipf", masked=0.1)
    shapes = (
        (RANKS * tokens, hidden),
        (RANKS * tokens, TOP_K),
        (EXPERTS, hidden, 2 * ffn),
        (EXPERTS, ffn, hidden),
    )
    floats = [jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32) for shape in shapes]
    return floats, jnp.asarray(topk_idx.reshape(-1, TOP_K))


def layer(group, layers=1, **options):
    def body(x, weights, wi, wo, topk_idx):
        for _ in range(layers):
            out, stats = wep.moe_ffn(x, topk_idx, weights, wi, wo, group, **options)
            x = x + out if layers > 1 else out
        return x, stats.tokens_per_expert

    return jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC)


def with_gradients(run):
    def loss(floats, topk_idx):
        out, *rest = run(*floats, topk_idx)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), (
            out,
            *rest,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)


def dense(x, weights, wi, wo, topk_idx):
    return (oracle.dense_moe(x, topk_idx, weights, wi, wo, swiglu),)


@pytest.fixture
def group(make_group):
    return make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, chunk=4)


LOW_LATENCY = {"mode": "low_latency", "quantize": None, "microbatches": 2}


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (6, {"microbatches": 2}),
        (5, {"microbatches": 3}),  # of 2, 2 and 1 tokens
        (1, {"microbatches": 2}),
        (4, LOW_LATENCY),
        (7, LOW_LATENCY),  # of 4 and 3 tokens, as many as two calls take at a time
        (19, LOW_LATENCY | {"remat": "all"}),  # three times two, the last ones not full
        (1, LOW_LATENCY),
        (6, {"expert_chunk": 5}),
        (6, {"expert_chunk": 1000}),
        (6, {"remat": "hidden"}),
        (6, {"remat": "all", "expert_chunk": 24}),
    ],
)
def test_equals_a_dense_loop(group, tokens, options):
    floats, topk_idx = inputs(tokens)
    (_, (out, counts)), gradients = with_gradients(layer(group, **options))(floats, topk_idx)
    (_, (want,)), want_gradients = with_gradients(dense)(floats, topk_idx)
    for got, expected in zip((out, *gradients), (want, *want_gradients), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    chosen = np.asarray(topk_idx)
    np.testing.assert_array_equal(counts[:EXPERTS], np.bincount(chosen[chosen >= 0], minlength=EXPERTS))


def test_fp8_wire_of_two_microbatches(make_group):
    """Rows are quantised one by one, so the same rows arrive."""
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=128, chunk=6)
    floats, topk_idx = inputs(6, hidden=128)
    one, two = (
        jax.jit(layer(group, mode="low_latency", microbatches=number))(*floats, topk_idx)[0]
        for number in (1, 2)
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-6 * np.abs(one).max())


def temporaries(group, **options):
    """Bytes that XLA sets aside for four layers and their backward pass, on one rank.

    Ordered for memory: XLA's CPU compiler otherwise computes as soon as it can what is to be computed again.
    """
    floats, topk_idx = inputs(32, hidden=64, ffn=96)
    lowered = with_gradients(layer(group, layers=4, **options)).lower(floats, topk_idx)
    compiled = lowered.compile(QUICKLY | {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})
    return compiled.memory_analysis().temp_size_in_bytes


def test_less_memory(make_group):
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=64)
    worst, mean = RANKS * 32 * TOP_K, 32 * TOP_K
    rows, inner, hidden = (4 * size for size in (64, 96, 192))  # bytes of a row
    everything = temporaries(group)
    # Of two layers, at the least, they are not there.
    assert everything - temporaries(group, remat="hidden") > 2 * worst * (inner + hidden)
    assert everything - temporaries(group, remat="all") > 2 * worst * (inner + hidden + rows)
    chunked = temporaries(group, expert_chunk=mean // 4)
    assert everything - chunked > 3 * worst * (inner + hidden)
    spilling = temporaries(group, overflow="spill", capacity=mean)
    assert everything - spilling > 3 * (worst - mean) * (inner + hidden + rows)
    assert spilling - temporaries(group, overflow="spill", capacity=mean, remat="all") > 2 * mean * (
        inner + hidden
    )


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_layers(make_group, kind):
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, HIDDEN)), jnp.float32)

    def call(**options):
        settings = {
            "hidden": HIDDEN,
            "ffn": FFN,
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "group": group,
            **options,
        }
        if kind == "nnx":
            model = wep.flax.MoE(**settings, rngs=nnx.Rngs(0))

            def loss(model):
                y, stats = model(x, return_stats=True)
                return jnp.sum(y**2), (y, stats)

            (_, (y, stats)), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
            return y, stats, jax.tree.leaves(gradients)
        model = wep.flax.linen.MoE(**settings)
        params = linen.meta.unbox(jax.jit(model.init)(jax.random.key(0), x))

        def loss(params):
            y, stats = model.apply(params, x, return_stats=True)
            return jnp.sum(y**2), (y, stats)

        (_, (y, stats)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return y, stats, jax.tree.leaves(gradients)

    want, stats, want_gradients = call(overflow="drop")
    assert stats.spilled == 0
    options = {
        "overflow": "spill",
        "capacity_factor": 0.4,
        "microbatches": 2,
        "expert_chunk": 3,
        "remat": "all",
    }
    got, stats, gradients = call(**options)
    # Rows of the microbatches of 5 tokens, 0.4 of the mean rounded up, from every rank.
    assert 0 < stats.spilled <= 8 * 5 * TOP_K - stats.overflow and stats.overflow == 0
    for a, b in zip((got, *gradients), (want, *want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_a_call_may_choose_low_latency(make_group):
    """Settings that are for throughput mode do not stand in the way."""
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    make = functools.partial(wep.flax.MoE, HIDDEN, FFN, EXPERTS, TOP_K, group, quantize=None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, HIDDEN)), jnp.float32)
    model = make(overflow="spill", capacity_factor=0.5, expert_chunk=4, microbatches=2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(x, mode="low_latency"), make(rngs=nnx.Rngs(0))(x), atol=1e-5)


def test_a_transformer_takes_the_settings():
    plain = TransformerConfig(vocab=32, hidden=16, num_layers=1, num_heads=2, ffn=8, num_experts=8, top_k=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    tokens = np.random.default_rng(0).integers(0, 32, (8, 5), np.int32)
    spilling = dataclasses.replace(
        plain, overflow="spill", capacity_factor=0.3, microbatches=2, expert_chunk=2, remat="hidden"
    )
    with plain.make_group(mesh) as group:
        want, got = (
            nnx.jit(lambda model: model(tokens))(Transformer(config, group, rngs=nnx.Rngs(0)))
            for config in (plain, spilling)
        )
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
