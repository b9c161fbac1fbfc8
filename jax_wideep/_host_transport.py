"""The transport of the backend "cpu" where ranks are in several processes of one host: shared memory.

Set up collectively, when the group is made and outside of tracing. Every process makes an arena, hands it to the
others through a Unix socket, and keeps that pair's socket for what they tell each other later
(csrc/transport/host_peers.h).
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_wideep import _bootstrap, _ffi

# Set-up waits for the other processes as long as an exchange does, but not less than this.
_SHORTEST_WAIT_S = 5.0


@dataclasses.dataclass(frozen=True)
class HostSettings:
    """What the processes of a group must agree on.

    Attributes:
      devices: [ranks, groups side by side], the mesh in rank order.
      others: as in ExpertGroup.
    """

    devices: np.ndarray
    backend: str
    num_experts: int
    top_k: int
    hidden: int
    chunk: int
    deadline_s: float


class HostTransport:
    """A group's entry in the compiled CPU backend, and its memory where it spans processes."""

    def __init__(self, module: ModuleType, handle: int):
        self._module = module
        self.handle = handle
        self.closed = False

    def error(self) -> str | None:
        return None  # exchanges report their errors themselves

    def wait(self) -> None:
        pass  # results are ready, so exchanges are done

    def mask(self, ranks: Sequence[int]) -> None:
        self._module.mask_group(self.handle, list(ranks))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._module.close_group(self.handle)


def open_local(num_ranks: int, deadline_s: float, devices: np.ndarray) -> HostTransport:
    """All ranks are devices of this process."""
    module = _ffi.cpu_module()
    assert module is not None
    places = [(device.id, subgroup, rank) for (rank, subgroup), device in np.ndenumerate(devices)]
    return HostTransport(module, module.open_group(num_ranks, deadline_s, places))


def connect(settings: HostSettings) -> HostTransport | None:
    """Makes the transport, on all processes of the mesh together; None for the backend "xla", which has none.

    Raises:
      ValueError: the processes' settings, versions or builds differ, naming both sides.
      UnavailableError: these processes cannot share memory, with the reason; the same on every process.
      BootstrapError: a process did not come.
    """
    devices, this = settings.devices, jax.process_index()
    processes = sorted({device.process_index for device in devices.flat})
    timeout_s = _bootstrap.timeout_s(settings.deadline_s, _SHORTEST_WAIT_S)
    meeting = _bootstrap.Bootstrap(processes, this, _ffi.coordination_client(), timeout_s)
    module = _ffi.cpu_module()
    hello = meeting.all_gather("hello", _introduce(module, settings))
    try:
        if settings.backend == "xla":
            _bootstrap.agree_on_settings(hello)
            return None
        _bootstrap.agree(hello)
        _agree_on_threads(hello)
    except ValueError:
        meeting.let_all_hear("hello")
        raise
    assert module is not None  # otherwise an obstacle, above
    handle = max(record["next_id"] for record in hello.values())

    arena, received, error = None, {}, None
    ends: dict[int, socket.socket] = {}  # this process's, of the pairs that it makes
    try:
        arena = module.make_arena()
    except RuntimeError as caught:
        error = str(caught)
    _bootstrap.raise_first_error(meeting.all_gather("memory", {"error": error}))
    assert arena is not None
    try:
        given: dict[int, list[int]] = {other: [arena.descriptor] for other in processes if other != this}
        theirs = []
        for other in processes[processes.index(this) + 1 :]:
            ends[other], end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.append(end)
            given[other].append(end.fileno())
        try:
            received = meeting.all_gather_descriptors(given)
        finally:
            for end in theirs:
                end.close()
        _open(module, handle, settings, arena, received, ends)
    except _bootstrap.BootstrapError:  # a process is missing: it would be missed again below
        raise
    except (RuntimeError, OSError) as caught:
        error = str(caught)
    finally:
        _bootstrap.close_descriptors(received)
        for end in ends.values():
            end.close()
    transport = HostTransport(module, handle)
    try:
        # Nobody exchanges anything before everybody is ready.
        _bootstrap.raise_first_error(meeting.all_gather("ready", {"error": error}))
    except BaseException:
        transport.close()
        raise
    return transport


def _agree_on_threads(hello: dict[int, dict[str, Any]]) -> None:
    """XLA compiles for a number of threads, and ranks meet in one program only."""
    difference = _bootstrap.first_difference({p: {"NPROC": record["threads"]} for p, record in hello.items()})
    if difference is not None:
        most = max(record["threads"] for record in hello.values())
        raise ValueError(
            "ExpertGroup: expected as many threads of XLA's CPU client in all processes, since it compiles programs "
            f"for them, got {difference}; set NPROC={most} in the environment of all processes"
        )


def _introduce(module: ModuleType | None, settings: HostSettings) -> dict[str, Any]:
    """What the other processes have to know of this one."""
    own = dataclasses.asdict(dataclasses.replace(settings, devices=np.zeros(0)))
    own["devices"] = [int(device.id) for device in settings.devices.flat]
    own.update(_bootstrap.versions())
    own["_wideep_cpu"] = None if module is None else _bootstrap.build_id(module)
    obstacle = None
    if module is None:
        obstacle = "the module _wideep_cpu is not built into this installation"
    elif jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        # JAX fills it from process 0 only, and a program that one process has compiled and another one has loaded
        # is not the same launch to both: their ranks would wait for each other.
        obstacle = "JAX's persistent compilation cache is on (JAX_COMPILATION_CACHE_DIR); unset it"
    elif not _ffi.compilations_are_counted():
        obstacle = "this version of JAX does not say when it has compiled a program"
    return {
        "obstacle": obstacle,
        "host": _bootstrap.host_id(),
        "settings": own,
        "threads": _ffi.cpu_client_threads(),
        "next_id": module.next_shared_id() if module else 0,
    }


def _open(
    module: ModuleType,
    handle: int,
    settings: HostSettings,
    arena: Any,
    received: dict[int, list[int]],
    ends: dict[int, socket.socket],
) -> None:
    """Hands everything to the compiled module, which gets descriptors of its own."""
    processes = [[device.process_index for device in subgroup] for subgroup in settings.devices.T]
    ranks: dict[int, list[tuple[int, int]]] = {}
    places = []
    for (rank, subgroup), device in np.ndenumerate(settings.devices):
        ranks.setdefault(device.process_index, []).append((subgroup, rank))
        if device.process_index == jax.process_index():
            places.append((device.id, subgroup, rank))
    peers = []
    for other, numbers in received.items():
        connection = ends[other].fileno() if other in ends else numbers[1]
        peers.append((other, os.dup(connection), os.dup(numbers[0]), ranks[other]))
    module.open_shared_group(
        id=handle,
        process=jax.process_index(),
        num_ranks=settings.devices.shape[0],
        deadline_s=settings.deadline_s,
        places=places,
        processes=processes,
        arena=arena,
        peers=peers,
    )
