"""One process of a job in which process VICTIM comes to harm at a place WHERE, and how the others learn of it.

    failing.py WHERE VICTIM SIGNAL DEADLINE_S

WHERE is dispatch, combine, between (two steps), waiting (in a step, for process 0), set-up, or none. Each of the
others prints "raised after SECONDS: MESSAGE", and then what it still shares. On GPUs a kernel cannot raise; there the
next op does, or `check()`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from leaving import leave

import jax_wideep as wep
from jax_wideep import _bootstrap, _ffi, launch
from jax_wideep.bench import measure

TOKENS, TOP_K, HIDDEN = 4, 2, 128
GOOD_STEPS = 3
PLATFORM = os.environ.get("WIDEEP_PLATFORM", "cpu")
# Jobs side by side share a GPU, and the blocks of all of them must run at once.
GPU_SETTINGS = {"num_sms": 4}
# The victim waits, is struck, and only then process 0 comes.
STRIKE_S, LATE_S = 0.5, 1.5
# An exchange of another rank of this process may hold the memory until its own deadline.
LONGEST_HOLD_S = 60.0

Step = Callable[[bool], None]  # whether it is the fatal one


def main() -> None:
    where, victim, number, deadline_s = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    if PLATFORM == "cpu":
        wep.use_cpu_devices(int(os.environ["WIDEEP_DEVICES"]))
        launch.initialize()
    else:
        launch.initialize(local_device_ids=[0])

    def strike() -> None:
        if jax.process_index() == victim:
            os.kill(os.getpid(), getattr(signal, number))

    if where == "set-up":
        strike_in_set_up(strike)
    ranks = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), (measure.AXIS,))
    settings = {"num_experts": TOP_K * ranks, "top_k": TOP_K, "hidden": HIDDEN, "deadline_s": deadline_s}
    began = time.monotonic()
    try:
        with wep.ExpertGroup(mesh, **settings, **({} if PLATFORM == "cpu" else GPU_SETTINGS)) as group:
            assert group.backend == PLATFORM, group.backend
            whole = PLATFORM == "cpu" and "WIDEEP_APART" not in os.environ
            step = (make_step if whole else make_steps)(group, where, strike)
            for _ in range(GOOD_STEPS):
                step(False)
            if where == "between":
                strike()
            if where == "waiting":
                threading.Timer(STRIKE_S, strike).start()
                time.sleep(LATE_S if jax.process_index() == 0 else 0)
            began = time.monotonic()
            step(True)
            group.check()
        print("nothing raised")
    except Exception as error:
        print(f"raised after {time.monotonic() - began:.2f}: {type(error).__name__}: {error}", flush=True)
    until = time.monotonic() + LONGEST_HOLD_S
    while shared_memory() and time.monotonic() < until:
        time.sleep(0.05)
    print(f"shared: {shared_memory()}")
    leave()


def draw(group: wep.ExpertGroup, *tokens: int) -> list[jax.Array]:
    """x, weights and topk_idx of all ranks, [*tokens, ..]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*tokens, HIDDEN)).astype(np.float32)
    weights = rng.random((*tokens, TOP_K)).astype(np.float32)
    topk_idx = np.argsort(rng.random((*tokens, group.num_experts)), axis=-1)[..., :TOP_K]
    return [measure.put(group.mesh, array) for array in (x, weights, topk_idx.astype(np.int32))]


def make_step(group: wep.ExpertGroup, where: str, strike: Callable[[], None]) -> Step:
    """All ops in one program; the last rank strikes from within it, when another of its process may be further."""

    def struck(fatal, x):
        if fatal:
            strike()
        return x

    def harm(op, x, fatal):
        if op != where:
            return x
        last = jax.lax.axis_index(group.axis) == group.num_ranks - 1
        return io_callback(struck, jax.ShapeDtypeStruct(x.shape, x.dtype), fatal[0] & last, x)

    def body(x, weights, topk_idx, fatal):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(harm("dispatch", x, fatal), weights, plan)
        return wep.combine(harm("combine", rows, fatal), row_weights, plan)

    step = measure.on_ranks(group.mesh, body, check_vma=False)
    arrays = draw(group, group.num_ranks * TOKENS)
    flags = {on: measure.put(group.mesh, np.full(group.num_ranks, on)) for on in (False, True)}
    compiled = step.lower(*arrays, flags[False]).compile()
    meet("compiled")
    return lambda fatal: jax.block_until_ready(compiled(*arrays, flags[fatal]))


def make_steps(group: wep.ExpertGroup, where: str, strike: Callable[[], None]) -> Step:
    """A program for each op; the victim strikes between them, when it has nothing under way on its device."""
    place = NamedSharding(group.mesh, PartitionSpec(group.axis))

    def compiled(body: Callable[..., Any], *shapes: Any) -> tuple[Callable[..., Any], Any]:
        """The program, and the shapes of what it returns."""
        function = jax.shard_map(
            lambda *arrays: measure.stack(body(*measure.unstack(arrays))),
            mesh=group.mesh,
            in_specs=PartitionSpec(group.axis),
            out_specs=PartitionSpec(group.axis),
        )
        program = jax.jit(function, in_shardings=place, out_shardings=place).lower(*shapes).compile()
        return program, jax.eval_shape(function, *shapes)

    x, weights, topk_idx = draw(group, group.num_ranks, TOKENS)
    make_plan, plan_shapes = compiled(lambda topk_idx: wep.make_plan(topk_idx, group), topk_idx)
    dispatch, row_shapes = compiled(wep.dispatch, x, weights, plan_shapes)
    combine, _ = compiled(wep.combine, *row_shapes, plan_shapes)
    meet("compiled")

    def step(fatal: bool) -> None:
        plan = jax.block_until_ready(make_plan(topk_idx))
        if fatal and where == "dispatch":
            strike()
        rows = jax.block_until_ready(dispatch(x, weights, plan))
        if fatal and where == "combine":
            strike()
        jax.block_until_ready(combine(*rows, plan))

    return step


def meet(name: str) -> None:
    """So that no time that a process takes to compile counts against the deadline."""
    _ffi.coordination_client().wait_at_barrier(name, 100_000)


def strike_in_set_up(strike: Callable[[], None]) -> None:
    """When the victim's memory is made, and nobody else has it."""
    gather = _bootstrap.Bootstrap.all_gather

    def all_gather(meeting, step, record):
        if step == "descriptors":
            strike()
        return gather(meeting, step, record)

    _bootstrap.Bootstrap.all_gather = all_gather


def shared_memory() -> list[str]:
    """Mappings and descriptors of arenas that this process still has."""
    with open("/proc/self/maps") as maps:
        found = [line.split()[-1] for line in maps if "jax_wideep" in line and "memfd" in line]
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if "memfd:jax_wideep" in target:
            found.append(target)
    return found


if __name__ == "__main__":
    main()
