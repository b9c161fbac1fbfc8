"""Bad input: each gives an error that names the argument, what was expected, what came, and what to do."""

import dataclasses
import re
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jax_wideep as wep
from jax_wideep import _ffi
from jax_wideep.group import _choose_backend

RANKS, EXPERTS, TOP_K, HIDDEN, CHUNK, TOKENS = 4, 8, 2, 128, 6, 5
SPEC = PartitionSpec("expert")


def make_mesh(sizes=(RANKS,), names=("expert",), devices=None):
    devices = jax.devices()[: np.prod(sizes)] if devices is None else devices
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


@pytest.fixture(scope="module")
def groups():
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "chunk": CHUNK}
    made = {backend: wep.ExpertGroup(make_mesh(), backend=backend, **sizes) for backend in ("cpu", "xla")}
    yield made
    for group in made.values():
        group.close()


@pytest.fixture
def group(groups, backend):
    return groups[backend]


def array(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def index(*shape, dtype=jnp.int32):
    return jnp.zeros(shape, dtype)


X, WEIGHTS, IDX = array(TOKENS, HIDDEN), array(TOKENS, TOP_K), index(TOKENS, TOP_K)
CAPACITY = RANKS * TOKENS * TOP_K
ROWS = array(CAPACITY, HIDDEN)
EXPERT_ROWS = array(EXPERTS // RANKS, RANKS * CHUNK, HIDDEN)
WI, WO = array(EXPERTS // RANKS, HIDDEN, 8), array(EXPERTS // RANKS, 4, HIDDEN)


def trace(group, function):
    """Traces `function`, of no arguments, as it would run on every rank; compiles nothing."""

    def body():
        function()
        return jnp.zeros(())

    jax.eval_shape(jax.shard_map(body, mesh=group.mesh, in_specs=(), out_specs=PartitionSpec()))


def refused(message, call, *args):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*args)


def plan(group, idx=IDX, **options):
    return wep.make_plan(idx, group, **options)


def recv(group, x=X, idx=IDX, **options):
    return wep.ll_dispatch(x, idx, group, **options)


def ffn(group, x=X, idx=IDX, weights=WEIGHTS, wi=WI, wo=WO, **options):
    return wep.moe_ffn(x, idx, weights, wi, wo, group, **options)


# What is called, and how the message begins.
BAD_ARGUMENTS = [
    # make_plan
    (lambda g: plan(g, index(TOKENS)), "make_plan: topk_idx: expected shape [tokens, 2], got [5]"),
    (lambda g: plan(g, index(TOKENS, 3)), "make_plan: topk_idx: expected shape [tokens, 2], got [5, 3]"),
    (lambda g: plan(g, array(TOKENS, TOP_K)), "make_plan: topk_idx: expected dtype int32, got float32; use .astype"),
    (lambda g: plan(g, index(TOKENS, TOP_K, dtype=jnp.int8)), "make_plan: topk_idx: expected dtype int32, got int8"),
    (lambda g: plan(g, capacity=0), "make_plan: capacity: expected None or a number of rows of at least 1, got 0"),
    (lambda g: plan(g, capacity=4.5), "make_plan: capacity: expected None or a number of rows"),
    (lambda g: plan(g, capacity=jnp.int32(4)), "make_plan: capacity: expected None or a number of rows"),
    (lambda g: plan(g, capacity=2**31), "capacity below 2**31, got 40 and 2147483648; use fewer tokens"),
    (lambda g: plan(g, overflow="spread"), "make_plan: overflow: expected 'drop' or 'error', got 'spread'"),
    (lambda g: plan(g, overflow="spill"), "make_plan: overflow: expected 'drop' or 'error', got 'spill', which"),
    (lambda g: plan(g.mesh), "make_plan: group: expected a ExpertGroup, got Mesh; make one with"),
    # dispatch
    (lambda g: wep.dispatch(X[0], WEIGHTS, plan(g)), "dispatch: x: expected shape [5, 128], got [128]"),
    (lambda g: wep.dispatch(X[:4], WEIGHTS, plan(g)), "dispatch: x: expected shape [5, 128], got [4, 128]"),
    (lambda g: wep.dispatch(X[:, :64], WEIGHTS, plan(g)), "dispatch: x: expected shape [5, 128], got [5, 64]"),
    (lambda g: wep.dispatch(X.astype(jnp.int32), WEIGHTS, plan(g)), "dispatch: x: expected dtype bfloat16 or float16"),
    (lambda g: wep.dispatch(X, WEIGHTS[:, :1], plan(g)), "dispatch: topk_weights: expected shape [5, 2], got [5, 1]"),
    (lambda g: wep.dispatch(X, IDX, plan(g)), "dispatch: topk_weights: expected dtype float32 or bfloat16"),
    (lambda g: wep.dispatch(X, WEIGHTS, recv(g)), "dispatch: plan: expected a DispatchPlan, got Received; pass what"),
    (
        lambda g: wep.dispatch(X, WEIGHTS, jax.tree.map(lambda a: a[None], plan(g))),
        "dispatch: plan.dest_rank: expected shape [5, 2], got [1, 5, 2]; pass the plan as make_plan returned it",
    ),
    (
        lambda g: wep.dispatch(X, WEIGHTS, dataclasses.replace(plan(g), capacity=9)),
        "dispatch: plan.row_source: expected shape [9], got [40]",
    ),
    # combine
    (lambda g: wep.combine(ROWS[0], ROWS[:, 0], plan(g)), "combine: y: expected shape [40, 128], got [128]"),
    (lambda g: wep.combine(ROWS, ROWS[:, 0], plan(g, capacity=9)), "combine: y: expected shape [9, 128], got [40"),
    (lambda g: wep.combine(ROWS.astype(jnp.int8), ROWS[:, 0], plan(g)), "combine: y: expected dtype bfloat16 or"),
    (lambda g: wep.combine(ROWS, WEIGHTS, plan(g)), "combine: row_weights: expected shape [40], got [5, 2]"),
    (lambda g: wep.combine(ROWS, index(CAPACITY), plan(g)), "combine: row_weights: expected dtype float32"),
    (lambda g: wep.combine(ROWS, ROWS[:, 0], None), "combine: plan: expected a DispatchPlan, got NoneType"),
    # ll_dispatch and its halves
    (lambda g: recv(g, array(TOKENS)), "ll_dispatch: x: expected shape [tokens, 128], got [5]"),
    (lambda g: recv(g, array(TOKENS, 64)), "ll_dispatch: x: expected shape [tokens, 128], got [5, 64]"),
    (lambda g: recv(g, index(TOKENS, HIDDEN)), "ll_dispatch: x: expected dtype bfloat16 or float16 or float32, got"),
    (lambda g: recv(g, idx=index(TOKENS, 1)), "ll_dispatch: topk_idx: expected shape [tokens, 2], got [5, 1]"),
    (lambda g: recv(g, idx=index(4, TOP_K)), "ll_dispatch: topk_idx: expected shape [5, 2], got [4, 2]; one row per"),
    (lambda g: recv(g, idx=WEIGHTS), "ll_dispatch: topk_idx: expected dtype int32, got float32"),
    (
        lambda g: recv(g, array(7, HIDDEN), index(7, TOP_K)),
        "ll_dispatch: x: expected at most chunk=6 tokens a rank and call, got 7; send several microbatches",
    ),
    (lambda g: recv(g, quantize="int8"), "ll_dispatch: quantize: expected 'fp8' or None, got 'int8'"),
    (lambda g: recv("expert"), "ll_dispatch: group: expected a ExpertGroup, got str"),
    (lambda g: wep.ll_dispatch_send(X[0], IDX, g), "ll_dispatch_send: x: expected shape [tokens, 128], got [128]"),
    (lambda g: wep.ll_dispatch_recv(X), "ll_dispatch_recv: sent: expected a DispatchInFlight, got"),
    # ll_combine and its halves
    (lambda g: wep.ll_combine(ROWS, WEIGHTS, recv(g)), "ll_combine: y: expected shape [2, 24, 128], got [40, 128]"),
    (
        lambda g: wep.ll_combine(EXPERT_ROWS.astype(jnp.float8_e4m3fn), WEIGHTS, recv(g)),
        "ll_combine: y: expected dtype bfloat16 or float16 or float32, got float8_e4m3fn; cast the rows",
    ),
    (
        lambda g: wep.ll_combine(EXPERT_ROWS, WEIGHTS[:4], recv(g)),
        "ll_combine: topk_weights: expected shape [5, 2], got [4, 2]",
    ),
    (lambda g: wep.ll_combine(EXPERT_ROWS, WEIGHTS, plan(g)), "ll_combine: recv: expected a Received, got Dispatch"),
    (lambda g: wep.ll_combine_recv(recv(g)), "ll_combine_recv: sent: expected a CombineInFlight, got Received"),
    # moe_ffn
    (lambda g: ffn(g, X[0]), "moe_ffn: x: expected shape [tokens, 128], got [128]"),
    (lambda g: ffn(g, idx=IDX[:4]), "moe_ffn: topk_idx: expected shape [5, 2], got [4, 2]"),
    (lambda g: ffn(g, weights=WEIGHTS[:4]), "moe_ffn: topk_weights: expected shape [5, 2], got [4, 2]"),
    (lambda g: ffn(g, wi=array(EXPERTS, HIDDEN, 8)), "moe_ffn: wi: expected shape [2, 128, 8], got [8, 128, 8]"),
    (lambda g: ffn(g, activation="relu2"), "moe_ffn: wi: expected shape [2, 128, 4], got [2, 128, 8]; wi has 2 * ffn"),
    (lambda g: ffn(g, wo=WO[:, 0]), "moe_ffn: wo: expected shape [2, ffn, 128], got [2, 128]"),
    (lambda g: ffn(g, wo=WO.astype(jnp.bfloat16)), "moe_ffn: wo: expected dtype float32, got bfloat16; cast x and"),
    (lambda g: ffn(g, mode="fast"), "moe_ffn: mode: expected 'throughput' or 'low_latency', got 'fast'"),
    (lambda g: ffn(g, activation="silu"), "moe_ffn: activation: expected one of ('swiglu', 'gelu', 'relu2')"),
    (lambda g: ffn(g, mode="low_latency", capacity=4), "moe_ffn: plan, capacity, expert_chunk: expected None in"),
    (lambda g: ffn(g, implementation="fast"), "grouped_matmul: implementation: expected"),
    (lambda g: ffn(g, remat="some"), "moe_ffn: remat: expected one of ('none', 'hidden', 'all'), got 'some'"),
    (lambda g: ffn(g, microbatches=0), "moe_ffn: microbatches: expected a number of at least 1, got 0"),
    (lambda g: ffn(g, microbatches=3, mode="low_latency"), "moe_ffn: microbatches: expected 1 or 2 in mode"),
    (lambda g: ffn(g, microbatches=2, plan=plan(g)), "moe_ffn: plan: expected None for microbatches=2"),
    (lambda g: ffn(g, expert_chunk=0), "moe_ffn: expert_chunk: expected None or at least 1 row, got 0"),
    (lambda g: ffn(g, overflow="spill", capacity=0), "moe_ffn: capacity: expected None or a number of rows"),
    (
        lambda g: ffn(g, overflow="spill", plan=plan(g, capacity=4), capacity=4),
        "moe_ffn: plan: expected one that drops nothing for overflow='spill', got one of capacity 4",
    ),
    (lambda g: ffn(g, plan=plan(g, IDX[:4])), "moe_ffn: plan: expected one for 5 tokens, got one for 4"),
    # grouped_matmul
    (lambda g: wep.grouped_matmul(X[0], WI, index(2)), "grouped_matmul: rows: expected [m, n_in]"),
    (lambda g: wep.grouped_matmul(X, WI[0], index(2)), "grouped_matmul: w: expected shape [groups, 128, n_out]"),
    (lambda g: wep.grouped_matmul(X, WI, index(3)), "grouped_matmul: group_sizes: expected shape [2], got [3]"),
    (lambda g: wep.grouped_matmul(X, WI, array(2)), "grouped_matmul: group_sizes: expected dtype int32, got float32"),
    (lambda g: wep.grouped_matmul(X, WI.astype(jnp.bfloat16), index(2)), "grouped_matmul: w: expected dtype float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD_ARGUMENTS)), ids=lambda i: BAD_ARGUMENTS[i][1][:50])
def test_arguments(groups, case):
    call, message = BAD_ARGUMENTS[case]
    group = groups["cpu"]
    refused(message, trace, group, lambda: call(group))


def test_too_many_selections(groups):
    group = groups["cpu"]
    idx = jax.ShapeDtypeStruct((2**30, TOP_K), jnp.int32)
    body = jax.shard_map(
        lambda idx: plan(group, idx).num_rows, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC
    )
    refused("below 2**31, got 2147483648", jax.eval_shape, body, idx)


def test_overflow_error_on_a_backend_that_cannot_fail(groups):
    message = "make_plan: overflow: 'error' needs a compiled backend, got backend='xla'"
    refused(message, trace, groups["xla"], lambda: plan(groups["xla"], overflow="error"))


def test_fp8_needs_blocks_of_128(make_group, backend):
    group = make_group(RANKS, num_experts=EXPERTS, top_k=TOP_K, hidden=136, backend=backend)
    message = (
        "ll_dispatch: quantize: 'fp8' expects hidden to be a multiple of 128, got 136; use quantize=None"
    )
    refused(message, trace, group, lambda: recv(group, array(TOKENS, 136)))


def test_rows_left_in_fp8_have_no_gradient(group):
    def differentiate():
        jax.grad(lambda x: jnp.sum(recv(group, x, dequantize=False).rows.astype(jnp.float32)))(X)

    refused("rows left in FP8 (dequantize=False) have no gradient", trace, group, differentiate)


# ---- what the data decides ----


def run(group, function, *arrays):
    spread = jax.shard_map(function, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC)
    return jax.block_until_ready(jax.jit(spread)(*arrays))


GOOD_IDX = np.stack([np.arange(RANKS * TOKENS) % EXPERTS, np.arange(3, RANKS * TOKENS + 3) % EXPERTS], axis=1)
GOOD_IDX = GOOD_IDX.astype(np.int32)
ALL_X = np.ones((RANKS * TOKENS, HIDDEN), np.float32)


def counts_of(op, group):
    def counts(x, idx):
        return plan(group, idx).group_sizes if op == "make_plan" else recv(group, x, idx).counts

    return counts


@pytest.mark.parametrize("op", ["make_plan", "ll_dispatch"])
def test_index_out_of_range(groups, op):
    """The compiled backend names place and value; collectives cannot fail: they mask the selection."""
    run_cpu, run_xla = (jax.jit(jax.shard_map(counts_of(op, g), mesh=g.mesh, in_specs=SPEC, out_specs=SPEC))
                        for g in groups.values())  # fmt: skip
    for value in (EXPERTS, -2, 2**31 - 1, -(2**31)):
        idx = GOOD_IDX.copy()
        idx[2 * TOKENS + 3, 1] = value
        message = (
            rf"{op}: topk_idx must lie in \[-1, 8\), got {value} on rank 2, token 3.*Use -1 for a masked"
        )
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(run_cpu(ALL_X, idx))
        masked = np.where(idx == value, -1, idx)
        np.testing.assert_array_equal(run_xla(ALL_X, idx), run_xla(ALL_X, masked))
        np.testing.assert_array_equal(run_xla(ALL_X, masked), run_cpu(ALL_X, masked))


def test_expert_twice_in_a_token_of_the_low_latency_shape(groups):
    idx = GOOD_IDX.copy()
    idx[7] = 4
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"must be distinct, got expert 4 twice on rank 1, token 2"
    ):
        run(groups["cpu"], counts_of("ll_dispatch", groups["cpu"]), ALL_X, idx)
    counts = run(groups["xla"], counts_of("ll_dispatch", groups["xla"]), ALL_X, idx)
    assert counts.sum() == 2 * RANKS * TOKENS - 1


def test_overflow_as_an_error(groups):
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"rank 0 is sent 10 rows but has capacity 4\. Raise capacity"
    ):
        run(
            groups["cpu"],
            lambda idx: plan(groups["cpu"], idx, capacity=4, overflow="error").num_rows[None],
            GOOD_IDX,
        )


@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gate_weights_that_are_not_finite(group, mode, value):
    """They stay with their token, in values and gradients, and raise nothing."""
    weights = np.ones((RANKS * TOKENS, TOP_K), np.float32)
    weights[7, 1] = value

    def body(x, weights, idx):
        def loss(x, weights):
            if mode == "throughput":
                p = plan(group, idx)
                rows, row_weights = wep.dispatch(x, weights, p)
                out = wep.combine(rows, row_weights, p)
            else:
                received = recv(group, x, idx, quantize=None)
                out = wep.ll_combine(received.rows, weights, received)
            return jnp.sum(out), out

        (dx, dweights), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, weights)
        return out, dx, dweights

    out, dx, dweights = run(group, body, ALL_X, weights, GOOD_IDX)
    for got in (out, dx):
        want = np.full(got.shape, 2.0)
        want[7] = value + 1
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(dweights, HIDDEN)


# ---- the group ----


def make(mesh=None, **settings):
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN} | settings
    wep.ExpertGroup(make_mesh() if mesh is None else mesh, **sizes).close()


