"""One process of a job in which process VICTIM comes to harm at a place WHERE, and how the others learn of it.

    failing.py WHERE VICTIM SIGNAL DEADLINE_S

Each of the others prints "raised after SECONDS: MESSAGE", and then what it still shares.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep import _bootstrap, launch

TOKENS, HIDDEN = 4, 128
SPEC = PartitionSpec("expert")


def main() -> None:
    where, victim, number, deadline_s = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    wep.use_cpu_devices(int(os.environ["WIDEEP_DEVICES"]))
    launch.initialize()
    doomed = jax.process_index() == victim
    if doomed and where == "set-up":
        come_to_harm_in_set_up(number)
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    began = time.monotonic()
    try:
        with wep.ExpertGroup(
            mesh, num_experts=2 * len(devices), top_k=2, hidden=HIDDEN, deadline_s=deadline_s
        ) as group:
            assert group.backend == "cpu"
            began = run(group, where, doomed, number)
        print("nothing raised")
    except Exception as error:
        print(f"raised after {time.monotonic() - began:.2f}: {type(error).__name__}: {error}", flush=True)
    # An exchange of another rank of this process may still hold the memory until its own deadline.
    until = time.monotonic() + deadline_s + 2
    while shared_memory() and time.monotonic() < until:
        time.sleep(0.05)
    print(f"shared: {shared_memory()}", flush=True)
    os._exit(0)  # JAX would wait for the victim


def run(group: wep.ExpertGroup, where: str, doomed: bool, number: str) -> float:
    """Three good steps, then one more; returns when that one began."""

    def strike(fatal, x):
        if doomed and fatal and where in ("dispatch", "combine"):
            os.kill(os.getpid(), getattr(signal, number))
        return x

    def harm(op, x, fatal):
        # One device of the victim: another one may have come to the exchange already.
        if op != where:
            return x
        last = jax.lax.axis_index("expert") == jax.device_count() - 1
        return io_callback(strike, jax.ShapeDtypeStruct(x.shape, x.dtype), fatal & last, x)

    def body(x, weights, topk_idx, fatal):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(harm("dispatch", x, fatal[0]), weights, plan)
        return wep.combine(harm("combine", rows, fatal[0]), row_weights, plan)

    step = jax.jit(
        jax.shard_map(
            body,
            mesh=group.mesh,
            in_specs=(SPEC, SPEC, SPEC, PartitionSpec()),
            out_specs=SPEC,
            check_vma=False,
        )
    )
    ranks = group.num_ranks
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(ranks * TOKENS, HIDDEN)), rng.random((ranks * TOKENS, 2))
    topk_idx = np.argsort(rng.random((ranks * TOKENS, 2 * ranks)), axis=1)[:, :2]
    arrays = [
        put(group.mesh, SPEC, a)
        for a in (x.astype(np.float32), weights.astype(np.float32), topk_idx.astype(np.int32))
    ]
    fatal = {on: put(group.mesh, PartitionSpec(), np.array([on])) for on in (False, True)}
    for _ in range(3):
        jax.block_until_ready(step(*arrays, fatal[False]))
    print("running", flush=True)
    if doomed and where == "between":
        os.kill(os.getpid(), getattr(signal, number))
    began = time.monotonic()
    jax.block_until_ready(step(*arrays, fatal[True]))
    return began


def put(mesh, spec, array):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda at: array[at])


def come_to_harm_in_set_up(number: str) -> None:
    gather = _bootstrap.Bootstrap.all_gather

    def all_gather(meeting, step, record):
        if step == "descriptors":  # the arena is made, and nobody else has it
            print("running", flush=True)
            os.kill(os.getpid(), getattr(signal, number))
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
