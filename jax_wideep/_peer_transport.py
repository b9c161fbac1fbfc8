"""The transport of the backend "cuda": GPUs of one host that map each other's memory.

Set up collectively, when the group is made and outside of tracing. Every step ends with all processes knowing how it
went for the others, so that all of them take the same decision.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from jax_wideep import _bootstrap, _ffi, _nvshmem

DispatchForm = Literal["auto", "push", "pull"]
Transport = Literal["auto", "peer", "nvshmem"]
CombineForm = Literal["auto", "pull", "push", "reduce"]

_DEFAULT_NUM_SMS = 32
# Set-up waits for the other processes as long as an exchange does, but not less than this: the first use of a GPU and
# of the module takes its time.
_SHORTEST_WAIT_S = 10.0
_MIN_COMPUTE_CAPABILITY = 90
# From this many rows of a token at a rank on, sending it there once is worth a second pass over the rows: the
# extra pass reads and writes in the memory of the receiver, which is about ten times faster than the link.
_ROWS_PER_RANK_FOR_ONCE = 1.25


@dataclasses.dataclass(frozen=True)
class PeerSettings:
    """What a group asks of its transport.

    Attributes:
      devices: [ranks, groups side by side], the mesh in rank order.
      others: as in ExpertGroup.
    """

    devices: np.ndarray
    num_experts: int
    top_k: int
    hidden: int
    chunk: int
    deadline_s: float
    num_sms: int | None
    zero_copy: str
    dispatch_form: DispatchForm
    combine_form: CombineForm
    transport: Transport = "auto"
    node_size: int | None = None

    @property
    def num_ranks(self) -> int:
        return self.devices.shape[0]


@dataclasses.dataclass(frozen=True)
class _Place:
    """A device of this process."""

    rank: int
    subgroup: int
    device: jax.Device


class PeerTransport:
    """A group's memory on the GPUs of this process.

    Attributes:
      handle: the number under which handlers find it.
      num_sms, dispatch_form, combine_form: the ones chosen.
    """

    def __init__(self, module: ModuleType, handle: int, num_sms: int, dispatch_form: str, combine_form: str):
        self._module = module
        self.handle = handle
        self.num_sms = num_sms
        self.dispatch_form = dispatch_form
        self.combine_form = combine_form
        self.closed = False

    def error(self) -> str | None:
        """What made a rank of this process give up."""
        return None if self.closed else self._module.group_error(self.handle)

    def wait(self) -> None:
        """Until the GPUs of this process are idle; kernels that wait for a rank in vain end by the deadline."""
        self._module.wait_for_group(self.handle)

    def mask(self, ranks: Sequence[int]) -> None:
        """Leaves out `ranks`, takes back all others, and forgets errors: see _masking."""
        self._module.mask_group(self.handle, list(ranks))

    def crossed(self) -> dict[str, int]:
        """What this process's ranks have sent between nodes since the group was made or its mask changed.

        `tokens_out` and `bytes_out` of dispatch and combine's gradient, `tokens_back` and `bytes_back` of combine and
        dispatch's gradient; bytes with the slots' headers.
        """
        return self._module.group_crossed(self.handle)

    def close(self) -> None:
        """Waits for the GPUs of this process, at most the group's deadline, and frees the memory."""
        if not self.closed:
            self.closed = True
            self._module.close_group(self.handle)


