"""ExpertGroup.mask_ranks: an exchange that leaves ranks out gives the bits of one whose selections are -1.

They are those of the masked ranks' experts, and all of the masked ranks' own tokens'.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import jax_wideep as wep

RANKS, EXPERTS, TOP_K, HIDDEN, FFN, TOKENS = 8, 16, 3, 128, 8, 5
PLAN = "group_sizes num_rows overflow tokens_per_expert dest_rank dest_row row_source arrival_rows rows_per_source"
# Which count what a mask drops.
COUNTS = ("overflow", "tokens_per_expert")

masks = st.sets(st.integers(0, RANKS - 1), max_size=RANKS - 1)


@pytest.fixture(scope="module")
def group():
    mesh = jax.make_mesh(
        (RANKS,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:RANKS]
    )
    shape = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "chunk": TOKENS}
    with wep.ExpertGroup(mesh, backend="cpu", deadline_s=20, **shape) as group:
        yield group


def draw(seed, **routing):
    """Of all ranks: x, weights, topk_idx, a cotangent."""
    rng = np.random.default_rng(seed)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, **routing)
    x, cotangent = rng.normal(size=(2, RANKS, TOKENS, HIDDEN)).astype(np.float32)
    return x, rng.normal(size=(RANKS, TOKENS, TOP_K)).astype(np.float32), topk_idx, cotangent


def flat(arrays):
    return [jnp.asarray(array.reshape(-1, array.shape[-1])) for array in arrays]


@functools.cache
def throughput(group, capacity, **options):
    """Everything that one layer does, forward and backward."""

    def body(x, weights, topk_idx, cotangent):
        def forward(x, weights):
            plan = wep.make_plan(topk_idx, group, capacity=capacity)
            rows, row_weights = wep.dispatch(x, weights, plan)
            out = wep.combine(jnp.tanh(rows), row_weights, plan)
            plan = {name: jnp.atleast_1d(getattr(plan, name)) for name in PLAN.split()}
            return out, {"rows": rows, "row_weights": row_weights, **plan}

        out, backward, more = jax.vjp(forward, x, weights, has_aux=True)
        dx, dweights = backward(cotangent)
        return {"out": out, "dx": dx, "dweights": dweights, **more}

    return oracle.on_ranks(group, body)


@functools.cache
def low_latency(group, quantize, halves):
    def body(x, weights, topk_idx, cotangent):
        def forward(x, weights):
            if halves:
                recv = wep.ll_dispatch_recv(wep.ll_dispatch_send(x, topk_idx, group, quantize=quantize))
                out = wep.ll_combine_recv(wep.ll_combine_send(jnp.tanh(recv.rows), weights, recv))
            else:
                recv = wep.ll_dispatch(x, topk_idx, group, quantize=quantize)
                out = wep.ll_combine(jnp.tanh(recv.rows), weights, recv)
            return out, {"rows": recv.rows, "counts": recv.counts, "row_source": recv.row_source}

        out, backward, more = jax.vjp(forward, x, weights, has_aux=True)
        dx, dweights = backward(cotangent)
        return {"out": out, "dx": dx, "dweights": dweights, **more}

    return oracle.on_ranks(group, body)


def run_both(group, run, arrays, masked):
    """Under the mask, and without it on the selections that are left."""
    x, weights, topk_idx, cotangent = arrays
    group.mask_ranks(masked)
    assert group.masked_ranks == tuple(sorted(masked))
    got = jax.device_get(run(*flat(arrays)))
    group.mask_ranks([])
    kept, dropped = oracle.mask_ranks(topk_idx, EXPERTS, masked)
    want = jax.device_get(run(*flat((x, weights, kept, cotangent))))
    for name, array in want.items():
        if name not in COUNTS:
            np.testing.assert_array_equal(got[name], array, name)
    return got, dropped


@given(masked=masks, seed=st.integers(0, 2**20), full=st.booleans(), kind=st.sampled_from(["uniform", "hot"]))
def test_throughput(group, masked, seed, full, kind):
    capacity = 11 if full else RANKS * TOKENS * TOP_K
    arrays = draw(seed, kind=kind, masked=0.1, distinct=kind == "hot")
    got, _ = run_both(group, throughput(group, capacity), arrays, masked)
    plan = oracle.make_masked_plan(arrays[2], EXPERTS, capacity, masked)
    for name in COUNTS:
        want = getattr(plan, name)
        np.testing.assert_array_equal(got[name].reshape(want.shape), want, name)


@settings(max_examples=12)
@given(masked=masks, seed=st.integers(0, 2**20), wire=st.sampled_from([("fp8", False), (None, True)]))
def test_low_latency(group, masked, seed, wire):
    run_both(group, low_latency(group, *wire), draw(seed, kind="zipf", masked=0.1), masked)


def test_nothing_is_compiled_again(group):
    step = throughput(group, RANKS * TOKENS * TOP_K)
    step(*flat(draw(1)))
    compiled = step._cache_size()
    group.mask_ranks([3])
    step(*flat(draw(1)))
    group.mask_ranks([])
    assert step._cache_size() == compiled


@pytest.mark.parametrize("options", [{}, {"capacity": 9, "overflow": "spill"}, {"mode": "low_latency"}])
def test_moe_ffn(group, options):
    """Against a loop over the experts that are left; statistics count what is dropped."""
    rng = np.random.default_rng(3)
    x, weights, topk_idx, _ = draw(4, kind="zipf", masked=0.1)
    wi = jnp.asarray(rng.normal(size=(EXPERTS, HIDDEN, FFN)) / HIDDEN**0.5, jnp.float32)
    wo = jnp.asarray(rng.normal(size=(EXPERTS, FFN, HIDDEN)), jnp.float32)
    if options.get("mode") == "low_latency":
        options = options | {"quantize": None}

    def body(x, weights, topk_idx, wi, wo):
        out, stats = wep.moe_ffn(x, topk_idx, weights, wi, wo, group, activation="gelu", **options)
        return out, stats.overflow[None]

    run = oracle.on_ranks(group, body)
    masked = [2, 5]
    kept, dropped = oracle.mask_ranks(topk_idx, EXPERTS, masked)
    assert dropped[masked].sum() > 0 and np.delete(dropped, masked).sum() > 0
    pull = jnp.asarray(rng.normal(size=(RANKS * TOKENS, HIDDEN)), jnp.float32)

    def loss(run):
        return lambda x, weights, wi, wo: jnp.sum(pull * run(x, weights, wi, wo))

    def dense(x, weights, wi, wo):
        gelu = functools.partial(jax.nn.gelu, approximate=True)
        return oracle.dense_moe(x, jnp.asarray(kept.reshape(-1, TOP_K)), weights, wi, wo, gelu)

    x, weights, topk_idx = flat((x, weights, topk_idx))
    group.mask_ranks(masked)
    try:
        out, overflow = run(x, weights, topk_idx, wi, wo)
        grads = jax.jit(
            jax.grad(loss(lambda x, w, wi, wo: run(x, w, topk_idx, wi, wo)[0]), argnums=(0, 1, 2, 3))
        )(x, weights, wi, wo)
        jax.block_until_ready(grads)
    finally:
        group.mask_ranks([])
    assert int(overflow.sum()) == dropped.sum()
    np.testing.assert_allclose(out, dense(x, weights, wi, wo), rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, jax.grad(loss(dense), argnums=(0, 1, 2, 3))(x, weights, wi, wo), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_layer(group):
    """Through the layer: its masked experts get no gradient, and its statistics count the rest."""
    layer = wep.flax.MoE(HIDDEN, FFN, EXPERTS, TOP_K, group, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(5).normal(size=(RANKS, TOKENS, HIDDEN)), jnp.float32)
    logits = x.reshape(-1, HIDDEN) @ layer.gate.kernel[...]
    topk_idx = np.argsort(-np.asarray(logits), axis=1)[:, :TOP_K].reshape(RANKS, TOKENS, TOP_K)
    _, dropped = oracle.mask_ranks(topk_idx, EXPERTS, [6])

    @nnx.jit
    def step(layer, x):
        def loss(layer):
            out, stats = layer(x, return_stats=True)
            return jnp.sum(out**2), (out, stats)

        return nnx.grad(loss, has_aux=True)(layer)

    before = jax.device_get(step(layer, x)[1][0])
    layer.mask_ranks([6])
    grads, (out, stats) = jax.device_get(step(layer, x))
    layer.mask_ranks([])
    after = jax.device_get(step(layer, x)[1][0])
    np.testing.assert_array_equal(before, after)
    touched = (dropped_of_token := np.any(topk_idx // (EXPERTS // RANKS) == 6, axis=2)).copy()
    touched[6] = True
    np.testing.assert_array_equal(out[~touched], before[~touched])
    assert np.all(np.any(out[dropped_of_token] != before[dropped_of_token], axis=-1))
    assert np.all(out[6] == 0)
    assert int(stats.overflow) == dropped.sum()
    per_rank = np.abs(grads["wi"][...]).reshape(RANKS, -1).max(axis=1)
    assert per_rank[6] == 0 and np.all(np.delete(per_rank, 6) > 0)


def test_plan_older_than_the_mask(group):
    """Its selections of masked ranks are dropped, and rows from them are zero."""
    make = oracle.on_ranks(
        group, lambda topk_idx: jax.tree.map(jnp.atleast_1d, wep.make_plan(topk_idx, group))
    )

    def use(x, weights, plan):
        scalars = {name: getattr(plan, name)[0] for name in ("num_rows", "overflow")}
        plan = jax.tree.unflatten(jax.tree.structure(plan), jax.tree.leaves(plan))
        plan = wep.DispatchPlan(**{**plan.__dict__, **scalars})
        rows, row_weights = wep.dispatch(x, weights, plan)
        return wep.combine(rows, row_weights, plan), rows, row_weights

    x, weights, topk_idx, _ = draw(6)
    plan = jax.block_until_ready(make(*flat([topk_idx])))
    group.mask_ranks([1, 4])
    out, rows, row_weights = jax.device_get(oracle.on_ranks(group, use)(*flat((x, weights)), plan))
    group.mask_ranks([])
    want_rows, want_weights = oracle.dispatch(x, weights, oracle.make_plan(topk_idx, EXPERTS, plan.capacity))
    source = np.asarray(plan.row_source).reshape(RANKS, -1)
    gone = (source < 0) | np.isin(source // (TOKENS * TOP_K), [1, 4])
    gone[[1, 4]] = True
    np.testing.assert_array_equal(rows.reshape(want_rows.shape), np.where(gone[..., None], 0, want_rows))
    np.testing.assert_array_equal(row_weights.reshape(RANKS, -1), np.where(gone, 0, want_weights))
    kept, _ = oracle.mask_ranks(topk_idx, EXPERTS, [1, 4])
    want = x * np.where(kept >= 0, weights, 0).sum(axis=2)[..., None]
    np.testing.assert_allclose(out.reshape(want.shape), want, rtol=1e-5, atol=1e-5)


def test_goes_on_without_a_rank_that_does_not_come(make_group):
    """The deadline names it; once it is masked, the same program runs without it."""
    group = make_group(4, num_experts=8, backend="cpu", deadline_s=0.5)

    def body(x, topk_idx):
        def exchange():
            plan = wep.make_plan(topk_idx, group)
            rows, row_weights = wep.dispatch(x, jnp.ones(topk_idx.shape, jnp.float32) + 0 * x[:, :2], plan)
            return wep.combine(rows, row_weights, plan)

        return jax.lax.cond(jax.lax.axis_index("expert") == 2, lambda: 0 * x, exchange)

    spec = PartitionSpec("expert")
    run = jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=spec, out_specs=spec))
    x = jnp.ones((4 * 3, 128), jnp.float32)
    topk_idx = jnp.tile(jnp.asarray([[4, 6]], jnp.int32), (12, 1))  # on ranks 2 and 3
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank\(s\) 2"):
        jax.block_until_ready(run(x, topk_idx))
    group.mask_ranks([2])
    out = np.asarray(run(x, topk_idx)).reshape(4, 3, 128)
    np.testing.assert_array_equal(out[[0, 1, 3]], 1)


def test_groups_side_by_side(make_group):
    """The ranks are masked in all of them."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:8]
    )
    group = make_group(mesh=mesh, num_experts=4, top_k=1, backend="cpu", deadline_s=20)

    def body(topk_idx):
        plan = wep.make_plan(topk_idx, group)
        return plan.overflow[None], plan.num_rows[None]

    spec = PartitionSpec(("data", "expert"))
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    topk_idx = jnp.tile(jnp.arange(4, dtype=jnp.int32), 8)[:, None]  # every rank selects all experts
    group.mask_ranks([1])
    overflow, num_rows = run(topk_idx)
    np.testing.assert_array_equal(np.reshape(overflow, (2, 4)), [[1, 4, 1, 1]] * 2)
    np.testing.assert_array_equal(np.reshape(num_rows, (2, 4)), [[3, 0, 3, 3]] * 2)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([4], r"expected ranks in \[0, 4\), got 4"),
        ([-1], "got -1"),
        (range(4), "at least one of 4"),
        ([0.5], "got 0.5"),
    ],
)
def test_wrong_ranks(make_group, ranks, message):
    group = make_group(4, backend="cpu")
    group.mask_ranks([1])
    with pytest.raises(ValueError, match=message):
        group.mask_ranks(ranks)
    assert group.masked_ranks == (1,)


