"""The CPU backend's rendezvous: any order, much in flight, several groups at once, missing ranks, closed groups."""

import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import soak
from jax.sharding import PartitionSpec

import jax_wideep as wep


def round_trip(group, x, weights, topk_idx):
    """2 * (sum of the kept weights) * x, by way of the experts."""
    plan = wep.make_plan(topk_idx, group)
    rows, row_weights = wep.dispatch(x, weights, plan)
    return wep.combine(2 * rows, row_weights, plan)


def ll_round_trip(group, x, weights, topk_idx):
    recv = wep.ll_dispatch(x, topk_idx, group, quantize=None)
    return wep.ll_combine(2 * recv.rows, weights, recv)


def inputs(group, seed=0, tokens=4):
    rng = np.random.default_rng(seed)
    devices = group.mesh.devices.size
    topk_idx = oracle.random_topk(rng, devices, tokens, group.num_experts, group.top_k, masked=0.2)
    x = rng.normal(size=(devices * tokens, group.hidden)).astype(np.float32)
    weights = rng.normal(size=(devices * tokens, group.top_k)).astype(np.float32)
    return x, weights, topk_idx.reshape(-1, group.top_k)


def expected(x, weights, topk_idx):
    return 2 * np.where(topk_idx >= 0, weights, 0).sum(axis=1, keepdims=True) * x


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def over_all_devices(group, function):
    spec = PartitionSpec(group.mesh.axis_names)
    return jax.jit(jax.shard_map(function, mesh=group.mesh, in_specs=spec, out_specs=spec))


def test_independent_branches(make_group):
    """XLA may run them in a different order on every rank; with its own collectives between."""
    group = make_group(8, hidden=16, chunk=8)

    def body(x, weights, topk_idx):
        outs = []
        for i in range(16):
            run = (round_trip, ll_round_trip)[i % 2]
            outs.append(run(group, jnp.roll(x, i, axis=1), weights * (i + 1), topk_idx))
        total = jax.lax.psum(jnp.sum(x), group.axis)
        swapped = jax.lax.all_to_all(x.reshape(8, -1), group.axis, 0, 0, tiled=True)
        return (*outs, jnp.broadcast_to(total, x.shape), swapped.reshape(x.shape))

    arrays = inputs(group, tokens=8)
    *outs, total, _ = over_all_devices(group, body)(*arrays)
    x, weights, topk_idx = arrays
    for i, out in enumerate(outs):
        close(out, expected(np.roll(x, i, axis=1), weights * (i + 1), topk_idx))
    np.testing.assert_allclose(total, x.sum(), rtol=1e-3)


def test_many_launches_in_flight(make_group):
    """Nothing waits for a result until hundreds of launches of three programs have been handed to XLA."""
    group = make_group(8, hidden=16, chunk=4)
    runs = [
        over_all_devices(group, lambda *arrays: round_trip(group, *arrays)),
        over_all_devices(group, lambda *arrays: ll_round_trip(group, *arrays)),
        over_all_devices(group, lambda x, *_: jax.lax.psum(x, group.axis) + 0 * x),
    ]
    many = [inputs(group, seed) for seed in range(4)]
    outs = [[run(*arrays) for run in runs] for _ in range(50) for arrays in many]
    for i, (out, ll_out, _) in enumerate(outs):
        want = expected(*many[i % 4])
        close(out, want)
        close(ll_out, want)


def test_chain_without_waiting(make_group):
    """Each launch takes the last one's output, which is still being computed."""
    group = make_group(8, hidden=16)
    x, weights, topk_idx = inputs(group)
    weights = np.where(topk_idx >= 0, weights, 0)
    weights = weights / np.maximum(np.abs(weights).sum(axis=1, keepdims=True), 1) / 2
    run = over_all_devices(group, lambda *arrays: round_trip(group, *arrays))
    got = jnp.asarray(x)
    for _ in range(200):
        got = run(got, weights, topk_idx)
    factor = np.float64(2) * weights.astype(np.float64).sum(axis=1, keepdims=True)
    close(got, factor**200 * x)