def connect(settings: PeerSettings) -> PeerTransport:
    """Makes the transport, on all processes of the mesh together.

    Raises:
      _bootstrap.UnavailableError: the mesh cannot use it, with the reason.
      ValueError: the processes' settings differ, or num_sms does not fit.
      RuntimeError: a process did not come.
    """
    module = _ffi.cuda_module()
    processes = {device.process_index for device in settings.devices.flat}
    meeting = _meet(settings, processes)
    places = [
        _Place(rank, subgroup, device)
        for (rank, subgroup), device in np.ndenumerate(settings.devices)
        if device.process_index == jax.process_index()
    ]
    hello = meeting.all_gather("hello", _introduce(module, settings, places))
    nvshmem = goes_over_nvshmem(settings.transport, [record["host"] for record in hello.values()])
    _bootstrap.agree(hello, one_host=not nvshmem)
    assert module is not None  # otherwise an obstacle, above
    gpus = [gpu for record in hello.values() for gpu in record["gpus"]]
    num_sms = choose_num_sms(settings.num_sms, settings.num_ranks, gpus)
    shares_memory = len({gpu["uuid"] for gpu in gpus}) < len(gpus)
    dispatch_form, combine_form = choose_forms(settings, shares_memory)

    spans_processes = len(processes) > 1
    arena, nodes = None, None
    if nvshmem:
        nodes = _nodes(meeting, hello, settings)
        arena = _join_nvshmem(meeting, hello, settings, places, num_sms, nodes)
        if _spans_nodes(nodes):
            combine_form = "pull"  # there is one way over nodes, and it needs no scratch
    ranks, error = [], None
    try:
        ranks = [_allocate(module, settings, place, num_sms, spans_processes, arena) for place in places]
    except RuntimeError as caught:
        error = str(caught)
    memory = meeting.all_gather(
        "memory",
        {
            "error": error,
            "ranks": [
                {"rank": place.rank, "subgroup": place.subgroup, "arena": rank.arena, "regions": rank.regions}
                for place, rank in zip(places, ranks, strict=False)
            ],
        },
    )
    _bootstrap.raise_first_error(memory)

    if nodes is not None:
        _check_regions(meeting, memory, nodes)

    try:
        node_meeting = (
            meeting if nodes is None else _meet(settings, _node_processes(settings, places[0], nodes))
        )
        _map_peers(node_meeting, places, ranks, memory, arena)
    except _bootstrap.BootstrapError:  # a process is missing: it would be missed again below
        raise
    except (RuntimeError, OSError) as caught:
        error = str(caught)
    # Nobody launches before everybody has mapped everything.
    _bootstrap.raise_first_error(meeting.all_gather("ready", {"error": error}))
    across_nodes = [arena.across] if arena is not None and arena.across is not None else []
    handle = module.open_group(
        ranks, settings.deadline_s, settings.top_k, settings.zero_copy == "auto", across_nodes
    )
    return PeerTransport(module, handle, num_sms, dispatch_form, combine_form)


def _meet(settings: PeerSettings, processes: set[int]) -> _bootstrap.Bootstrap:
    timeout_s = _bootstrap.timeout_s(settings.deadline_s, _SHORTEST_WAIT_S)
    return _bootstrap.Bootstrap(sorted(processes), jax.process_index(), _ffi.coordination_client(), timeout_s)


def goes_over_nvshmem(asked: Transport, hosts: Sequence[str]) -> bool:
    """Whether NVSHMEM has the memory: where it is asked for, and by default where processes are on several hosts."""
    return asked == "nvshmem" or (asked == "auto" and len(set(hosts)) > 1)


