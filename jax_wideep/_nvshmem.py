"""NVSHMEM under the backend "cuda": where it is found, how it starts, and which ranks it gives addresses of.

Loaded only for groups with transport="nvshmem". It starts once in a process, for all such groups.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jax_wideep import _bootstrap, _ffi

PACKAGE = "nvidia-nvshmem-cu13"
MIN_VERSION = (3, 4, 5)
_LIBRARY = "libnvshmem_host.so.3"

# Where all processes are on one host: what NVSHMEM needs to start without a network. Set only where the user has not.
_ONE_HOST = {"NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo", "NVSHMEM_REMOTE_TRANSPORT": "none"}
# NVSHMEM's own NCCL and multicast are not used, and fail where ranks share a GPU.
_ALWAYS = {"NVSHMEM_DISABLE_NCCL": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclasses.dataclass(frozen=True)
class Arena:
    """A rank's memory and how it reaches the others.

    Attributes:
      address: of its own arena.
      addresses: [ranks] where this rank writes to each arena: the arena itself, or its mirror.
      relay: a capsule for open_group; None if every rank has an address.
    """

    address: int
    addresses: list[int]
    relay: Any | None


def obstacle() -> str | None:
    """Why NVSHMEM cannot be used here, and what to install or set; None if nothing is in the way."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is not None and parse_version(version) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        return f"NVSHMEM {wanted} or newer is needed, got {version}; pip install '{PACKAGE}>={wanted}'"
    try:
        _load_library()
    except OSError as error:
        return (
            f"NVSHMEM's {_LIBRARY} cannot be loaded ({error}); pip install {PACKAGE}, or add its folder to "
            "LD_LIBRARY_PATH"
        )
    if _ffi.nvshmem_module() is None:
        return (
            "the module _wideep_nvshmem is not built into this installation; build it with "
            "-C cmake.define.WIDEEP_CUDA=ON -C cmake.define.WIDEEP_NVSHMEM=ON"
        )
    return None


def parse_version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "3.4.5.post1" -> (3, 4, 5)."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


@functools.cache
def _load_library() -> ctypes.CDLL:
    """The wheel's library, or the one that the loader finds; modules linked to it then find it loaded."""
    spec = importlib.util.find_spec("nvidia.nvshmem") if importlib.util.find_spec("nvidia") else None
    folders = [pathlib.Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if (folder / "lib" / _LIBRARY).exists():
            return ctypes.CDLL(str(folder / "lib" / _LIBRARY), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(_LIBRARY, mode=ctypes.RTLD_GLOBAL)


def start(meeting: _bootstrap.Bootstrap, device: int, hosts: Sequence[str]) -> None:
    """Joins, on all processes of the meeting together: process i of them in order is PE i.

    Raises:
      RuntimeError: NVSHMEM did not start, or runs with other processes.
    """
    module = _module()
    settings = {**_ALWAYS, **(_ONE_HOST if len(set(hosts)) == 1 else {})}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    first = meeting.processes[0]
    error, own = None, ""
    if meeting.process == first:
        try:
            own = module.unique_id().hex()
        except RuntimeError as caught:
            error = str(caught)
    records = meeting.all_gather("nvshmem id", {"id": own, "error": error})
    _bootstrap.raise_first_error(records)
    pe = meeting.processes.index(meeting.process)
    try:
        module.start(device, pe, len(meeting.processes), bytes.fromhex(records[first]["id"]))
    except RuntimeError as caught:
        error = str(caught)
    _bootstrap.raise_first_error(meeting.all_gather("nvshmem start", {"error": error}))


def node_of_rank(num_ranks: int, node_size: int | None, hosts: Sequence[str]) -> list[int]:
    """The node of every rank: its host's, or, where node_size is given, consecutive ranks of that number.

    Raises:
      ValueError: a node would span hosts.
    """
    if node_size is None:
        names = list(dict.fromkeys(hosts))
        return [names.index(host) for host in hosts]
    nodes = [rank // node_size for rank in range(num_ranks)]
    for node in set(nodes):
        on = {hosts[rank] for rank in range(num_ranks) if nodes[rank] == node}
        if len(on) > 1:
            raise ValueError(
                f"ExpertGroup: node_size: expected nodes that lie on one host each, got {node_size} ranks a node, of "
                f"which node {node} spans {len(on)} hosts; order the mesh by hosts or use a smaller node_size"
            )
    return nodes


def mirrors_of(rank: int, nodes: Sequence[int], has_address: Sequence[bool]) -> list[int]:
    """For every rank which of this rank's mirrors stands for it; -1: it is on this node and has an address."""
    mirrors, used = [], 0
    for peer, node in enumerate(nodes):
        if peer == rank or (node == nodes[rank] and has_address[peer]):
            mirrors.append(-1)
        else:
            mirrors.append(used)
            used += 1
    return mirrors


def make_arena(
    rank: int, nodes: list[int], pe_of_rank: Sequence[int], device: int, sizes: dict[str, int]
) -> Arena:
    """Memory for an arena and for the mirrors, and the relay. Collective.

    Args:
      sizes: what gives an arena its size, by the names of `arena_bytes`.

    Raises:
      RuntimeError: there is not enough memory.
    """
    module, num_ranks = _module(), len(nodes)
    cuda = _ffi.cuda_module()
    assert cuda is not None
    arena_bytes = cuda.arena_bytes(num_ranks=num_ranks, **sizes)
    # The same on every rank: mirrors for the one that has the fewest ranks on its node.
    one_node = len(set(nodes)) == 1
    most = num_ranks - min(nodes.count(node) for node in nodes)
    memory = module.allocate(device, (1 + most) * arena_bytes + 128)
    there = [memory.address_on(pe) for pe in pe_of_rank]
    mirrors = mirrors_of(rank, nodes, [address != 0 for address in there])
    if max(mirrors) >= most:
        raise RuntimeError(
            f"nvshmem transport: ranks {[r for r, m in enumerate(mirrors) if m >= 0]} are on the node of rank {rank} "
            "but cannot be reached by loads and stores; set node_size=1"
        )
    addresses = [
        there[peer] if mirror < 0 else memory.address + (1 + mirror) * arena_bytes
        for peer, mirror in enumerate(mirrors)
    ]
    addresses[rank] = memory.address
    relay = None
    if not one_node:
        relay = module.make_relay(
            memory=memory,
            rank=rank,
            num_ranks=num_ranks,
            pe_of_rank=list(pe_of_rank),
            mirror_of_rank=mirrors,
            **sizes,
        )
    return Arena(memory.address, addresses, relay)


def _module() -> ModuleType:
    module = _ffi.nvshmem_module()
    assert module is not None  # otherwise an obstacle
    return module