BAD_GROUPS = [
    ({"axis": "model"}, "ExpertGroup: axis: expected names among the mesh axes ('expert',), got 'model'; make the"),
    ({"axis": ("expert", "expert")}, "ExpertGroup: axis: expected one or more distinct mesh axes, got"),
    ({"axis": ()}, "ExpertGroup: axis: expected one or more distinct mesh axes, got ()"),
    ({"mesh": "expert"}, "ExpertGroup: mesh: expected a jax.sharding.Mesh, which has devices, got str"),
    ({"num_experts": 6}, "ExpertGroup: num_experts: expected a multiple of the 4 ranks of axis ('expert',), got 6;"),
    ({"num_experts": 0}, "ExpertGroup: num_experts: expected an int of at least 1, got 0"),
    ({"num_experts": 8.0}, "ExpertGroup: num_experts: expected an int of at least 1, got 8.0"),
    ({"top_k": 9}, "ExpertGroup: top_k: expected at most num_experts=8 (and 64), got 9"),
    ({"top_k": 0}, "ExpertGroup: top_k: expected an int of at least 1, got 0"),
    ({"hidden": 12}, "ExpertGroup: hidden: expected a multiple of 8, got 12; pad the rows"),
    ({"chunk": 0}, "ExpertGroup: chunk: expected an int of at least 1, got 0"),
    ({"deadline_s": 0}, "ExpertGroup: deadline_s: expected a number of seconds between 0.001 and 1e+09, got 0"),
    ({"deadline_s": float("inf")}, "ExpertGroup: deadline_s: expected a number of seconds"),
    ({"deadline_s": float("nan")}, "ExpertGroup: deadline_s: expected a number of seconds"),
    ({"backend": "tpu"}, "ExpertGroup: backend: expected 'auto', 'cuda', 'cpu' or 'xla', got 'tpu'"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD_GROUPS)), ids=lambda i: str(BAD_GROUPS[i][0]))
