"""NVSHMEM under the backend "cuda": where it is found, how it starts, and which ranks it gives addresses of.

Loaded only for groups that span hosts or ask for it. It starts once in a process, for all such groups.
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
# An environment variable: if set, rows go to other (virtual) nodes by NVSHMEM's puts also where stores reach them.
ONLY_PUTS = "WIDEEP_NVSHMEM_ONLY_PUTS"

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
      mirrored: [ranks] whether it is the mirror: the rank is on another node.
      across: what carries exchanges between nodes, capsules for open_group: the relay of the low-latency shape and the
        two-hop exchange of the throughput shape. None on one node.
    """

    address: int
    addresses: list[int]
    mirrored: list[bool]
    across: tuple[Any, Any] | None


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
      ValueError: a node would span hosts, or its ranks would not be consecutive.
    """
    if node_size is None:
        names = list(dict.fromkeys(hosts))
        nodes = [names.index(host) for host in hosts]
        if nodes != sorted(nodes):
            raise ValueError(
                f"ExpertGroup: mesh: expected the ranks of each host to be consecutive, got ranks on hosts {nodes}; "
                "order the mesh's devices by hosts, or set node_size"
            )
        return nodes
    nodes = [rank // node_size for rank in range(num_ranks)]
    for node in set(nodes):
        on = {hosts[rank] for rank in range(num_ranks) if nodes[rank] == node}
        if len(on) > 1:
            raise ValueError(
                f"ExpertGroup: node_size: expected nodes that lie on one host each, got {node_size} ranks a node, of "
                f"which node {node} spans {len(on)} hosts; order the mesh by hosts or use a smaller node_size"
            )
    return nodes


def mirrors_of(rank: int, nodes: Sequence[int]) -> list[int]:
    """For every rank which of this rank's mirrors stands for it; -1: it is on the same node."""
    mirrors, used = [], 0
    for node in nodes:
        mirrors.append(-1 if node == nodes[rank] else used)
        used += node != nodes[rank]
    return mirrors


def make_arena(
    rank: int,
    nodes: list[int],
    all_nodes: Sequence[list[int]],
    pe_of_rank: Sequence[int],
    device: int,
    sizes: dict[str, int],
) -> Arena:
    """Memory for an arena, for mirrors and for the rings between nodes; relay and two-hop exchange. Collective.

    Args:
      nodes: [ranks] the node of every rank of this group.
      all_nodes: the same of all groups side by side, which join in.
      sizes: what gives an arena its size, by the names of `arena_bytes`.

    Raises:
      RuntimeError: there is not enough memory, num_sms is too small for the nodes, or ranks of a node do not reach
        each other's memory.
    """
    module, num_ranks = _module(), len(nodes)
    cuda = _ffi.cuda_module()
    assert cuda is not None
    arena_bytes = cuda.arena_bytes(num_ranks=num_ranks, **sizes)
    ring_bytes = max(
        module.two_hop_bytes(node_of_rank=group, **sizes) if len(set(group)) > 1 else 0 for group in all_nodes
    )
    # NVSHMEM wants the same on every PE: mirrors for the rank that has the fewest others on its node.
    most_mirrors = num_ranks - min(group.count(node) for group in all_nodes for node in group)
    memory = module.allocate(device, (1 + most_mirrors) * arena_bytes + 128)
    rings = module.allocate(device, ring_bytes) if ring_bytes > 0 else None

    there = [memory.address_on(pe) for pe in pe_of_rank]
    mirrors = mirrors_of(rank, nodes)
    out_of_reach = [
        peer for peer, mirror in enumerate(mirrors) if mirror < 0 and peer != rank and there[peer] == 0
    ]
    if out_of_reach:
        raise RuntimeError(
            f"nvshmem transport: ranks {out_of_reach} are on the node of rank {rank} but cannot be reached by loads "
            "and stores; set node_size=1"
        )
    addresses = [
        there[peer] if mirror < 0 else memory.address + (1 + mirror) * arena_bytes
        for peer, mirror in enumerate(mirrors)
    ]
    addresses[rank] = memory.address
    across = None
    if max(mirrors) >= 0:
        where = {"rank": rank, "pe_of_rank": list(pe_of_rank), **sizes}
        across = (
            module.make_relay(memory=memory, num_ranks=num_ranks, mirror_of_rank=mirrors, **where),
            module.make_two_hop(
                arena=memory, rings=rings, node_of_rank=nodes, only_puts=ONLY_PUTS in os.environ, **where
            ),
        )
    return Arena(memory.address, addresses, [mirror >= 0 for mirror in mirrors], across)


def _module() -> ModuleType:
    module = _ffi.nvshmem_module()
    assert module is not None  # otherwise an obstacle
    return module
