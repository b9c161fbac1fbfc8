"""overflow="spill": rounds of bounded size lose nothing, against a dense loop and against the plan's NumPy oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import jax_wideep as wep
from jax_wideep import _rounds

RANKS, LOCAL, TOP_K, HIDDEN, FFN, TOKENS = 4, 2, 3, 16, 8, 5
EXPERTS, WORST = RANKS * LOCAL, RANKS * TOKENS * TOP_K
SPEC = PartitionSpec("expert")
# Compiling is most of these tests' time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def swiglu(h):
    gate, up = jnp.split(h, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up


def draw_floats(seed, ranks=RANKS, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    shapes = (
        (ranks * TOKENS, HIDDEN),
        (ranks * TOKENS, TOP_K),
        (experts, HIDDEN, 2 * FFN),
        (experts, FFN, HIDDEN),
    )
    return [
        jnp.asarray(rng.normal(size=shape) / (4 if len(shape) == 3 else 1), jnp.float32) for shape in shapes
    ]


def layer(group, **options):
    def body(x, weights, wi, wo, topk_idx):
        out, stats = wep.moe_ffn(x, topk_idx, weights, wi, wo, group, **options)
        return out, stats.spilled[None], stats.overflow[None], stats.tokens_per_expert

    return jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC)


def with_gradients(run):
    """(floats, topk_idx) -> (output, ..), gradients; `run.traces` counts how often it was traced."""

    def loss(floats, topk_idx):
        traced.traces += 1
        out, *rest = run(*floats, topk_idx)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), (
            out,
            *rest,
        )

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)

    def traced(floats, topk_idx):
        (_, outputs), gradients = step(floats, topk_idx)
        return outputs, gradients

    traced.traces = 0
    return traced


@with_gradients
def dense(x, weights, wi, wo, topk_idx):
    return (oracle.dense_moe(x, topk_idx, weights, wi, wo, swiglu),)


def check(outputs, gradients, floats, topk_idx, tolerance=1e-5):
    """Against every expert on every token."""
    (want,), want_gradients = dense(floats, topk_idx)
    for got, expected in zip((outputs[0], *gradients), (want, *want_gradients), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(scale, 1e-30))


@st.composite
def routings(draw):
    """[ranks * tokens, k]: any skew, repeated experts, masked selections, ranks without tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["uniform", "zipf", "hot", "one rank", "empty"]))
    distinct = draw(st.booleans())
    shape = (RANKS, TOKENS, EXPERTS, TOP_K)
    masked = draw(st.sampled_from([0.0, 0.1, 0.7]))
    if kind == "one rank":  # the last one
        topk_idx = rng.integers(EXPERTS - LOCAL, EXPERTS, (RANKS, TOKENS, TOP_K)).astype(np.int32)
        topk_idx[rng.random(topk_idx.shape) < masked] = -1
    else:
        topk_idx = oracle.random_topk(rng, *shape, kind=kind, masked=masked, distinct=distinct)
    for rank in draw(st.sets(st.integers(0, RANKS - 1), max_size=RANKS)):
        topk_idx[rank] = -1
    return topk_idx


@pytest.fixture(scope="module")
def groups():
    mesh = jax.make_mesh(
        (RANKS,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:RANKS]
    )
    made = {
        backend: wep.ExpertGroup(
            mesh, axis="expert", num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, backend=backend
        )
        for backend in ("cpu", "xla")
    }
    yield made
    for group in made.values():
        group.close()


@pytest.fixture(scope="module")
def make_layer(groups):
    """The compiled layer of a backend and capacity; compiled once for all examples."""

    @functools.cache
    def make(backend, capacity, **options):
        return with_gradients(layer(groups[backend], overflow="spill", capacity=capacity, **options))

    return make


# ---- the plan of a round ----