def test_group_settings(case):
    settings, message = BAD_GROUPS[case]
    refused(message, lambda: make(**settings))


def test_group_without_a_mesh():
    with pytest.raises(
        ValueError, match=r"mesh: expected a jax.sharding.Mesh, got None .*pass mesh=jax.make_mesh"
    ):
        wep.ExpertGroup(num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)


def test_backend_asked_for_but_not_built(monkeypatch):
    refused("ExpertGroup: backend: 'cuda' needs a mesh of GPUs, got ['cpu']", lambda: make(backend="cuda"))
    monkeypatch.setattr(_ffi, "cpu_module", lambda: None)
    refused(
        "ExpertGroup: backend: 'cpu' is not built into this installation (no module _wideep_cpu); run `pip install .`",
        lambda: make(backend="cpu"),
    )
    with pytest.warns(UserWarning, match="compiled CPU backend is not built; using JAX collectives"):
        group = wep.ExpertGroup(make_mesh(), num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    assert group.backend == "xla"
    group.close()


def test_cpu_backend_on_devices_that_it_cannot_reach():
    def mesh_of(**device):
        return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(**device)]))

    gpu = mesh_of(platform="gpu", process_index=jax.process_index())
    refused(
        "backend: 'cpu' needs a mesh of CPU devices, got ['gpu']; use backend='auto'",
        _choose_backend,
        "cpu",
        gpu,
    )


