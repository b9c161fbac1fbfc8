"""The ranks of a job that launch.py runs, one for each process; or, without it, ranks on devices of this process.

python tests/gpu/launch.py 8 script.py            eight GPU ranks
WIDEEP_GROUP='{"transport": "nvshmem"}' ..         settings of all groups, unless the script has its own
WIDEEP_CPU_RANKS=8 python script.py                eight CPU ranks in one process, to try the script itself
WIDEEP_CPU_RANKS=2 python tests/gpu/launch.py 3 ..      six in three processes
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep import _ffi

AXIS = "expert"


def group_settings() -> dict[str, Any]:
    """Of all groups, unless the script has its own."""
    return json.loads(os.environ.get("WIDEEP_GROUP", "{}"))


class World:
    """All ranks, and those of this process.

    Arrays of all ranks carry a leading axis of ranks in NumPy; on devices it is folded into the next one and split
    over the mesh.
    """

    def __init__(self) -> None:
        self.process = int(os.environ.get("WIDEEP_PROCESS", 0))
        self.num_processes = int(os.environ.get("WIDEEP_NUM_PROCESSES", 1))
        cpu_ranks = int(os.environ.get("WIDEEP_CPU_RANKS", 0))
        if cpu_ranks:
            os.environ["JAX_PLATFORMS"] = "cpu"
            jax.config.update("jax_platforms", "cpu")
            wep.use_cpu_devices(cpu_ranks)
        if self.num_processes > 1:
            coordinator, devices = os.environ["WIDEEP_COORDINATOR"], None if cpu_ranks else [0]
            jax.distributed.initialize(
                coordinator, self.num_processes, self.process, local_device_ids=devices
            )
        self.backend = os.environ.get("WIDEEP_BACKEND", "cpu" if cpu_ranks else "cuda")
        self.devices = np.array(jax.devices())
        self.num_ranks = len(self.devices)
        self.mesh = Mesh(self.devices, (AXIS,))
        self.local_ranks = [r for r, d in enumerate(self.devices) if d.process_index == jax.process_index()]
        # Of groups that are to fail. On CPU sockets tell that a process has ended, and nobody waits for so long.
        self.deadline_s = 1.0 if self.backend == "cuda" else 30.0
        self._barriers = 0

    def group(self, **settings: Any) -> wep.ExpertGroup:
        asked = {"backend": self.backend, **group_settings(), **settings}
        return wep.ExpertGroup(self.mesh, axis=AXIS, **asked)

    def put(self, array: np.ndarray) -> jax.Array:
        """[ranks, n, ..] -> a global array [ranks * n, ..]; no collective is involved."""
        flat = array.reshape(-1, *array.shape[2:])
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(flat.shape, sharding, lambda at: flat[at])

    def local(self, array: jax.Array) -> dict[int, np.ndarray]:
        """What each rank of this process holds of a global array."""
        rank_of = {device: rank for rank, device in enumerate(self.devices)}
        return {rank_of[shard.device]: np.asarray(shard.data) for shard in array.addressable_shards}

    def on_ranks(self, body: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
        """`body` on every rank's shards, jitted."""
        spec = PartitionSpec(AXIS)
        return jax.jit(jax.shard_map(body, mesh=self.mesh, in_specs=spec, out_specs=spec), **jit_options)

    def barrier(self, timeout_s: float = 60, absent: Sequence[int] = ()) -> None:
        """Until all processes but `absent` have come."""
        self._barriers += 1
        if self.num_processes > 1:
            present = [p for p in range(self.num_processes) if p not in absent]
            name = f"wideep_test_barrier_{self._barriers}"
            _ffi.coordination_client().wait_at_barrier(name, int(timeout_s * 1e3), present)

    def missing(self, rank: int) -> str:
        """How an error names a rank that is alone in its process and did not come."""
        on_cpu = f"{rank} of {self.num_ranks} (in process {rank})"
        return on_cpu if self.backend == "cpu" else f"for rank {rank}"

    def compile(self, function: Callable[..., Any], *arrays: jax.Array) -> Callable[..., Any]:
        """A jitted function for such arrays, compiled on all processes: none of it counts against a deadline."""
        compiled = function.lower(*arrays).compile()
        self.barrier()
        return compiled

    def run(self, checks: Mapping[str, Callable[[World], None]], names: Iterable[str]) -> None:
        """The checks of these names, one after the other."""
        for name in names:
            began = time.monotonic()
            checks[name](self)
            self.say(f"{name}: ok, {time.monotonic() - began:.1f} s")

    def say(self, text: str) -> None:
        if self.process == 0:
            print(text, flush=True)