def test_needs_an_open_group_of_a_compiled_backend(make_group):
    with pytest.raises(ValueError, match="expected a compiled backend, got backend='xla'"):
        make_group(4, backend="xla").mask_ranks([1])
    group = make_group(4, backend="cpu")
    group.close()
    with pytest.raises(ValueError, match="expected an open group"):
        group.mask_ranks([1])


def test_guide():
    """The code of docs/masked_ranks.md runs, on 8 ranks."""
    text = (pathlib.Path(__file__).parents[1] / "docs/masked_ranks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    mesh = jax.make_mesh(
        (RANKS,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:RANKS]
    )
    outs = []

    @functools.cache
    def compiled(group):
        def body(x):
            topk_idx = jnp.tile(jnp.arange(0, 64, 8, dtype=jnp.int32), (x.shape[0], 1))  # one of each rank
            plan = wep.make_plan(topk_idx, group)
            rows, row_weights = wep.dispatch(x, jnp.ones(topk_idx.shape, jnp.float32), plan)
            return wep.combine(rows, row_weights, plan)

        return oracle.on_ranks(group, body)

    def step(x):
        outs.append(compiled(names["group"])(x))
        return outs[-1]

    names = {"wep": wep, "jax": jax, "mesh": mesh, "step": step, "x": jnp.ones((RANKS, 1024), jnp.float32)}
    exec(code, names)
    before, masked = (np.asarray(out)[:, 0] for out in outs)
    np.testing.assert_array_equal(before, np.full(8, 8))
    np.testing.assert_array_equal(masked, [6, 6, 6, 0, 6, 0, 6, 6])
    assert names["group"].masked_ranks == ()