# ---- where ops are called ----


def test_outside_shard_map(group):
    message = "expected to be called inside jax.shard_map over mesh axes ('expert',), got manual axes ()"
    for op, call in {
        "make_plan": lambda: plan(group),
        "ll_dispatch": lambda: recv(group),
        "ll_dispatch_send": lambda: wep.ll_dispatch_send(X, IDX, group),
        "moe_ffn": lambda: ffn(group),
    }.items():
        refused(f"{op}: {message}", jax.eval_shape, call)


def test_inside_a_shard_map_over_other_axes(make_group, backend):
    mesh = make_mesh((2, 4), ("data", "expert"))
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "backend": backend}
    both = make_group(mesh=mesh, axis=("data", "expert"), **sizes)
    body = jax.shard_map(lambda: plan(both).num_rows, mesh=make_mesh(), in_specs=(), out_specs=SPEC)
    refused("mesh axes ('data', 'expert'), got manual axes ('expert',); wrap", jax.eval_shape, body)

    some = make_group(mesh=mesh, **sizes)
    partial = jax.shard_map(
        lambda: plan(some).num_rows[None], mesh=mesh, in_specs=(), out_specs=SPEC, axis_names={"expert"}
    )
    refused("got axes {'data': 2} left to the partitioner", jax.eval_shape, partial)

    other_size = make_mesh((2,), ("expert",))
    body = jax.shard_map(lambda: plan(some).num_rows[None], mesh=other_size, in_specs=(), out_specs=SPEC)
    refused(
        "expected mesh axis 'expert' of size 4 as in the group's mesh, got 2; build", jax.eval_shape, body
    )