def test_several_groups_in_one_program(make_group):
    """Over one axis (two groups side by side), the other axis (four), and both, on the same devices."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:8]
    )
    groups = [
        make_group(mesh=mesh, axis=axis, num_experts=16, hidden=8 * (i + 1), chunk=4)
        for i, axis in enumerate((("expert",), ("data",), ("data", "expert"), ("expert", "data")))
    ]

    def body(*arrays):
        outs = []
        for i, group in enumerate(groups):
            mine = arrays[3 * i : 3 * i + 3]
            outs += [round_trip(group, *mine), ll_round_trip(group, *mine)]
        return outs

    arrays = [inputs(group, seed) for seed, group in enumerate(groups)]
    outs = over_all_devices(groups[0], body)(*[array for three in arrays for array in three])
    for i, three in enumerate(arrays):
        close(outs[2 * i], expected(*three))
        close(outs[2 * i + 1], expected(*three))


def test_several_models_in_one_process(make_group):
    """Two on separate devices, launched from two threads; a third over all of them afterwards."""
    halves = [jax.devices()[:8], jax.devices()[8:16]]
    groups = []
    for devices in halves:
        mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
        groups.append(make_group(mesh=mesh, hidden=16, chunk=4))

    results = [[], []]

    def train(which):
        group = groups[which]
        run = over_all_devices(group, lambda *arrays: round_trip(group, *arrays))
        for seed in range(30):
            results[which].append((run(*inputs(group, seed)), seed))

    threads = [threading.Thread(target=train, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for group, outs in zip(groups, results, strict=True):
        assert len(outs) == 30
        for out, seed in outs:
            close(out, expected(*inputs(group, seed)))
    everyone = make_group(16, num_experts=16, hidden=16)
    arrays = inputs(everyone)
    close(over_all_devices(everyone, lambda *a: round_trip(everyone, *a))(*arrays), expected(*arrays))


def test_same_function_called_twice(make_group):
    """Two call sites with equal attributes and equal operands are two exchanges."""
    group = make_group(4, hidden=8)
    inner = jax.jit(lambda *arrays: round_trip(group, *arrays))
    arrays = inputs(group)
    run = over_all_devices(group, lambda *a: (inner(*a), inner(*a), inner(2 * a[0], *a[1:])))
    first, second, twice = run(*arrays)
    close(first, expected(*arrays))
    np.testing.assert_array_equal(first, second)
    close(twice, 2 * expected(*arrays))


def test_soak(make_group):
    groups = [make_group(8, top_k=k, hidden=32, chunk=soak.TOKENS) for k in (2, 1)]
    seen = []
    assert soak.soak(groups, 400, report=lambda done, error: seen.append(done)) < 1e-5
    assert seen == list(range(50, 401, 50))


def test_soak_notices_a_wrong_output(make_group, monkeypatch):
    group = make_group(8, hidden=32, chunk=soak.TOKENS)
    exact = wep.combine
    monkeypatch.setattr(wep, "combine", lambda y, w, plan: exact(y * 1.001, w, plan))
    assert soak.soak([group], 50) > 1e-4


# ---- errors: each in a process of its own, which has to stay usable ----

PRELUDE = """
    import functools, threading, time
    import jax, jax.numpy as jnp, numpy as np
    import jax_wideep as wep
    from jax.sharding import PartitionSpec

    wep.use_cpu_devices(4)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("expert")

    def make_group(deadline_s):
        return wep.ExpertGroup(mesh, num_experts=8, top_k=2, hidden=8, chunk=4, deadline_s=deadline_s)

    group = make_group(1.5)
    x = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    weights = np.ones((16, 2), np.float32)
    topk_idx = np.stack([np.arange(16) % 8, np.arange(1, 17) % 8], axis=1).astype(np.int32)

    def run(body):
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(x, weights, topk_idx)

    def error_of(function, *args):
        try:
            jax.block_until_ready(function(*args))
        except jax.errors.JaxRuntimeError as error:
            return str(error)
        raise AssertionError("no error")

    def round_trip(group, x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(x, weights, plan)
        recv = wep.ll_dispatch(x, topk_idx, group, quantize=None)
        return wep.combine(rows, row_weights, plan) + wep.ll_combine(recv.rows, weights, recv)

    def still_usable(group):
        np.testing.assert_array_equal(run(functools.partial(round_trip, group)), 4 * x)
        total = run(lambda x, *_: jax.lax.psum(x, "expert") + 0 * x)
        np.testing.assert_array_equal(total, np.tile(x.reshape(4, 4, 8).sum(axis=0), (4, 1)))
"""


def in_new_process(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_missing_ranks_are_named():
    """Each op in turn is left out by some ranks; the others get an error, and the process goes on."""
    said = in_new_process("""
    def without(missing, op):
        absent = functools.reduce(jnp.logical_or, [jax.lax.axis_index("expert") == rank for rank in missing])
        return lambda x, *args: jax.lax.cond(absent, lambda x: x * 1.0, lambda x: op(x, *args), x)

    def of_plan(x, weights, topk_idx):
        def op(x):
            return x + wep.make_plan(topk_idx, group).num_rows
        return without([1], op)(x)

    def of_dispatch(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        return without([0, 3], lambda x: wep.dispatch(x, weights, plan)[0][:4])(x)

    def of_dispatch_gradient(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        pullback = jax.vjp(lambda x: wep.dispatch(x, weights, plan)[0], x)[1]
        ones = jax.lax.pcast(jnp.ones((plan.capacity, 8)), "expert", to="varying")
        return without([2], lambda x: pullback(ones)[0])(x)

    def of_combine(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(x, weights, plan)
        return without([2], lambda x: wep.combine(rows, row_weights, plan))(x)

    def of_ll_dispatch(x, weights, topk_idx):
        return without([1, 2], lambda x: wep.ll_dispatch(x, topk_idx, group, quantize=None).rows[0, :4])(x)

    def of_ll_combine(x, weights, topk_idx):
        recv = wep.ll_dispatch(x, topk_idx, group, quantize=None)
        return without([3], lambda x: wep.ll_combine(recv.rows, weights, recv))(x)

    for body, op, missing in (
        (of_plan, "make_plan", "1"),
        (of_dispatch, "dispatch", "0, 3"),
        (of_dispatch_gradient, "dispatch's gradient", "2"),
        (of_combine, "combine", "2"),
        (of_ll_dispatch, "ll_dispatch", "1, 2"),
        (of_ll_combine, "ll_combine", "3"),
    ):
        error = error_of(run, body)
        assert f"{op}: rank(s) {missing} of 4 did not arrive within the deadline of 1500 ms" in error, error
        assert "deadline_s" in error
        still_usable(group)
    """)
    # Also on stderr, where it is seen if XLA's own collectives wait for the missing rank until XLA gives up.
    assert (
        said.count("jax_wideep: ") == 6
        and "jax_wideep: ll_dispatch: rank(s) 1, 2 of 4 did not arrive" in said
    )


def test_late_rank_is_waited_for_within_the_deadline():
    in_new_process("""
    def slow(x):
        time.sleep(1.0)
        return x

    def body(x, weights, topk_idx):
        late = jax.lax.axis_index("expert") == 1
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        x = jax.lax.cond(late, lambda x: 0 * x + jax.pure_callback(slow, shape, x), lambda x: x, x)
        return round_trip(group, x, weights, topk_idx)

    group = make_group(60)
    np.testing.assert_array_equal(run(body), 4 * x)
    group = make_group(0.2)
    error = error_of(run, body)
    assert "rank(s) 1 of 4 did not arrive" in error, error
    time.sleep(1.5)  # rank 1 comes late and finds the exchange gone
    still_usable(make_group(60))
    """)


def test_closing_a_group_fails_what_waits():
    in_new_process("""
    group = make_group(300)

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        alone = jax.lax.axis_index("expert") != 2
        return jax.lax.cond(alone, lambda x: wep.dispatch(x, weights, plan)[0][:4], lambda x: x * 1.0, x)

    compiled = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    waiting = compiled(x, weights, topk_idx)
    threading.Timer(1.0, group.close).start()
    error = error_of(lambda: waiting)
    assert "ExpertGroup was closed" in error, error
    error = error_of(compiled, x, weights, topk_idx)  # traced before: the handler notices
    assert "ExpertGroup was closed" in error and "Keep it open" in error, error
    still_usable(make_group(30))
    """)


@pytest.mark.parametrize("op", ["make_plan", "ll_dispatch"])
def test_error_in_the_data_is_raised_on_all_ranks(op):
    """With XLA's own collectives after the exchange, which must not wait for ranks that failed."""
    in_new_process(f"""
    def body(x, weights, topk_idx):
        bad = jnp.where(jax.lax.axis_index("expert") == 1, topk_idx.at[3, 1].set(8), topk_idx)
        if {op!r} == "make_plan":
            out = wep.dispatch(x, weights, wep.make_plan(bad, group))[0]
        else:
            out = wep.ll_dispatch(x, bad, group, quantize=None).rows
        return jax.lax.psum(jnp.sum(out), "expert") + x

    for _ in range(3):
        error = error_of(run, body)
        assert "{op}: topk_idx must lie in [-1, 8), got 8 on rank 1, token 3" in error, error
        still_usable(group)
    """)