@pytest.fixture(scope="module")
def round_arrays(groups):
    names = "group_sizes num_rows overflow dest_rank dest_row row_source arrival_rows rows_per_source"

    @functools.cache
    def make(capacity):
        def body(topk_idx, number):
            plan = wep.make_plan(topk_idx, groups["cpu"])
            part = _rounds.round_of(plan, number[0], capacity)
            arrays = {name: jnp.atleast_1d(getattr(part, name)) for name in names.split()}
            return arrays, _rounds.num_rounds(plan, capacity)[None]

        return oracle.on_ranks(groups["cpu"], body)

    return make


@settings(max_examples=15)
@given(topk_idx=routings(), capacity=st.sampled_from([1, 7, 31, WORST]), data=st.data())
def test_a_round_is_the_plan_of_its_selections(round_arrays, topk_idx, capacity, data):
    everything = oracle.make_plan(topk_idx, EXPERTS, WORST)
    rounds = -(-everything.num_rows.max() // capacity)
    number = data.draw(st.integers(0, max(0, rounds)))  # one past the last, too
    in_round = everything.dest_row // capacity == number
    want = oracle.make_plan(np.where(in_round & (everything.dest_row >= 0), topk_idx, -1), EXPERTS, capacity)
    got, got_rounds = round_arrays(capacity)(topk_idx.reshape(-1, TOP_K), np.full(RANKS, number, np.int32))
    np.testing.assert_array_equal(got_rounds, rounds)
    for name, array in got.items():
        expected = getattr(want, name)
        np.testing.assert_array_equal(np.asarray(array).reshape(expected.shape), expected, name)


# ---- values and gradients ----


@settings(max_examples=12)
@given(topk_idx=routings(), capacity=st.sampled_from([1, 6, 20, WORST - 1, WORST]), seed=st.integers(0, 9))
def test_nothing_is_lost(make_layer, topk_idx, capacity, seed):
    plan = oracle.make_plan(topk_idx, EXPERTS, WORST)
    floats, flat_idx = draw_floats(seed), jnp.asarray(topk_idx.reshape(-1, TOP_K))
    step = make_layer("cpu", capacity)
    outputs, gradients = step(floats, flat_idx)
    check(outputs, gradients, floats, flat_idx)
    _, spilled, overflow, counts = outputs
    np.testing.assert_array_equal(spilled, np.maximum(plan.num_rows - capacity, 0))
    np.testing.assert_array_equal(overflow, 0)
    np.testing.assert_array_equal(counts[:EXPERTS], plan.tokens_per_expert)
    assert step.traces == 1  # whatever the skew


@pytest.mark.parametrize(
    ("backend", "capacity", "options"),
    [
        ("xla", 6, {}),
        ("cpu", 9, {"microbatches": 2}),
        ("xla", 9, {"microbatches": 2}),
        ("cpu", 9, {"microbatches": 3, "remat": "all"}),
        ("cpu", 9, {"weigh_input": True, "expert_chunk": 4}),
    ],
)
def test_options_together(make_layer, backend, capacity, options):
    step = make_layer(backend, capacity, **options)
    for seed, kind in enumerate(("hot", "zipf")):
        rng = np.random.default_rng(seed)
        topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind=kind, masked=0.1)
        flat_idx, floats = jnp.asarray(topk_idx.reshape(-1, TOP_K)), draw_floats(seed)
        outputs, gradients = step(floats, flat_idx)
        if options.get("weigh_input"):

            def weighed(x, weights, wi, wo, topk_idx):
                """Each selection as a token of its own, with a gate weight of 1."""
                tokens = (weights[:, :, None] * x[:, None, :]).reshape(-1, HIDDEN)
                ones = jnp.ones((tokens.shape[0], 1))
                out = oracle.dense_moe(tokens, topk_idx.reshape(-1, 1), ones, wi, wo, swiglu)
                return (out.reshape(-1, TOP_K, HIDDEN).sum(axis=1),)

            (want,), want_gradients = with_gradients(weighed)(floats, flat_idx)
            for got, expected in zip((outputs[0], *gradients), (want, *want_gradients), strict=True):
                np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        else:
            check(outputs, gradients, floats, flat_idx)
        assert outputs[1].sum() > 0 and outputs[2].sum() == 0
    assert step.traces == 1