def test_on_a_mesh_with_the_devices_in_another_order(groups):
    """Only the devices' order differs from the group's mesh: the handler finds itself on another rank."""
    group = groups["cpu"]
    mesh = make_mesh(devices=jax.devices()[:RANKS][::-1])
    for op in ("make_plan", "ll_dispatch"):
        body = jax.shard_map(counts_of(op, group), mesh=mesh, in_specs=SPEC, out_specs=SPEC)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=rf"{op}: device \d is rank \d of the ExpertGroup but rank"
        ):
            jax.block_until_ready(jax.jit(body)(ALL_X, GOOD_IDX))


def test_on_devices_outside_the_group(groups):
    group = groups["cpu"]
    body = jax.shard_map(
        counts_of("make_plan", group),
        mesh=make_mesh(devices=jax.devices()[RANKS : 2 * RANKS]),
        in_specs=SPEC,
        out_specs=SPEC,
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"device \d is not in the ExpertGroup's mesh"):
        jax.block_until_ready(jax.jit(body)(ALL_X, GOOD_IDX))


def test_without_jit(groups):
    """Nothing is missing: shard_map compiles by itself."""
    group = groups["cpu"]
    body = jax.shard_map(counts_of("make_plan", group), mesh=group.mesh, in_specs=SPEC, out_specs=SPEC)
    np.testing.assert_array_equal(body(ALL_X, GOOD_IDX), jax.jit(body)(ALL_X, GOOD_IDX))


