"""make_plan, dispatch and combine on both backends against the NumPy oracle, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_wideep as wep

EPS = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}


def plan_arrays(plan):
    return {
        "group_sizes": plan.group_sizes,
        "num_rows": plan.num_rows[None],
        "overflow": plan.overflow[None],
        "tokens_per_expert": plan.tokens_per_expert,
        "dest_rank": plan.dest_rank,
        "dest_row": plan.dest_row,
        "row_source": plan.row_source,
        "arrival_rows": plan.arrival_rows,
        "rows_per_source": plan.rows_per_source,
    }


def check_plan(got, want, num_ranks):
    for name, array in got.items():
        if name == "tokens_per_expert":
            continue  # the same on every rank
        expected = getattr(want, name)
        np.testing.assert_array_equal(np.asarray(array).reshape(expected.shape), expected, name)
    everyone = np.asarray(got["tokens_per_expert"]).reshape(num_ranks, -1)
    np.testing.assert_array_equal(everyone, np.tile(want.tokens_per_expert, (num_ranks, 1)))


def round_trip(group, capacity, **options):
    """Plan, dispatch, a made-up expert that depends on the row, combine."""

    def body(x, weights, topk_idx, scale):
        plan = wep.make_plan(topk_idx, group, capacity=capacity)
        rows, row_weights = wep.dispatch(x, weights, plan, **options)
        y = rows * scale.astype(rows.dtype)
        out = wep.combine(y, row_weights, plan, **options)
        return out, rows, row_weights, plan_arrays(plan)

    return oracle.on_ranks(group, body)


def expected_round_trip(x, weights, topk_idx, scale, num_experts, capacity):
    plan = oracle.make_plan(topk_idx, num_experts, capacity)
    rows, row_weights = oracle.dispatch(x, weights, plan)
    y = (rows.astype(np.float32) * scale).astype(x.dtype)
    return plan, rows, row_weights, oracle.combine(y, row_weights, plan)


def check_round_trip(group, x, weights, topk_idx, capacity, dtype):
    num_ranks, tokens, top_k = topk_idx.shape
    x = np.asarray(jnp.asarray(x, dtype))
    worst = num_ranks * tokens * top_k
    plan, rows, row_weights, out = expected_round_trip(
        x, weights, topk_idx, 1.5, group.num_experts, worst if capacity is None else capacity
    )
    scale = jnp.full(num_ranks, 1.5, jnp.float32)
    flat = (x.reshape(-1, x.shape[2]), weights.reshape(-1, top_k), topk_idx.reshape(-1, top_k), scale)
    got_out, got_rows, got_row_weights, got_plan = round_trip(group, capacity)(*flat)
    check_plan(got_plan, plan, num_ranks)
    np.testing.assert_array_equal(np.asarray(got_rows).reshape(rows.shape), rows)
    np.testing.assert_array_equal(np.asarray(got_row_weights).reshape(row_weights.shape), row_weights)
    assert got_out.dtype == dtype
    got_out = np.asarray(got_out, np.float64).reshape(out.shape)
    np.testing.assert_allclose(got_out, out, rtol=EPS[dtype], atol=EPS[dtype] * 4)


def draw_inputs(seed, num_ranks, tokens, num_experts, top_k, hidden, **routing):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_ranks, tokens, hidden))
    weights = rng.normal(size=(num_ranks, tokens, top_k)).astype(np.float32)
    return x, weights, oracle.random_topk(rng, num_ranks, tokens, num_experts, top_k, **routing)


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_any_number_of_ranks(make_group, backend, num_ranks):
    group = make_group(num_ranks, num_experts=2 * num_ranks, top_k=2, hidden=8, backend=backend)
    inputs = draw_inputs(num_ranks, num_ranks, 5, 2 * num_ranks, 2, 8, masked=0.2)
    check_round_trip(group, *inputs, None, jnp.float32)


@given(data=st.data())
def test_any_routing(data):
    num_ranks = data.draw(st.sampled_from([2, 3, 8]), "ranks")
    local_experts = data.draw(st.integers(1, 4), "local experts")
    num_experts = num_ranks * local_experts
    top_k = data.draw(st.integers(1, min(16, num_experts)), "top_k")
    tokens = data.draw(st.sampled_from([1, 3, 8]), "tokens")
    hidden = data.draw(st.sampled_from([8, 24, 136]), "hidden")
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]), "dtype")
    backend = data.draw(st.sampled_from(["cpu", "cpu", "xla"]), "backend")
    routing = {
        "kind": data.draw(st.sampled_from(["uniform", "zipf", "hot", "empty"]), "routing"),
        "masked": data.draw(st.sampled_from([0.0, 0.5]), "masked"),
        "distinct": data.draw(st.booleans(), "distinct"),
    }
    worst = num_ranks * tokens * top_k
    capacity = data.draw(st.sampled_from([None, 1, max(1, worst // num_ranks), worst + 3]), "capacity")
    mesh = jax.make_mesh((num_ranks,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:num_ranks])  # fmt: skip
    seed = data.draw(st.integers(0, 2**20), "seed")
    x, weights, topk_idx = draw_inputs(seed, num_ranks, tokens, num_experts, top_k, hidden, **routing)
    empty_ranks = data.draw(st.lists(st.integers(0, num_ranks - 1), max_size=2), "ranks without tokens")
    topk_idx[empty_ranks] = -1
    with wep.ExpertGroup(mesh, num_experts=num_experts, top_k=top_k, hidden=hidden, backend=backend) as group:
        check_round_trip(group, x, weights, topk_idx, capacity, dtype)


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradients(make_group, backend, dtype, capacity):
    """Against the derivatives worked out by hand: out = sum over kept (t, k) of w[t, k] * 1.5 * x[t]."""
    num_ranks, tokens, top_k, hidden = 8, 6, 3, 128
    group = make_group(num_ranks, num_experts=16, top_k=top_k, hidden=hidden, backend=backend)
    x, weights, topk_idx = draw_inputs(3, num_ranks, tokens, 16, top_k, hidden, kind="zipf", masked=0.2)
    x = np.asarray(jnp.asarray(x, dtype))
    cotangent = np.asarray(jnp.asarray(np.random.default_rng(4).normal(size=x.shape), dtype))
    scale = jnp.full(num_ranks, 1.5, jnp.float32)

    run = round_trip(group, capacity)

    def loss(x, weights):
        out = run(x, weights, topk_idx.reshape(-1, top_k), scale)[0]
        return jnp.sum(out.astype(jnp.float32) * cotangent.reshape(out.shape).astype(np.float32))

    dx, dweights = jax.grad(loss, argnums=(0, 1))(x.reshape(-1, hidden), weights.reshape(-1, top_k))

    plan = oracle.make_plan(topk_idx, 16, num_ranks * tokens * top_k if capacity is None else capacity)
    kept = plan.dest_rank >= 0
    assert capacity is None or plan.overflow.sum() > 0
    x64, cot64 = x.astype(np.float64), cotangent.astype(np.float64)
    want_dx = 1.5 * np.where(kept, weights, 0).sum(axis=2)[..., None] * cot64
    want_dw = np.where(kept, 1.5 * np.sum(x64 * cot64, axis=2)[..., None], 0)
    eps = EPS[dtype]
    np.testing.assert_allclose(
        np.asarray(dx, np.float64), want_dx.reshape(dx.shape), rtol=8 * eps, atol=16 * eps
    )
    size = np.abs(x64 * cot64).sum(axis=2).max()  # of the sum whose rounding is compared
    np.testing.assert_allclose(
        np.asarray(dweights), want_dw.reshape(dweights.shape), rtol=8 * eps, atol=eps * size
    )


def test_gradient_rows_past_the_end_are_zero(make_group, backend):
    group = make_group(4, num_experts=4, top_k=1, hidden=8, backend=backend)
    topk_idx = np.zeros((12, 1), np.int32)  # all to expert 0: ranks 1 to 3 receive nothing

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group, capacity=10)
        rows, row_weights = wep.dispatch(x, weights, plan)

        def from_rows(rows, row_weights):
            return wep.combine(rows, row_weights, plan)

        out, pullback = jax.vjp(from_rows, rows, row_weights)
        return (*pullback(jnp.ones_like(out)), rows, row_weights)

    drows, drow_weights, rows, row_weights = oracle.on_ranks(group, body)(
        jnp.ones((12, 8)), jnp.full((12, 1), 2.0), topk_idx
    )
    for array, filled in ((rows, 1), (row_weights, 2), (drows, 2), (drow_weights, 8)):
        array = np.asarray(array).reshape(40, -1)
        np.testing.assert_array_equal(array[:10], filled)
        np.testing.assert_array_equal(array[10:], 0)


def test_unspecified_tail_reaches_no_result(make_group, backend):
    """zero_tail=False: whatever rows past the end hold, even NaN, outputs and gradients do not show it."""
    group = make_group(4, num_experts=8, top_k=2, hidden=16, backend=backend)
    x, weights, topk_idx = draw_inputs(5, 4, 6, 8, 2, 16, masked=0.3)

    def run(zero_tail):
        def loss(x, weights, topk_idx):
            plan = wep.make_plan(topk_idx, group)
            rows, row_weights = wep.dispatch(x, weights, plan, zero_tail=zero_tail)
            if not zero_tail:
                tail = jnp.arange(plan.capacity) >= plan.num_rows
                rows = jnp.where(tail[:, None], jnp.nan, rows)
                row_weights = jnp.where(tail, jnp.nan, row_weights)
            out = wep.combine(rows, row_weights, plan, zero_tail=zero_tail)
            return jnp.sum(jnp.sin(out))

        def body(x, weights, topk_idx):
            return jax.grad(loss, argnums=(0, 1))(x, weights, topk_idx)

        return oracle.on_ranks(group, body)(
            jnp.asarray(x.reshape(-1, 16), jnp.float32), weights.reshape(-1, 2), topk_idx.reshape(-1, 2)
        )

    for clean, dirty in zip(run(True), run(False), strict=True):
        assert np.isfinite(np.asarray(clean)).all()
        np.testing.assert_array_equal(clean, dirty)


def test_backends_agree_bit_for_bit_on_repeat(make_group):
    group = make_group(8, num_experts=32, top_k=4, hidden=64)
    x, weights, topk_idx = draw_inputs(6, 8, 16, 32, 4, 64, kind="zipf")
    flat = (
        jnp.asarray(x.reshape(-1, 64), jnp.bfloat16), weights.reshape(-1, 4), topk_idx.reshape(-1, 4), jnp.ones(8),
    )  # fmt: skip
    run = round_trip(group, None)
    first = jax.tree.map(np.asarray, run(*flat))
    for _ in range(5):
        again = jax.tree.map(np.asarray, run(*flat))
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_nan_and_infinite_gate_weights_stay_with_their_token(make_group, backend):
    group = make_group(4, num_experts=4, top_k=1, hidden=8, backend=backend)
    topk_idx = np.arange(8, dtype=np.int32).reshape(8, 1) % 4
    weights = np.ones((8, 1), np.float32)
    weights[2], weights[5] = np.nan, np.inf
    out = round_trip(group, None)(np.ones((8, 8), np.float32), weights, topk_idx, jnp.ones(4))[0]
    out = np.asarray(out)
    assert np.isnan(out[2]).all() and np.isposinf(out[5]).all()
    np.testing.assert_array_equal(np.delete(out, [2, 5], axis=0), 1)


def test_no_tokens_at_all(make_group, backend):
    group = make_group(4, num_experts=4, top_k=1, hidden=8, backend=backend)

    def body(x, weights, topk_idx):
        x, weights, topk_idx = x[:0], weights[:0], topk_idx[:0]
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(x, weights, plan)
        out = wep.combine(rows, row_weights, plan)
        assert out.shape == (0, 8) and rows.shape == (0, 8)
        return plan.group_sizes, plan.num_rows[None], jnp.sum(out)[None]

    # Not empty arguments: jax 0.11.2 can crash when it compiles a shard_map that has them, also without this library.
    one = np.ones((4, 8), np.float32), np.ones((4, 1), np.float32), np.zeros((4, 1), np.int32)
    for array in oracle.on_ranks(group, body)(*one):
        np.testing.assert_array_equal(array, 0)


MESHES = {
    "product of axes": ((4, 2), ("data", "expert"), ("data", "expert")),
    "product, other order": ((4, 2), ("data", "expert"), ("expert", "data")),
    "sub-axis, several groups": ((2, 4), ("replica", "expert"), ("expert",)),
    "middle axis": ((2, 3, 2), ("a", "expert", "b"), ("expert",)),
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("layout", MESHES)
def test_meshes(make_group, backend, layout, kind):
    """Groups over products and parts of a mesh's axes: each group side by side equals the oracle alone."""
    sizes, names, axis = MESHES[layout]
    devices = jax.devices()[: np.prod(sizes)]
    mesh = jax.make_mesh(
        sizes, names, axis_types=(getattr(jax.sharding.AxisType, kind),) * len(sizes), devices=devices
    )
    group = make_group(mesh=mesh, axis=axis, num_experts=24, top_k=2, hidden=8, backend=backend)
    num_ranks = group.num_ranks
    num_groups = len(devices) // num_ranks
    others = tuple(name for name in names if name not in axis)
    rng = np.random.default_rng(7)
    x = rng.normal(size=(num_groups, num_ranks, 4, 8)).astype(np.float32)
    weights = rng.random((num_groups, num_ranks, 4, 2)).astype(np.float32)
    topk_idx = np.stack([oracle.random_topk(rng, num_ranks, 4, 24, 2, masked=0.1) for _ in range(num_groups)])

    spec = jax.sharding.PartitionSpec((*others, *axis))
    place = jax.sharding.NamedSharding(mesh, spec)
    flat = [jax.device_put(a.reshape(-1, a.shape[-1]), place) for a in (x, weights, topk_idx)]

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(x, weights, plan)
        return wep.combine(2 * rows, row_weights, plan), plan.dest_row

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    out, dest_row = (np.asarray(a).reshape(num_groups, num_ranks, 4, -1) for a in run(*flat))
    for i in range(num_groups):
        plan, _, _, want = expected_round_trip(x[i], weights[i], topk_idx[i], 2.0, 24, num_ranks * 8)
        np.testing.assert_array_equal(dest_row[i], plan.dest_row)
        np.testing.assert_allclose(out[i], want, rtol=1e-6, atol=1e-6)


def test_mesh_from_set_mesh(make_group):
    mesh = jax.make_mesh((4,), ("expert",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        group = wep.ExpertGroup(num_experts=4, top_k=1, hidden=8)
    assert group.mesh == mesh and group.num_ranks == 4
    group.close()