def choose_num_sms(asked: int | None, num_ranks: int, gpus: Sequence[dict[str, Any]]) -> int:
    """`asked`, or by default 32; where ranks share a GPU, fewer: their blocks must all run at once.

    By default those of two exchanges, as microbatches=2 has under way. A group of one rank takes its whole GPU by
    default: it waits for nobody, and rows stay in its memory.
    """
    ranks_on = Counter(gpu["uuid"] for gpu in gpus)
    most = min(gpu["num_sms"] // ranks_on[gpu["uuid"]] // 2 * 2 for gpu in gpus)
    default = most if num_ranks == 1 else min(_DEFAULT_NUM_SMS, max(2, most // 4 * 2))
    chosen = default if asked is None else asked
    if not 2 <= chosen <= most:
        raise ValueError(
            f"ExpertGroup: num_sms: expected 2 to {most}, got {chosen}: up to {max(ranks_on.values())} ranks share a "
            f"GPU of {min(gpu['num_sms'] for gpu in gpus)} SMs, and the blocks of all of them must run at the same time"
        )
    return chosen


def choose_forms(settings: PeerSettings, shares_memory: bool) -> tuple[str, str]:
    """Forms of dispatch and combine.

    A token with k experts has rows at d = R * (1 - (1 - 1/R) ** k) ranks in the mean. Where k / d is small, or where
    all ranks' memory is the same memory, dispatch writes every row (push) and combine reads every row (pull); otherwise
    each token crosses once per rank, in dispatch (pull) and back, summed (reduce): 581 against 839 us and 462 against
    721 us on two H100s over NVLink (docs/performance_exchange.md). Combine's push goes through rings, which cost more
    than the bytes they save.
    """
    every_row = shares_memory or not _once_per_rank_pays(settings.num_ranks, settings.top_k)
    dispatch_form: str = settings.dispatch_form
    combine_form: str = settings.combine_form
    if dispatch_form == "auto":
        dispatch_form = "push" if every_row else "pull"
    if combine_form == "auto":
        combine_form = "pull" if every_row else "reduce"
    return dispatch_form, combine_form


def _once_per_rank_pays(num_ranks: int, top_k: int) -> bool:
    """Whether one row for each rank that a token reaches is so much less than `top_k` rows that it is worth a pass."""
    ranks_of_token = num_ranks * (1 - (1 - 1 / num_ranks) ** top_k)
    return num_ranks > 1 and top_k / ranks_of_token >= _ROWS_PER_RANK_FOR_ONCE


def _introduce(module: ModuleType | None, settings: PeerSettings, places: Sequence[_Place]) -> dict[str, Any]:
    """What the other processes have to know of this one."""
    obstacle = _obstacle(module, settings)
    record: dict[str, Any] = {"obstacle": obstacle, "host": _bootstrap.host_id(), "gpus": [], "settings": {}}
    if module is None or obstacle is not None:
        return record
    for place in places:
        gpu = module.device_info(place.device.local_hardware_id)
        if gpu["compute_capability"] < _MIN_COMPUTE_CAPABILITY:
            record["obstacle"] = f"compute capability 9.0 is needed, got {gpu['compute_capability'] / 10}"
        record["gpus"].append({"uuid": gpu["uuid"], "num_sms": gpu["num_sms"]})
    own = dataclasses.asdict(dataclasses.replace(settings, devices=np.zeros(0)))
    own["devices"] = [int(device.id) for device in settings.devices.flat]
    own.update(_bootstrap.versions())
    own["_wideep_cuda"] = _bootstrap.build_id(module)
    record["settings"] = own
    return record


def _obstacle(module: ModuleType | None, settings: PeerSettings) -> str | None:
    if module is None:
        return "the module _wideep_cuda is not built into this installation"
    for name, most in module.exchange_limits().items():
        if getattr(settings, name) > most:
            return f"{name} of at most {most} is supported, got {getattr(settings, name)}"
    return None


def _sizes(settings: PeerSettings, num_sms: int) -> dict[str, int]:
    """What gives an arena its size, beside the number of ranks."""
    return {
        "num_experts": settings.num_experts,
        "top_k": settings.top_k,
        "max_row_bytes": 4 * settings.hidden,
        "num_sms": num_sms,
        "chunk": settings.chunk,
    }


def _nodes(
    meeting: _bootstrap.Bootstrap, hello: dict[int, dict[str, Any]], settings: PeerSettings
) -> list[list[int]]:
    """[groups side by side][ranks] the node of each; the same list, or the same error, on every process.

    Raises:
      ValueError: ranks are not on nodes as exchanges between nodes need them, or not asked for as they do.
    """
    try:
        nodes = []
        for side_by_side in settings.devices.T:
            hosts = [hello[device.process_index]["host"] for device in side_by_side]
            nodes.append(_nvshmem.node_of_rank(settings.num_ranks, settings.node_size, hosts))
    except ValueError:
        meeting.let_all_hear("hello")
        raise
    if settings.zero_copy == "off" and _spans_nodes(nodes):
        # Within a node ranks read and write each other's rows in place: without that, a node is one rank.
        return [list(range(settings.num_ranks)) for _ in nodes]
    return nodes


def _spans_nodes(nodes: list[list[int]]) -> bool:
    return any(len(set(group)) > 1 for group in nodes)


def _node_processes(settings: PeerSettings, place: _Place, nodes: list[list[int]]) -> set[int]:
    """The processes of this rank's node: descriptors of memory go no further than a host."""
    own = nodes[place.subgroup]
    return {
        device.process_index
        for device, node in zip(settings.devices[:, place.subgroup], own, strict=True)
        if node == own[place.rank]
    }


def _check_regions(
    meeting: _bootstrap.Bootstrap, memory: dict[int, dict[str, Any]], nodes: list[list[int]]
) -> None:
    """Over several nodes, forwarders use the buffers of their node's ranks where they are.

    Raises:
      _bootstrap.UnavailableError: a rank's memory cannot be mapped; on every process.
    """
    for record in memory.values():
        for rank in record["ranks"]:
            group = nodes[rank["subgroup"]]
            alone = group.count(group[rank["rank"]]) == 1
            if _spans_nodes([group]) and not alone and not rank["regions"]:
                meeting.let_all_hear("memory")
                raise _bootstrap.UnavailableError(
                    f"the group is over several nodes, and JAX's memory of rank {rank['rank']} cannot be mapped by the "
                    "other ranks of its node; leave XLA_PYTHON_CLIENT_ALLOCATOR at its default, or set "
                    "zero_copy='off', with which a token crosses once to each rank in place of each node"
                )


def _join_nvshmem(
    meeting: _bootstrap.Bootstrap,
    hello: dict[int, dict[str, Any]],
    settings: PeerSettings,
    places: Sequence[_Place],
    num_sms: int,
    nodes: list[list[int]],
) -> _nvshmem.Arena:
    """This process's arena in NVSHMEM's memory."""
    obstacle = _nvshmem.obstacle()
    if obstacle is None and len(places) != 1:
        obstacle = f"NVSHMEM needs one process for each GPU, got one with {len(places)}"
    records = meeting.all_gather("nvshmem", {"error": obstacle})
    _bootstrap.raise_first_error(records)
    place = places[0]
    _nvshmem.start(meeting, place.device.local_hardware_id, [record["host"] for record in hello.values()])
    arena, error = None, None
    try:
        pes = [
            meeting.processes.index(device.process_index) for device in settings.devices[:, place.subgroup]
        ]
        arena = _nvshmem.make_arena(
            place.rank,
            nodes[place.subgroup],
            nodes,
            pes,
            place.device.local_hardware_id,
            _sizes(settings, num_sms),
        )
    except RuntimeError as caught:
        error = str(caught)
    _bootstrap.raise_first_error(meeting.all_gather("nvshmem arena", {"error": error}))
    assert arena is not None  # otherwise an error, above
    return arena


def _allocate(
    module: ModuleType,
    settings: PeerSettings,
    place: _Place,
    num_sms: int,
    spans_processes: bool,
    arena: _nvshmem.Arena | None,
) -> Any:
    # A live buffer tells which allocation XLA's buffers come from.
    buffer = jax.device_put(np.zeros(1024, np.float32), place.device)
    rank = module.make_peer_group(
        device=place.device.local_hardware_id,
        rank=place.rank,
        num_ranks=settings.num_ranks,
        **_sizes(settings, num_sms),
        spans_processes=spans_processes,
        buffer_addresses=[buffer.unsafe_buffer_pointer()],
        arena_address=0 if arena is None else arena.address,
    )
    if arena is not None:
        for peer, (address, mirrored) in enumerate(zip(arena.addresses, arena.mirrored, strict=True)):
            rank.set_arena(peer, address, mirrored)
    return rank


def _map_peers(
    meeting: _bootstrap.Bootstrap,
    places: Sequence[_Place],
    ranks: Sequence[Any],
    memory: dict[int, dict[str, Any]],
    arena: _nvshmem.Arena | None,
) -> None:
    """Maps the ranks that meet for every rank of this process; `arena`: another transport has the arenas."""
    received: dict[int, list[int]] = {}
    own = [rank.take_descriptors() for rank in ranks]
    try:
        if len(meeting.processes) > 1:
            received = meeting.all_gather_descriptors([number for numbers in own for number in numbers])
        for place, rank in zip(places, ranks, strict=True):
            for other_place, other in zip(places, ranks, strict=True):
                if other is not rank and other_place.subgroup == place.subgroup:
                    rank.map_local_peer(other)
            for process, numbers in received.items():
                at = 0
                for peer in memory[process]["ranks"]:
                    count = len(peer["regions"]) + (arena is None)
                    if peer["subgroup"] == place.subgroup:
                        regions = [tuple(region) for region in peer["regions"]]
                        rank.map_peer(peer["rank"], tuple(peer["arena"]), regions, numbers[at : at + count])
                    at += count
            rank.finish()
    finally:
        _bootstrap.close_descriptors(dict(enumerate(own)))
        _bootstrap.close_descriptors(received)