def test_closed_group(backend):
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN}
    with wep.ExpertGroup(make_mesh(), backend=backend, **sizes) as group:
        compiled = jax.jit(
            jax.shard_map(counts_of("make_plan", group), mesh=group.mesh, in_specs=SPEC, out_specs=SPEC)
        )
        compiled(ALL_X, GOOD_IDX).block_until_ready()
    assert group.closed
    group.close()  # once more does nothing
    message = "make_plan: group: expected an open ExpertGroup, got one that was closed; keep it open"
    refused(message, trace, group, lambda: plan(group))
    if backend == "cpu":  # collectives hold nothing that could be freed
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"make_plan: the ExpertGroup was closed\. Keep it open"
        ):
            jax.block_until_ready(compiled(ALL_X, GOOD_IDX))


def test_two_groups_in_one_op(groups):
    one, other = groups["cpu"], groups["xla"]
    message = "moe_ffn: plan: expected one made over the group that was passed, got one of another ExpertGroup; use one"
    refused(message, trace, one, lambda: ffn(one, plan=plan(other)))


def test_recv_of_another_call(groups):
    """ll_combine with the rows of one call and the index of another: found by the handler, not followed."""

    def body(x, idx):
        received = recv(groups["cpu"], x, idx, quantize=None)
        foreign = dataclasses.replace(received, row_source=received.row_source + 1000)
        return wep.ll_combine(received.rows, jnp.ones((TOKENS, TOP_K)), foreign)

    with pytest.raises(
        jax.errors.JaxRuntimeError, match="recv does not belong to this call: row_source holds"
    ):
        run(groups["cpu"], body, ALL_X, GOOD_IDX)


# ---- threads ----


def test_nproc_too_small(monkeypatch):
    monkeypatch.setattr(_ffi, "cpu_thread_limit_applies", lambda: True)
    monkeypatch.setenv("NPROC", "7")
    refused(
        "ExpertGroup: NPROC: expected at least 8 threads for 4 CPU devices on this jaxlib, got 7; call "
        "jax_wideep.use_cpu_devices(4) before JAX starts, or set NPROC=8",
        lambda: make(),
    )
    monkeypatch.setattr(_ffi, "cpu_thread_limit_applies", lambda: False)
    make()