def test_narrow_rows_are_summed_in_float32(groups):
    """An expert's gradient, over hundreds of rounds: as near to the exact one as with all rows at once."""
    rng = np.random.default_rng(0)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind="hot")
    flat_idx = jnp.asarray(topk_idx.reshape(-1, TOP_K))
    floats = [array.astype(jnp.bfloat16) for array in draw_floats(0)]
    wide = [array.astype(jnp.float32) for array in floats]
    (want,), want_gradients = dense(wide, flat_idx)

    def errors(**options):
        outputs, gradients = with_gradients(layer(groups["cpu"], **options))(floats, flat_idx)
        pairs = zip((outputs[0], *gradients), (want, *want_gradients), strict=True)
        return [
            np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected)
            for got, expected in pairs
        ]

    for spilling, at_once in zip(errors(overflow="spill", capacity=1), errors(), strict=True):
        assert spilling < 1.5 * at_once + 1e-3


def test_groups_side_by_side_need_other_numbers_of_rounds():
    ranks = 4
    mesh = jax.make_mesh(
        (2, ranks),
        ("data", "expert"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: 2 * ranks],
    )
    both, experts = PartitionSpec(("data", "expert")), ranks * LOCAL
    floats = draw_floats(3, ranks=2 * ranks, experts=experts)
    rng = np.random.default_rng(4)
    halves = [
        oracle.random_topk(rng, ranks, TOKENS, experts, TOP_K, kind=kind) for kind in ("hot", "uniform")
    ]
    topk_idx = jnp.asarray(np.stack(halves).reshape(-1, TOP_K))
    with wep.ExpertGroup(mesh, axis="expert", num_experts=experts, top_k=TOP_K, hidden=HIDDEN) as group:

        def body(x, weights, wi, wo, topk_idx):
            out, stats = wep.moe_ffn(x, topk_idx, weights, wi, wo, group, overflow="spill", capacity=2)
            return out, stats.spilled[None]

        run = jax.shard_map(body, mesh=mesh, in_specs=(both, both, SPEC, SPEC, both), out_specs=both)
        outputs, gradients = with_gradients(run)(floats, topk_idx)
        check(outputs, gradients, floats, topk_idx)


def test_under_scan_and_checkpoint(groups):
    """Three layers in a scan, each recomputed but for what the names save."""
    floats, rng = draw_floats(5), np.random.default_rng(6)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind="zipf")
    flat_idx = jnp.asarray(topk_idx.reshape(-1, TOP_K))
    policy = jax.checkpoint_policies.save_only_these_names(*wep.CHECKPOINT_NAMES)

    def stacked(one_layer):
        def run(x, weights, wi, wo, topk_idx):
            def step(x, _):
                return x + one_layer(x, weights, wi, wo, topk_idx)[0], None

            return (jax.lax.scan(step, x, None, length=3)[0],)

        return with_gradients(run)(floats, flat_idx)

    spilling = layer(groups["cpu"], overflow="spill", capacity=5)
    (want,), want_gradients = stacked(
        lambda *arrays: (oracle.dense_moe(arrays[0], arrays[4], *arrays[1:4], swiglu),)
    )
    for wrap in (lambda f: f, functools.partial(jax.checkpoint, policy=policy)):
        (out,), gradients = stacked(wrap(spilling))
        for got, expected in zip((out, *gradients), (want, *want_gradients), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_a_plan_already_made(groups, make_layer):
    floats, rng = draw_floats(7), np.random.default_rng(8)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind="zipf")
    flat_idx = jnp.asarray(topk_idx.reshape(-1, TOP_K))

    def body(x, weights, wi, wo, topk_idx):
        plan = wep.make_plan(topk_idx, groups["cpu"])
        return wep.moe_ffn(
            x, topk_idx, weights, wi, wo, groups["cpu"], plan=plan, overflow="spill", capacity=6
        )[0]

    out = oracle.on_ranks(groups["cpu"], body)(*floats, flat_idx)
    np.testing.assert_array_equal(out, make_layer("cpu", 6)(floats, flat_idx)[0][0])
