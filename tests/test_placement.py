"""Placement: its properties, the spreading over replicas, and that nothing but the balance changes by it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep import load as loads
from jax_wideep import replicas
from jax_wideep.bench import draws

# ---- where experts lie ----


@st.composite
def problems(draw):
    """load, num_physical, num_ranks, num_nodes, num_groups"""
    nodes, ranks_of_node, places = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    ranks = nodes * ranks_of_node
    physical = ranks * places
    divisors = [n for n in range(1, physical // nodes + 1) if (nodes * n) <= physical]
    experts = nodes * draw(st.sampled_from(divisors))
    groups = nodes * draw(st.sampled_from([g for g in (1, 2, 3) if experts % (nodes * g) == 0]))
    kinds = st.one_of(st.integers(0, 5), st.integers(0, 10**6), st.just(0))
    load = draw(st.lists(kinds, min_size=experts, max_size=experts))
    return np.array(load), physical, ranks, nodes, groups


@given(problems())
def test_every_expert_has_replicas_and_the_tables_agree(problem):
    load, num_physical, num_ranks, nodes, groups = problem
    placement = wep.compute_placement(load, num_physical, num_ranks, num_nodes=nodes, num_groups=groups)
    table = placement.logical_of_physical
    assert table.shape == (num_physical,)
    count = collections.Counter(table.tolist())
    assert set(count) == set(range(len(load)))
    for expert in range(len(load)):
        assert placement.replicas[expert] == count[expert]
        listed = placement.physical_of_logical[expert]
        assert listed[: count[expert]].tolist() == np.flatnonzero(table == expert).tolist()
        assert (listed[count[expert] :] == -1).all()
    # All of a group's places are on one node.
    size, of_node = len(load) // groups, num_physical // nodes
    node_of_group = {}
    for place, expert in enumerate(table.tolist()):
        assert node_of_group.setdefault(expert // size, place // of_node) == place // of_node
    again = wep.compute_placement(load, num_physical, num_ranks, num_nodes=nodes, num_groups=groups)
    np.testing.assert_array_equal(again.logical_of_physical, table)


@given(st.permutations(range(12)), st.integers(12, 40))
def test_a_hotter_expert_never_has_fewer_replicas(load, num_physical):
    placement = wep.compute_placement(np.array(load), num_physical, 1, max_replicas=num_physical)
    assert (np.diff(placement.replicas[np.argsort(load)]) >= 0).all()


def test_layers_are_placed_alone_and_together_alike():
    load = np.random.default_rng(0).zipf(1.3, size=(5, 24))
    stack = wep.compute_placement(load, 32, 8, num_nodes=2, num_groups=4)
    for layer in range(5):
        alone = wep.compute_placement(load[layer], 32, 8, num_nodes=2, num_groups=4)
        jax.tree.map(np.testing.assert_array_equal, stack.layer(layer), alone)


def test_redundant_experts_even_out_zipf():
    """256 experts on 8 ranks, a quarter of redundant ones, on routing that the placement was not made from."""
    rng = np.random.default_rng(0)

    def draw():
        return draws.draw_topk_idx(rng, draws.Routing("zipf", 1.2), 8 * 512, 256, 8)

    placement = wep.compute_placement(np.bincount(draw().reshape(-1), minlength=256), 320, 8)
    fresh = draw().reshape(8, 512, 8)
    before = np.bincount(fresh.reshape(-1), minlength=256).reshape(8, -1).sum(axis=1)
    placed = [np.asarray(to_physical(placement, part, rank)) for rank, part in enumerate(fresh)]
    after = np.bincount(np.concatenate(placed).reshape(-1), minlength=320).reshape(8, -1).sum(axis=1)
    assert after.sum() == before.sum()
    assert before.max() > 5 * before.mean()
    assert after.max() <= 1.10 * after.mean()


# ---- which replica a selection goes to ----

to_physical = jax.jit(wep.Placement.to_physical)


@given(st.data())
def test_every_selection_reaches_one_replica_and_they_share_evenly(data):
    # Few shapes, since each one is compiled.
    experts, extra = data.draw(st.sampled_from([(1, 3), (6, 0), (9, 5)]))
    tokens, top_k = data.draw(st.sampled_from([(0, 2), (1, 3), (50, 4)]))
    load = np.array(data.draw(st.lists(st.integers(0, 99), min_size=experts, max_size=experts)))
    placement = wep.compute_placement(load, experts + extra, 1, max_replicas=experts + extra)
    rank = data.draw(st.integers(0, 100))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    topk_idx = rng.integers(-1, experts, (tokens, top_k)).astype(np.int32)

    got = np.asarray(to_physical(placement, topk_idx, rank))

    seen = collections.Counter()
    want = np.full_like(topk_idx, -1)
    for at in np.ndindex(topk_idx.shape):
        expert = topk_idx[at]
        if expert >= 0:
            places = np.flatnonzero(placement.logical_of_physical == expert)
            want[at] = places[(rank + seen[expert]) % len(places)]
            seen[expert] += 1
    np.testing.assert_array_equal(got, want)
    counts = np.bincount(got[got >= 0], minlength=placement.num_physical)
    for expert in range(experts):
        of_replicas = counts[placement.logical_of_physical == expert]
        assert of_replicas.max() - of_replicas.min() <= 1
    np.testing.assert_array_equal(
        placement.to_logical_counts(jnp.asarray(counts)),
        np.bincount(topk_idx[topk_idx >= 0], minlength=experts),
    )


def test_indices_out_of_range_stay_out_of_range():
    placement = wep.compute_placement(np.ones(4), 6, 2)
    physical = placement.to_physical(jnp.array([[0, 4], [-1, 3], [-7, 99]], jnp.int32), 0)
    inside = (np.asarray(physical) >= 0) & (np.asarray(physical) < 6)
    np.testing.assert_array_equal(inside, [[True, False], [False, True], [False, False]])
    assert physical[1, 0] == -1


# ---- the experts' outputs do not depend on where they lie ----

EXPERTS, PHYSICAL, TOP_K, HIDDEN, FFN, TOKENS = 12, 16, 3, 16, 8, 10


def split_over(group, array):
    return jax.device_put(array, NamedSharding(group.mesh, PartitionSpec(group.axis)))


def random_placement(seed):
    return wep.compute_placement(np.random.default_rng(seed).zipf(1.3, EXPERTS), PHYSICAL, 8)


@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
def test_moe_ffn_with_replicas_equals_a_dense_loop(make_group, backend, mode):
    group = make_group(num_experts=PHYSICAL, top_k=TOP_K, hidden=HIDDEN, backend=backend, chunk=TOKENS)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8 * TOKENS, HIDDEN)).astype(np.float32)
    # Expert 0 is in every token.
    rest = np.argsort(rng.random((len(x), EXPERTS - 1)), axis=1)[:, : TOP_K - 1] + 1
    topk_idx = np.concatenate([np.zeros((len(x), 1)), rest], axis=1).astype(np.int32)
    topk_idx[3] = -1
    weights = rng.random(topk_idx.shape, dtype=np.float32)
    wi = rng.normal(size=(EXPERTS, HIDDEN, 2 * FFN)).astype(np.float32)
    wo = rng.normal(size=(EXPERTS, FFN, HIDDEN)).astype(np.float32)

    @jax.jit
    def run(placement, x, topk_idx, weights, wi, wo):
        def on_one_rank(placement, *args):
            out, stats = wep.moe_ffn(*args, group, mode=mode, quantize=None, placement=placement)
            return out, jax.tree.map(lambda array: array[None], stats)

        split = PartitionSpec("expert")
        return jax.shard_map(
            on_one_rank, mesh=group.mesh, in_specs=(PartitionSpec(), *[split] * 5), out_specs=split
        )(placement, x, topk_idx, weights, wi, wo)

    want = oracle.dense_moe(x, topk_idx, weights, wi, wo, lambda h: jax.nn.silu(h[:, :FFN]) * h[:, FFN:])
    counts = np.bincount(topk_idx[topk_idx >= 0], minlength=EXPERTS)
    for seed in range(2):
        placement = random_placement(seed)
        table = placement.logical_of_physical
        out, stats = run(placement, x, topk_idx, weights, wi[table], wo[table])
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-4)
        for rank in range(8):
            np.testing.assert_array_equal(stats.tokens_per_expert[rank], counts)
        assert stats.rows_per_rank[0].sum() == counts.sum()
        expected = placement.rank_loads(counts, 8)
        assert np.abs(stats.rows_per_rank[0] - expected).max() <= 8 * PHYSICAL / 8
    assert run._cache_size() == 1


# ---- moving, and summing gradients ----


@pytest.mark.parametrize(
    ("sizes", "names", "axis"),
    [
        ((8,), ("expert",), "expert"),
        ((2, 4), ("data", "expert"), ("data", "expert")),
        ((2, 4), ("data", "expert"), "expert"),
    ],
)
def test_moving_there_and_back_is_bit_exact(make_group, sizes, names, axis):
    mesh = jax.make_mesh(
        sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes), devices=jax.devices()[:8]
    )
    group = make_group(mesh=mesh, axis=axis, num_experts=PHYSICAL, top_k=TOP_K, hidden=HIDDEN)
    rng = np.random.default_rng(0)
    bits = {
        "float32": rng.integers(0, 2**32, (EXPERTS, 3, 5), np.uint32).view(np.float32),
        "bfloat16": rng.integers(0, 2**16, (EXPERTS, 7), np.uint16).view(jnp.bfloat16),
        "int8": rng.integers(0, 100, EXPERTS, np.int8),
    }

    def same_bits(got, want):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))

    compiled = None
    first = random_placement(0)
    tree = {name: split_over(group, array[first.logical_of_physical]) for name, array in bits.items()}
    start = jax.tree.map(np.asarray, tree)
    for seed in (1, 2, 3):
        other = random_placement(seed)
        moved = wep.move_experts(tree, first, other, group)
        for name, array in bits.items():
            same_bits(moved[name], array[other.logical_of_physical])
            assert moved[name].sharding.is_equivalent_to(tree[name].sharding, array.ndim)
        jax.tree.map(same_bits, wep.move_experts(moved, other, first, group), start)
        compiled = compiled or replicas._move._cache_size()
    assert replicas._move._cache_size() == compiled


@pytest.mark.parametrize("extra", [0, 4, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replicas_get_the_sum_of_their_gradients(make_group, extra, dtype):
    physical = EXPERTS + extra
    num_ranks = 4
    group = make_group(num_ranks, num_experts=physical, top_k=TOP_K, hidden=HIDDEN)
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(physical, 3, 2)).astype(jnp.dtype(dtype))
    for seed in range(2):
        load = np.random.default_rng(seed).zipf(1.2, EXPERTS)
        placement = wep.compute_placement(load, physical, num_ranks)
        got = wep.sum_replica_gradients({"w": split_over(group, gradient)}, placement, group)["w"]
        assert got.dtype == gradient.dtype
        want = np.zeros((EXPERTS, 3, 2))
        np.add.at(want, placement.logical_of_physical, gradient.astype(np.float64))
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want[placement.logical_of_physical], rtol=tolerance, atol=tolerance
        )
        same = np.asarray(got)
        for expert in range(EXPERTS):
            of_replicas = same[placement.logical_of_physical == expert]
            assert (of_replicas == of_replicas[0]).all()
        weights = replicas.replica_weights(placement)
        np.testing.assert_allclose(placement.to_logical_counts(weights), 1, rtol=1e-6)


def test_errors_name_the_argument(make_group):
    group = make_group(num_experts=PHYSICAL, top_k=TOP_K, hidden=HIDDEN)
    placement = random_placement(0)
    for call, message in {
        lambda: wep.compute_placement(np.ones(12), 15, 8): "num_physical: expected a multiple of the 8 ranks",
        lambda: wep.compute_placement(np.ones(12), 8, 8): "num_physical: expected between 12 experts",
        lambda: wep.compute_placement(
            np.ones(12), 16, 8, num_nodes=3
        ): "num_ranks: expected a multiple of the 3",
        lambda: wep.compute_placement(
            np.ones(12), 16, 8, num_groups=5
        ): "load: expected a multiple of the 5 groups",
        lambda: wep.compute_placement(-np.ones(12), 16, 8): "load: expected finite numbers",
        lambda: wep.make_placement(np.zeros(4), 2): "places for every",
        lambda: wep.make_placement(np.array([0, 1, 2]), 2): r"experts in \[0, 2\)",
        lambda: wep.move_experts({"w": jnp.ones((3, 2))}, placement, placement, group): r"tree\['w'\]",
        lambda: wep.sum_replica_gradients(
            jnp.ones(16), wep.compute_placement(np.ones((2, 12)), 16, 8), group
        ): "a placement of one layer",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- load ----


def test_average_and_records_of_load():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (3, 4))
    average = np.zeros(4)
    got = jnp.zeros(4)
    for row in counts:
        average = 0.9 * average + 0.1 * row
        got = loads.update_average(got, jnp.asarray(row), 0.9)
    np.testing.assert_allclose(got, average, rtol=1e-6)
    np.testing.assert_allclose(loads.imbalance([[1, 3], [0, 0]]), [1.5, 1.0])

    stats = wep.MoEStats(
        jnp.asarray(counts), jnp.array([0, 2, 5]), rows_per_rank=jnp.asarray(counts[:, :2] + counts[:, 2:])
    )
    records = loads.layer_records(stats)
    assert [record["tokens_per_expert"] for record in records] == counts.tolist()
    assert [record["dropped"] for record in records] == [0, 2, 5]
    assert records[1]["rows_per_rank"] == (counts[1, :2] + counts[1, 2:]).tolist()
    one = loads.layer_records(jax.tree.map(lambda array: array[1], stats))
    assert one == records[1:2]
