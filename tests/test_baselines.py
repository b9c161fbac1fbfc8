"""The benchmark's baselines do the library's job: same rows, same order, same outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_wideep as wep
from jax_wideep.bench import baselines, exchange

RANKS, TOKENS, EXPERTS, TOP_K, HIDDEN = 4, 24, 8, 3, 16
ON_CPU = [name for name, baseline in baselines.BASELINES.items() if "cpu" not in baseline.missing_on]


def _data(kind, masked, dtype=np.float32):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(dtype)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind=kind, masked=masked)
    weights = rng.random((RANKS, TOKENS, TOP_K)).astype(np.float32)
    return x, topk_idx, weights


def _flat(array):
    return array.reshape(-1, *array.shape[2:])


def _emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What jax.lax.ragged_all_to_all documents, from an all_gather of everything."""
    me = jax.lax.axis_index(axis_name)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, starts, sizes, targets = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    at = jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        offset = at - targets[source, me]
        mine = (offset >= 0) & (offset < sizes[source, me])
        piece = operands[source][jnp.clip(starts[source, me] + offset, 0, operand.shape[0] - 1)]
        output = jnp.where(mine[:, None], piece, output)
    # The receiver's sizes must be the senders'.
    return jnp.where(jnp.all(recv_sizes == sizes[:, me]), output, jnp.nan)


@pytest.fixture(params=list(baselines.BASELINES))
def baseline(request, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _emulated_ragged_all_to_all)
    return baselines.BASELINES[request.param]


def _setting(group, capacity=None):
    return baselines.no_drop_setting(group.axis, RANKS, EXPERTS, TOKENS, TOP_K, capacity=capacity)


@pytest.mark.parametrize("kind, masked", [("uniform", 0), ("zipf", 0.3), ("hot", 0), ("empty", 0)])
def test_rows_are_those_of_the_plan(baseline, make_group, kind, masked):
    x, topk_idx, weights = _data(kind, masked)
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    setting = _setting(group)

    def run(x, topk_idx, weights):
        rows, sizes, state = baseline.dispatch(x, topk_idx, setting)
        return rows, sizes, baseline.combine(rows * 2, weights, state, setting)

    rows, sizes, out = oracle.on_ranks(group, run)(_flat(x), _flat(topk_idx), _flat(weights))
    plan = oracle.make_plan(topk_idx, EXPERTS, setting.capacity)
    want_rows, row_weights = oracle.dispatch(x, weights, plan)
    np.testing.assert_array_equal(sizes, _flat(plan.group_sizes))
    np.testing.assert_array_equal(rows, _flat(want_rows))
    want = oracle.combine(want_rows * 2, row_weights, plan)
    np.testing.assert_allclose(out, _flat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_layer_equals_moe_ffn_with_gradients(baseline, make_group, dtype, rtol):
    x, topk_idx, weights = _data("zipf", 0.2)
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    capacity = RANKS * TOKENS * TOP_K // 2  # room enough for this data
    setting = _setting(group, capacity)
    rng = np.random.default_rng(3)
    wi = jnp.asarray(rng.standard_normal((EXPERTS, HIDDEN, 2 * 8)) / 4, dtype)
    wo = jnp.asarray(rng.standard_normal((EXPERTS, 8, HIDDEN)) / 4, dtype)
    target = rng.standard_normal((RANKS * TOKENS, HIDDEN)).astype(np.float32)

    def ours(x, topk_idx, weights, wi, wo):
        return wep.moe_ffn(x, topk_idx, weights, wi, wo, group, capacity=capacity)[0]

    def theirs(x, topk_idx, weights, wi, wo):
        def experts(rows, group_sizes):
            hidden = wep.grouped_matmul(rows, wi, group_sizes)
            return wep.grouped_matmul(wep.moe.activate(hidden, "swiglu"), wo, group_sizes)

        return baselines.moe(baseline, x, topk_idx, weights, experts, setting)

    def value_and_gradients(layer):
        run = oracle.on_ranks(group, layer)

        def loss(x, weights, wi, wo):
            return jnp.sum(run(x, _flat(topk_idx), weights, wi, wo).astype(jnp.float32) * target)

        args = (jnp.asarray(_flat(x), dtype), jnp.asarray(_flat(weights)), wi, wo)
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*args)

    want, got = value_and_gradients(ours), value_and_gradients(theirs)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * np.abs(a).max())


@pytest.mark.parametrize("name", list(baselines.BASELINES))
def test_benchmark_traces(name, make_group):
    """With XLA's own ragged_all_to_all, which CPUs cannot run, and with shard_map's type check."""
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    x, topk_idx, weights = _data("uniform", 0)
    timed = exchange.baseline_candidates(name, baselines.BASELINES[name], _setting(group), group.mesh)
    inputs = tuple(map(_flat, (x, topk_idx, weights)))
    for candidate, extra in zip(timed.values(), ((), (inputs[0],)), strict=True):
        shapes = jax.eval_shape(candidate.run, *inputs, *extra)
        assert jax.tree.leaves(shapes)[0].shape == inputs[0].shape


def test_ragged_sizes_by_hand():
    # Rank 0 sends 1 row to itself and 2 to rank 1; rank 1 sends 3 and 4.
    pair = jnp.array([[1, 2], [3, 4]])
    sizes = baselines.ragged_sizes(pair, jnp.int32(1))
    assert [list(map(int, field)) for field in sizes] == [[0, 3], [3, 4], [1, 2], [2, 4]]
    home = sizes.reversed(pair, jnp.int32(1))
    # Rank 1 holds 2 rows of rank 0 and 4 of its own; at home they go behind rank 0's 1 row, and its own 3.
    assert [list(map(int, field)) for field in home] == [[0, 2], [2, 4], [1, 3], [3, 4]]


def test_cpu_has_two_baselines():
    assert ON_CPU == ["padded all_to_all", "ring"]


@pytest.mark.parametrize("name", ON_CPU)
def test_a_block_too_small_loses_rows(name, make_group):
    """The sizes matter: with fewer than the worst case the hot expert's rows do not fit."""
    x, topk_idx, weights = _data("hot", 0)
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)

    def run(setting):
        def layer(x, topk_idx, weights):
            return baselines.moe(baselines.BASELINES[name], x, topk_idx, weights, lambda r, _: r, setting)

        return np.asarray(oracle.on_ranks(group, layer)(_flat(x), _flat(topk_idx), _flat(weights)))

    enough = run(_setting(group))
    sizes = baselines.no_drop_setting(group.axis, RANKS, EXPERTS, TOKENS, TOP_K, capacity=8, pad=8)
    assert not np.allclose(run(sizes), enough)