def test_nproc_too_small_in_a_program_that_forgot():
    code = """
        import jax
        import jax_wideep as wep

        jax.config.update("jax_num_cpu_devices", 8)
        jax.devices()
        try:
            wep.use_cpu_devices(8)
        except RuntimeError as error:
            assert "expected to be called before JAX starts a backend, got one that runs 8" in str(error), error
            print("refused")
        mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        try:
            wep.ExpertGroup(mesh, num_experts=8, top_k=1, hidden=8)
        except ValueError as error:
            assert "NPROC: expected at least 16 threads for 8 CPU devices" in str(error), error
            print("refused")
    """
    environment = {"PATH": "/usr/bin:/bin", "NPROC": "3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    limited = _ffi.cpu_thread_limit_applies()
    assert done.stdout.split() == ["refused"] * (2 if limited else 0), done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_use_cpu_devices_too_late():
    wep.use_cpu_devices(len(jax.devices()))  # as they are: nothing to do
    with pytest.raises(
        RuntimeError, match=r"use_cpu_devices: expected to be called before JAX starts a backend"
    ):
        wep.use_cpu_devices(3)


# ---- the layers ----

LAYER = {"hidden": HIDDEN, "ffn": 4, "num_experts": EXPERTS, "top_k": TOP_K}
BAD_LAYERS = [
    ({"hidden": 64}, "MoE: hidden: expected 128 as in group, got 64; make them equal"),
    ({"num_experts": 16}, "MoE: num_experts: expected 8 as in group, got 16; make them equal"),
    ({"top_k": 3}, "MoE: top_k: expected 2 as in group, got 3; make them equal"),
    ({"router": wep.RouterConfig(num_experts=8, top_k=1)}, "MoE: top_k: expected 1 as in router, got 2"),
    ({"ffn": 0}, "MoE: ffn, shared_ffn: expected at least 1 and 0, got 0 and 0"),
    (
        {"capacity": 4, "capacity_factor": 1.0},
        "MoE: expected capacity or capacity_factor, got both; leave one out",
    ),
    ({"capacity_factor": 0.0}, "MoE: capacity_factor: expected more than 0, got 0.0"),
    (
        {"batch_axes": ("data",)},
        "MoE: batch_axes: expected axes of the mesh ('expert',) that include the group's",
    ),
    ({"activation": "silu"}, "MoE: activation: expected one of ('swiglu', 'gelu', 'relu2')"),
    ({"mode": "fast"}, "MoE: mode: expected one of ('throughput', 'low_latency'), got 'fast'"),
    ({"overflow": "spread"}, "MoE: overflow: expected one of"),
]


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("case", range(len(BAD_LAYERS)), ids=lambda i: str(list(BAD_LAYERS[i][0])))
def test_layer_settings(groups, flavour, case):
    settings, message = BAD_LAYERS[case]
    settings = LAYER | {"group": groups["cpu"]} | settings
    if flavour == "nnx":
        refused(message, lambda: wep.flax.MoE(**settings, rngs=nnx.Rngs(0)))
    else:
        refused(message, wep.flax.linen.MoE(**settings).init, jax.random.key(0), array(RANKS, HIDDEN))


def test_layer_arguments(groups):
    layer = wep.flax.MoE(**LAYER, group=groups["cpu"], rngs=nnx.Rngs(0))
    refused("MoE: x: expected [..., 128] with at least 2 axes, got [4, 64]", layer, array(4, 64))
    refused("MoE: x: expected [..., 128] with at least 2 axes, got [128]", layer, array(HIDDEN))
    refused("x must be a float array [tokens, hidden], got int32[1, 128]", layer, index(4, HIDDEN))
    mask = np.ones((4, 3), bool)
    refused(
        "MoE: token_mask: expected [4, 2], got [4, 3]", lambda: layer(array(4, 2, HIDDEN), token_mask=mask)
    )
    mask = np.ones((4, 2), np.float32)
    refused("token_mask must be a bool array", lambda: layer(array(4, 2, HIDDEN), token_mask=mask))
    refused("mode: expected 'throughput' or 'low_latency'", lambda: layer(array(4, 2, HIDDEN), mode="fast"))
    stats = wep.MoEStats(index(EXPERTS), index())
    refused(
        "expected a router with use_selection_bias=True, got one without", layer.update_selection_bias, stats
    )
