"""How the benchmarks measure: devices, interleaved timing, percentiles, and the speed of a bare copy.

What is timed is a whole jitted call, from the call to `jax.block_until_ready` of all its outputs, on every
device of this process; so it is the slowest rank that counts. With several processes each measures its own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_wideep.group import Backend, ExpertGroup, use_cpu_devices

Key = TypeVar("Key", bound=Hashable)  # names a candidate

AXIS = "expert"
DEFAULT_CPU_DEVICES = 8


def make_mesh(devices: int | None, backend: Backend) -> Mesh:
    """A mesh of one axis over `devices` devices: 8 CPU devices, or all accelerators, if None.

    Raises:
      ValueError: fewer devices than asked for.
    """
    cpu_devices = DEFAULT_CPU_DEVICES if devices is None else devices
    use_cpu_devices(cpu_devices)  # before a backend starts; of no effect on accelerators
    available = jax.devices("cpu") if backend == "cpu" else jax.devices()
    if devices is None and available[0].platform == "cpu":
        devices = DEFAULT_CPU_DEVICES
    count = len(available) if devices is None else devices
    if count > len(available):
        raise ValueError(
            f"bench: devices: expected at most {len(available)} {available[0].platform} devices, got {count}"
        )
    return Mesh(np.array(available[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def make_group(mesh: Mesh, sizes: Any, **settings: Any) -> ExpertGroup:
    """The group over `mesh` for settings with `experts`, `top_k`, `hidden` and `backend`; `settings` go before them."""
    wanted = {
        "num_experts": sizes.experts,
        "top_k": sizes.top_k,
        "hidden": sizes.hidden,
        "backend": sizes.backend,
    }
    return ExpertGroup(mesh, axis=AXIS, **{**wanted, **settings})


def start_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """`jax.distributed.initialize` where several processes were asked for."""
    if num_processes is not None and num_processes > 1:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def put(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """`array`, split over the ranks by its first axis; every process passes the whole array."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def draw_normal(mesh: Mesh, key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal values of a global array, split over the ranks by its first axis; no rank draws another's part."""
    return _normal(NamedSharding(mesh, PartitionSpec(AXIS)), shape, dtype)(key)


@functools.lru_cache(maxsize=16)
def _normal(sharding: NamedSharding, shape: tuple[int, ...], dtype: str) -> Callable[[jax.Array], jax.Array]:
    draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.dtype(dtype))
    return jax.jit(draw, out_shardings=sharding)


def on_ranks(mesh: Mesh, function: Callable[..., Any], *, check_vma: bool = True) -> Callable[..., Any]:
    """`function` on one rank's shards, jitted; a pytree of arrays in and out, split by their first axis."""
    spec = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))


def stack(tree: Any) -> Any:
    """Gives one rank's arrays a leading axis of ranks, so that any of them, also a scalar, leaves a shard_map."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def unstack(tree: Any) -> Any:
    """Undoes `stack`."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Attributes:
      run: the jitted call.
      prepare: from a repeat's inputs to the arguments of `run`; not timed.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs


@dataclasses.dataclass
class Times:
    """Seconds of each timed call of a candidate.

    Attributes:
      wall: from the call until all outputs are ready.
      cpu: processor time of this process meanwhile, over all threads. On a machine that does other work as
        well it says more than the wall time; on an accelerator, little.
    """

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, float]:
        """Milliseconds, for a JSON line."""
        return {
            "median_ms": 1e3 * median(self.wall),
            "min_ms": 1e3 * min(self.wall),
            "p90_ms": 1e3 * percentile(self.wall, 90),
            "cpu_ms": 1e3 * median(self.cpu),
        }


def time_interleaved(
    candidates: dict[Key, Candidate],
    make_inputs: Callable[[int], tuple[Any, ...]],
    *,
    repeats: int,
    warmup: int = 1,
) -> tuple[dict[Key, Times], dict[Key, str]]:
    """Times every candidate once per repeat, in an order that changes from repeat to repeat.

    Args:
      candidates: by name.
      make_inputs: fresh inputs for repeat i.
      repeats: timed calls of each candidate.
      warmup: calls before them, which compile.

    Returns:
      Times by candidate; and for candidates that failed, the first line of the error.
    """
    measured: dict[Key, Times] = {name: Times() for name in candidates}
    failed: dict[Key, str] = {}
    for repeat in range(-warmup, repeats):
        inputs = jax.block_until_ready(make_inputs(repeat + warmup))
        names = list(candidates)
        first = repeat % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            candidate = candidates[name]
            try:
                args = jax.block_until_ready(candidate.prepare(*inputs))
                start, cpu_start = time.perf_counter(), time.process_time()
                outputs = jax.block_until_ready(candidate.run(*args))
                wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                failed[name] = str(error).splitlines()[0]
                continue
            del outputs, args  # before the next one allocates
            if repeat >= 0:
                measured[name].wall.append(wall)
                measured[name].cpu.append(cpu)
    return {name: times for name, times in measured.items() if name not in failed}, failed


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, int(np.ceil(percent / 100 * len(ordered))) - 1)]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two."""
    return float(np.median(values))


def copy_bytes_per_s(device: jax.Device, *, num_bytes: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes read plus bytes written per second of a bare copy, best of `repeats`.

    On CPU it is one core's memcpy; on an accelerator a kernel of XLA's that reads and writes once.
    """
    times = []
    if device.platform == "cpu":
        source = np.random.default_rng(0).integers(0, 255, num_bytes, np.uint8, endpoint=True)
        target = np.zeros_like(source)
        for _ in range(repeats):
            start = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - start)
    else:
        array = jax.device_put(jnp.arange(num_bytes // 4, dtype=jnp.int32), device)
        add = jax.jit(lambda values: values + 1)
        for repeat in range(repeats + 1):
            jax.block_until_ready(array)
            start = time.perf_counter()
            array = jax.block_until_ready(add(array))
            if repeat > 0:
                times.append(time.perf_counter() - start)
    return 2 * num_bytes / min(times)


def environment(mesh: Mesh) -> dict[str, Any]:
    """What every record says about where it was measured."""
    import datetime

    device = mesh.devices.flat[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "device_kind": device.device_kind,
        "platform": device.platform,
        "ranks": int(mesh.size),
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
    }
