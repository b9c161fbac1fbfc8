"""moe_ffn in both modes against a loop over experts on all tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec

import jax_wideep as wep

RANKS, EXPERTS, TOP_K, HIDDEN, FFN = 4, 8, 3, 16, 8
SPEC = PartitionSpec("expert")


def swiglu(h):
    gate, up = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    return gate / (1 + jnp.exp(-gate)) * up


def inputs(tokens, seed=0, kind="zipf"):
    rng = np.random.default_rng(seed)
    topk_idx = oracle.random_topk(rng, RANKS, tokens, EXPERTS, TOP_K, kind=kind, masked=0.1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    floats = (
        draw(RANKS * tokens, HIDDEN),
        draw(RANKS * tokens, TOP_K),
        draw(EXPERTS, HIDDEN, 2 * FFN) / 4,
        draw(EXPERTS, FFN, HIDDEN) / 3,
    )
    return floats, jnp.asarray(topk_idx.reshape(-1, TOP_K))


def spread(group, **settings):
    def body(x, weights, wi, wo, topk_idx):
        out, stats = wep.moe_ffn(x, topk_idx, weights, wi, wo, group, **settings)
        return out, stats.tokens_per_expert, stats.overflow[None]

    return jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC)


def loss_of(run, topk_idx, pull):
    def loss(*floats):
        out, *rest = run(*floats, topk_idx)
        return jnp.sum(out * pull), (out, rest)

    return loss


def relative(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        assert scale > 0 and np.abs(a - b).max() <= tolerance * scale


@pytest.fixture
def group(make_group, backend):
    return make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, chunk=4, backend=backend)


@pytest.mark.parametrize(
    ("tokens", "kind", "settings"),
    [
        (5, "hot", {}),
        (5, "zipf", {"implementation": "xla"}),
        (4, "hot", {"mode": "low_latency", "quantize": None}),
        (11, "zipf", {"mode": "low_latency", "quantize": None}),  # three microbatches, the last one not full
    ],
)
def test_equals_a_dense_loop(group, tokens, kind, settings):
    floats, topk_idx = inputs(tokens, kind=kind)
    pull = jnp.asarray(np.random.default_rng(1).normal(size=floats[0].shape), jnp.float32)

    def dense(x, weights, wi, wo, topk_idx):
        return (oracle.dense_moe(x, topk_idx, weights, wi, wo, swiglu),)

    step = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    (_, (out, (counts, overflow))), grads = jax.jit(step(loss_of(spread(group, **settings), topk_idx, pull)))(
        *floats
    )
    (_, (want, _)), want_grads = jax.jit(step(loss_of(dense, topk_idx, pull)))(*floats)
    relative((out, grads), (want, want_grads))
    chosen = np.asarray(topk_idx)
    np.testing.assert_array_equal(
        np.asarray(counts).reshape(RANKS, EXPERTS),
        np.tile(np.bincount(chosen[chosen >= 0], minlength=EXPERTS), (RANKS, 1)),
    )
    np.testing.assert_array_equal(overflow, 0)


def test_capacity(group):
    """Drops what the plan drops, and nothing of it reaches an output or a gradient."""
    tokens, capacity = 6, 9
    floats, topk_idx = inputs(tokens)
    plan = oracle.make_plan(np.asarray(topk_idx).reshape(RANKS, tokens, TOP_K), EXPERTS, capacity)
    kept = jnp.asarray(plan.dest_rank.reshape(-1, TOP_K) >= 0)
    run = spread(group, capacity=capacity)
    pull = jnp.ones_like(floats[0])

    def dense(x, weights, wi, wo, topk_idx):
        return (oracle.dense_moe(x, topk_idx, jnp.where(kept, weights, 0), wi, wo, swiglu),)

    step = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    (_, (out, (counts, overflow))), grads = jax.jit(step(loss_of(run, topk_idx, pull)))(*floats)
    (_, (want, _)), want_grads = jax.jit(step(loss_of(dense, topk_idx, pull)))(*floats)
    relative((out, grads), (want, want_grads))
    np.testing.assert_array_equal(overflow, plan.overflow)
    np.testing.assert_array_equal(counts[:EXPERTS], plan.tokens_per_expert)
    assert plan.overflow.sum() > 0


def test_a_plan_already_made(group):
    floats, topk_idx = inputs(4)

    def body(x, weights, wi, wo, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        return wep.moe_ffn(x, topk_idx, weights, wi, wo, group, plan=plan)[0]

    run = jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC))
    np.testing.assert_array_equal(run(*floats, topk_idx), jax.jit(spread(group))(*floats, topk_idx)[0])


@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(group, mode, dtype):
    floats, topk_idx = inputs(6)
    x, weights, wi, wo = floats
    narrow = (x.astype(dtype), weights, wi.astype(dtype), wo.astype(dtype))
    out, _, _ = jax.jit(spread(group, mode=mode, quantize=None))(*narrow, topk_idx)
    assert out.dtype == dtype
    wide = [a.astype(jnp.float32) for a in narrow]
    want = oracle.dense_moe(wide[0], topk_idx, *wide[1:], swiglu)
    relative(out.astype(jnp.float32), want, 0.03)


@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
def test_no_statistics_where_none_are_wanted(make_group, mode):
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, chunk=4)
    floats, topk_idx = inputs(tokens=4)
    with_stats = jax.jit(spread(group, mode=mode, quantize=None))(*floats, topk_idx)[0]

    def body(x, weights, wi, wo, topk_idx):
        out, stats = wep.moe_ffn(
            x, topk_idx, weights, wi, wo, group, mode=mode, quantize=None, return_stats=False
        )
        assert stats is None
        return out

    run = jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC))
    np.testing.assert_array_equal(run(*floats, topk_idx), with_stats)
