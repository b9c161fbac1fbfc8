"""ExpertGroup: which devices exchange tokens, in which order, over which transport."""

from __future__ import annotations

import dataclasses
import os
import warnings
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np

from jax_wideep import _bootstrap, _ffi, _host_transport, _masking, _peer_transport
from jax_wideep._peer_transport import CombineForm, DispatchForm, Transport

# Thirty years; the clock counts nanoseconds in 64 bits.
_LONGEST_DEADLINE_S = 1e9

Backend = Literal["auto", "cuda", "cpu", "xla"]
ZeroCopy = Literal["auto", "off"]


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertGroup:
    """The ranks that share a layer's experts, and the transport between them.

    Made once, outside of tracing, and closed over by the functions that exchange tokens; hashable by
    identity, so it can also be a static argument. A context manager: leaving it closes the transport.

    Where the mesh has further axes, there are several groups side by side, one for each position on those
    axes; they exchange separately.

    Attributes:
      mesh: the mesh that `jax.shard_map` runs over; None takes the one given to `jax.set_mesh`.
      axis: mesh axes whose product is the group, in rank order (first axis major), as a tuple.
      num_experts: experts over all ranks; a multiple of `num_ranks`. Rank r hosts experts
        [r * local_experts, (r + 1) * local_experts).
      top_k: experts per token.
      hidden: hidden size, a multiple of 8 (of 128 for an FP8 wire).
      backend: "cpu" (compiled, ranks are CPU devices of this process or of several processes of one host, which
        share memory), "cuda" (compiled, GPUs), "xla" (JAX collectives only; any devices, any number of hosts), or
        "auto": the compiled one for the mesh's devices where it is built, otherwise "xla", with a warning. After
        construction: the one chosen.
      chunk: most tokens per rank and call in the low-latency shape.
      deadline_s: seconds after which a rank that has not come is reported as missing.
      num_sms: on the backend "cuda": SMs that an exchange uses on each rank; even, at least 2. None: 32, or
        fewer where ranks share a GPU, so that two exchanges of each fit; all of its GPU for a group of one rank.
        After construction: the number chosen.
      zero_copy: on the backend "cuda": "auto" moves rows between XLA's own buffers where peers can map them;
        "off" sends everything through fixed-size rings, with the same results; over several nodes each rank is then a
        node of its own, to which a token crosses once, and combine rounds each rank's sum.
      dispatch_form: on the backend "cuda": "push" has senders write every row to its place, "pull" has receivers
        read each token once and copy it to all its rows there. The results are the same bits. "auto": push where
        ranks share a GPU, or where a token's experts are mostly on different ranks (top_k at most 1.25 times the
        ranks that a token reaches in the mean, R * (1 - (1 - 1/R) ** top_k)); otherwise pull, which sends least.
      combine_form: likewise: "pull" has home ranks read and sum every row; "push" has the experts' ranks sum first
        and send one row per token and rank through the rings, which rounds those partial sums to the rows' dtype;
        "reduce" has them sum first into scratch memory, as large as `y`, from which the home ranks read: the same
        bytes between ranks without the rings, for GPUs of their own. Its rounding is push's; a row that is alone at
        its rank, or at home, is not rounded. "auto": pull where dispatch's is push, otherwise reduce.
      transport: on the backend "cuda": "peer" has GPUs of one host map each other's memory; "nvshmem" takes NVSHMEM's
        memory, which reaches other hosts too (one process for each GPU; `pip install nvidia-nvshmem-cu13`, and a build
        with it). Over several nodes a token crosses once to each node that hosts experts of it, in the one way there
        is: the forms do not count; combine sums by node, then rank, then k, with one rounding for each row that
        crosses. "auto" is nvshmem where the mesh spans hosts, and otherwise peer.
      node_size: with NVSHMEM: ranks of a node, consecutive ones, which use each other's memory directly; between
        nodes rows go by NVSHMEM's puts. None: the ranks of a host. Fewer than those make virtual nodes of a host,
        between which stores do what puts do.

    The backend "cuda" needs GPUs of compute capability 9.0, NVSHMEM on several hosts, at most 16 ranks, and peers that
    reach each other's memory. It maps the allocation that JAX's buffers come from, so leave JAX's memory preallocated
    (XLA_PYTHON_CLIENT_PREALLOCATE): buffers elsewhere travel through the rings, and over several nodes make the
    exchange fail.

    Making a group whose mesh spans processes is collective: all of them make the same groups in the same order, with
    the same settings, versions and build. They wait for each other for `deadline_s` (at least 5 s, at most 120 s; 120
    s on the backend "cuda").

    Raises:
      ValueError: naming the argument, what was expected and what to do.
    """

    mesh: jax.sharding.Mesh = None  # type: ignore[assignment]  # None only until __post_init__
    axis: str | tuple[str, ...] = "expert"
    num_experts: int = dataclasses.field(kw_only=True)
    top_k: int = dataclasses.field(kw_only=True)
    hidden: int = dataclasses.field(kw_only=True)
    backend: Backend = dataclasses.field(default="auto", kw_only=True)
    chunk: int = dataclasses.field(default=128, kw_only=True)
    deadline_s: float = dataclasses.field(default=30.0, kw_only=True)
    num_sms: int | None = dataclasses.field(default=None, kw_only=True)
    zero_copy: ZeroCopy = dataclasses.field(default="auto", kw_only=True)
    dispatch_form: DispatchForm = dataclasses.field(default="auto", kw_only=True)
    combine_form: CombineForm = dataclasses.field(default="auto", kw_only=True)
    transport: Transport = dataclasses.field(default="auto", kw_only=True)
    node_size: int | None = dataclasses.field(default=None, kw_only=True)
    _transport: _host_transport.HostTransport | _peer_transport.PeerTransport | _NoTransport = (
        dataclasses.field(init=False, repr=False)
    )
    _masked: tuple[int, ...] = dataclasses.field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        axis = (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)
        mesh = self.mesh if self.mesh is not None else _ffi.current_mesh()
        if mesh is None:
            raise ValueError(
                "ExpertGroup: mesh: expected a jax.sharding.Mesh, got None and jax.set_mesh was not called; "
                "pass mesh=jax.make_mesh(...)"
            )
        if not isinstance(mesh, jax.sharding.Mesh):
            raise ValueError(
                f"ExpertGroup: mesh: expected a jax.sharding.Mesh, which has devices, got {type(mesh).__name__}; "
                "pass mesh=jax.make_mesh(...)"
            )
        _check_settings(self, mesh, axis)
        set_field = object.__setattr__
        set_field(self, "mesh", mesh)
        set_field(self, "axis", axis)
        backend, transport = _open_transport(self)
        set_field(self, "backend", backend)
        set_field(self, "_transport", transport)
        if isinstance(transport, _peer_transport.PeerTransport):
            for name in ("num_sms", "dispatch_form", "combine_form"):
                set_field(self, name, getattr(transport, name))
        # A group that is dropped without close() frees its transport all the same.
        set_field(self, "_finalizer", weakref.finalize(self, self._transport.close))

    # ---- sizes ----

    @property
    def num_ranks(self) -> int:
        """Ranks of one group (R)."""
        shape = self.mesh.shape
        return int(np.prod([shape[name] for name in self.axis]))

    @property
    def local_experts(self) -> int:
        """Experts that each rank hosts, num_experts / num_ranks."""
        return self.num_experts // self.num_ranks

    # ---- lifetime ----

    def close(self) -> None:
        """Frees the transport. Exchanges that have not run yet fail, and so does every later one.

        JAX runs asynchronously: wait for results (`jax.block_until_ready`) before closing. On the backend "cuda" it
        waits for this process's GPUs; do not call what was compiled for the group afterwards, since a captured
        command buffer replays without asking whether the group is open.
        """
        self._transport.close()

    def check(self) -> None:
        """Raises the error of a rank that gave up, on every rank; on the backend "cuda" only.

        A kernel cannot raise: when a rank waits past the deadline, all ranks end the exchange with unspecified
        results, and the next exchange on the group raises. Where there may be no next one, or exchanges are replayed
        from a command buffer, call this once the results are ready (`jax.block_until_ready`). A group that failed
        stays so: close it and make a new one, or call `mask_ranks`, which forgets the failure.

        Raises:
          jax.errors.JaxRuntimeError: naming the op, the rank that gave up and the one it waited for.
        """
        error = self._transport.error()
        if error is not None:
            raise jax.errors.JaxRuntimeError(error)

    @property
    def closed(self) -> bool:
        return self._transport.closed

    # ---- masked ranks ----

    @property
    def masked_ranks(self) -> tuple[int, ...]:
        """The ranks that are left out."""
        return self._masked

    def mask_ranks(self, ranks: Iterable[int]) -> None:
        """Leaves out `ranks` from now on, and takes back all others; `mask_ranks([])` takes back everybody.

        Called outside of tracing and between steps: results are ready (`jax.block_until_ready`). The other ranks'
        memory stays as it is, and compiled functions go on without being compiled again. A selection of an expert
        on a masked rank is dropped: it has no row, its gate weight gets a zero gradient, and it counts in
        `overflow` at home, under overflow="error" too. The weights of a token's other experts stay as they are;
        nothing is renormalised. `tokens_per_expert` counts what the ranks that are left selected, on whatever rank.
        Nobody waits for a masked rank, or reads or writes its memory; where it runs the program all the same, its
        exchanges end at once, with an empty plan, no rows and zeros.

        Across processes this is collective: all that hold a rank which is not masked call it, with the same ranks.
        So they do after a failure, once their step has raised, and may go on: the group forgets the failure. A
        process that was only left out comes back when all, itself too, take its ranks back; one that has ended
        cannot. Where groups lie side by side on a mesh, the ranks are masked in all of them. JAX's own collectives
        know nothing of masks: a program that goes on without a process must do without them, and without a layer's
        statistics.

        Redo a step that failed from its beginning: what a group received before a change (`Received`, residuals of
        low-latency ops, halves under way) does not go with what it does afterwards. A DispatchPlan does: its
        selections of masked ranks are dropped, and rows from masked ranks are zero.

        Raises:
          ValueError: no such rank, no rank left, the backend "xla" (whose collectives wait for every rank), a closed
            group, or different ranks on different processes.
          RuntimeError: a process did not come; nothing has changed then.
        """
        masked = tuple(sorted(set(ranks)))
        if self.closed:
            raise ValueError("ExpertGroup.mask_ranks: expected an open group, got one that was closed")
        for rank in masked:
            if not isinstance(rank, (int, np.integer)) or not 0 <= rank < self.num_ranks:
                raise ValueError(
                    f"ExpertGroup.mask_ranks: ranks: expected ranks in [0, {self.num_ranks}), got {rank!r}"
                )
        if len(masked) == self.num_ranks:
            raise ValueError(
                f"ExpertGroup.mask_ranks: ranks: expected at least one of {self.num_ranks} to be left, got {masked}"
            )
        if isinstance(self._transport, _NoTransport):
            raise ValueError(
                "ExpertGroup.mask_ranks: expected a compiled backend, got backend='xla', whose collectives wait for "
                "every rank; mask selections with -1 in topk_idx instead"
            )
        masked = tuple(int(rank) for rank in masked)
        _masking.change(self._transport, _devices_by_rank(self), masked, self.deadline_s)
        object.__setattr__(self, "_masked", masked)

    def __enter__(self) -> ExpertGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def handle(self) -> int:
        """The number under which the compiled backend knows this group."""
        return self._transport.handle

    # ---- use inside shard_map ----

    def is_manual(self) -> bool:
        """Whether the code being traced runs inside a shard_map over all of the group's axes."""
        return set(self.axis) <= set(_ffi.manual_axes())

    def check_inside_shard_map(self, op: str) -> None:
        """Raises ValueError unless `op` is being traced where the group's ranks are separate."""
        if self.closed:
            raise ValueError(
                f"{op}: group: expected an open ExpertGroup, got one that was closed; keep it open (leave its "
                "`with` block, or call close()) only after the last function that uses it has run"
            )
        manual = _ffi.manual_axes()
        missing = [name for name in self.axis if name not in manual]
        if missing:
            raise ValueError(
                f"{op}: expected to be called inside jax.shard_map over mesh axes {self.axis}, got manual axes "
                f"{tuple(manual)}; wrap the caller in jax.shard_map(..., mesh=group.mesh)"
            )
        automatic = {name: size for name, size in _ffi.automatic_axes().items() if size > 1}
        if automatic:
            raise ValueError(
                f"{op}: expected every mesh axis to be manual, got axes {automatic} left to the partitioner, which "
                "cannot split an exchange; do not pass axis_names to jax.shard_map, or list all axes there"
            )
        for name in self.axis:
            if manual[name] != self.mesh.shape[name]:
                raise ValueError(
                    f"{op}: expected mesh axis {name!r} of size {self.mesh.shape[name]} as in the group's mesh, "
                    f"got {manual[name]}; build the ExpertGroup from the mesh that shard_map uses"
                )


def use_cpu_devices(num_devices: int) -> None:
    """Makes JAX's CPU backend show `num_devices` devices, with threads enough for their collectives.

    Call it before anything that starts a backend (`jax.devices()`, an array, a group).

    Raises:
      RuntimeError: a backend is already running, with another number of devices or too few threads.
    """
    threads = 2 * num_devices
    if _ffi.backend_started():
        devices = len(jax.local_devices(backend="cpu"))
        if devices != num_devices or (
            _ffi.cpu_thread_limit_applies() and _ffi.cpu_client_threads() < threads
        ):
            raise RuntimeError(
                f"use_cpu_devices: expected to be called before JAX starts a backend, got one that runs {devices} "
                f"CPU devices on {_ffi.cpu_client_threads()} threads; call use_cpu_devices({num_devices}) first "
                "thing in the program"
            )
        return
    os.environ["NPROC"] = str(max(threads, _ffi.cpu_client_threads()))
    jax.config.update("jax_num_cpu_devices", num_devices)


class _NoTransport:
    """What a group on the backend "xla" owns: nothing but whether it is open."""

    handle = 0

    def __init__(self) -> None:
        self.closed = False

    def error(self) -> str | None:
        return None

    def close(self) -> None:
        self.closed = True


_Transport = _host_transport.HostTransport | _peer_transport.PeerTransport | _NoTransport


def _open_transport(group: ExpertGroup) -> tuple[Backend, _Transport]:
    """The backend for the group's mesh and what it owns there."""
    backend = _choose_backend(group.backend, group.mesh)
    devices = _devices_by_rank(group)
    if _spans_processes(group.mesh) and {device.platform for device in devices.flat} == {"cpu"}:
        return _open_across_processes(group, devices)
    if backend == "cpu":
        return backend, _host_transport.open_local(group.num_ranks, group.deadline_s, devices)
    if backend != "cuda":
        return backend, _NoTransport()
    try:
        return backend, _peer_transport.connect(_settings(_peer_transport.PeerSettings, group, devices))
    except _bootstrap.UnavailableError as error:
        if group.backend == "cuda" or group.transport == "nvshmem":
            raise ValueError(
                f"ExpertGroup: backend: 'cuda' cannot run on this mesh: {error}; use backend='auto' or 'xla'"
            ) from error
        warnings.warn(
            f"jax_wideep: GPUs exchange through JAX collectives (backend='xla'), since {error}", stacklevel=4
        )
    return "xla", _NoTransport()


def _open_across_processes(group: ExpertGroup, devices: np.ndarray) -> tuple[Backend, _Transport]:
    """Of a mesh of CPU devices of several processes: shared memory if all are on one host."""
    try:
        transport = _host_transport.connect(_settings(_host_transport.HostSettings, group, devices))
        return ("xla", _NoTransport()) if transport is None else ("cpu", transport)
    except _bootstrap.UnavailableError as error:
        if group.backend == "cpu":
            raise ValueError(
                f"ExpertGroup: backend: 'cpu' cannot run on this mesh: {error}; use backend='auto' or 'xla'"
            ) from error
        warnings.warn(
            f"jax_wideep: CPU devices exchange through JAX collectives (backend='xla'), since {error}",
            stacklevel=5,
        )
    return "xla", _NoTransport()


def _settings(kind: Any, group: ExpertGroup, devices: np.ndarray) -> Any:
    """A transport's settings: the fields of the group that it asks for."""
    names = [field.name for field in dataclasses.fields(kind) if field.name != "devices"]
    values = {name: getattr(group, name) for name in names}
    return kind(
        devices=devices, **{name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()}
    )


def _devices_by_rank(group: ExpertGroup) -> np.ndarray:
    """The mesh's devices, [ranks, groups side by side]."""
    mesh, axis = group.mesh, group.axis
    positions = [mesh.axis_names.index(name) for name in axis]
    return np.moveaxis(mesh.devices, positions, range(len(positions))).reshape(group.num_ranks, -1)


def _check_settings(group: ExpertGroup, mesh: jax.sharding.Mesh, axis: tuple[str, ...]) -> None:
    for name in axis:
        if name not in mesh.axis_names:
            raise ValueError(
                f"ExpertGroup: axis: expected names among the mesh axes {mesh.axis_names}, got {name!r}; make the "
                f"mesh with that axis or pass axis={mesh.axis_names!r}"
            )
    if not axis or len(set(axis)) != len(axis):
        raise ValueError(f"ExpertGroup: axis: expected one or more distinct mesh axes, got {axis}")
    for name, minimum in (("num_experts", 1), ("top_k", 1), ("hidden", 8), ("chunk", 1)):
        value = getattr(group, name)
        if not isinstance(value, (int, np.integer)) or value < minimum:
            raise ValueError(f"ExpertGroup: {name}: expected an int of at least {minimum}, got {value!r}")
    num_ranks = int(np.prod([mesh.shape[name] for name in axis]))
    if group.num_experts % num_ranks:
        raise ValueError(
            f"ExpertGroup: num_experts: expected a multiple of the {num_ranks} ranks of axis {axis}, got "
            f"{group.num_experts}; use {-(-group.num_experts // num_ranks) * num_ranks} experts or other mesh axes"
        )
    if group.top_k > min(group.num_experts, 64):
        raise ValueError(
            f"ExpertGroup: top_k: expected at most num_experts={group.num_experts} (and 64), got {group.top_k}"
        )
    if group.hidden % 8:
        raise ValueError(f"ExpertGroup: hidden: expected a multiple of 8, got {group.hidden}; pad the rows")
    if not 0.001 <= group.deadline_s <= _LONGEST_DEADLINE_S:
        raise ValueError(
            f"ExpertGroup: deadline_s: expected a number of seconds between 0.001 and {_LONGEST_DEADLINE_S:.0e}, got "
            f"{group.deadline_s!r}"
        )
    if group.num_sms is not None and (group.num_sms < 2 or group.num_sms % 2):
        raise ValueError(
            f"ExpertGroup: num_sms: expected None or an even number of at least 2, got {group.num_sms!r}: half of the "
            "SMs send and half receive where rows travel through rings"
        )
    for name, known in (
        ("zero_copy", ("auto", "off")),
        ("dispatch_form", ("auto", "push", "pull")),
        ("combine_form", ("auto", "pull", "push", "reduce")),
        ("transport", ("auto", "peer", "nvshmem")),
    ):
        if getattr(group, name) not in known:
            raise ValueError(f"ExpertGroup: {name}: expected one of {known}, got {getattr(group, name)!r}")
    if group.node_size is not None and (not isinstance(group.node_size, int) or group.node_size < 1):
        raise ValueError(
            f"ExpertGroup: node_size: expected None or an int of at least 1, got {group.node_size!r}"
        )


def _choose_backend(asked: str, mesh: jax.sharding.Mesh) -> Backend:
    if asked not in ("auto", "cuda", "cpu", "xla"):
        raise ValueError(f"ExpertGroup: backend: expected 'auto', 'cuda', 'cpu' or 'xla', got {asked!r}")
    platforms = {device.platform for device in mesh.devices.flat}
    if asked == "xla":
        return "xla"
    if asked == "cuda" and platforms != {"gpu"}:
        raise ValueError(
            f"ExpertGroup: backend: 'cuda' needs a mesh of GPUs, got {sorted(platforms)}; use backend='auto', or a "
            "mesh of jax.devices('cuda')"
        )
    if asked in ("auto", "cuda") and platforms == {"gpu"}:
        return "cuda"  # if its transport can be made
    built = _ffi.cpu_module() is not None
    if asked == "cpu":
        if platforms != {"cpu"}:
            raise ValueError(
                f"ExpertGroup: backend: 'cpu' needs a mesh of CPU devices, got {sorted(platforms)}; use "
                "backend='auto', or a mesh of jax.devices('cpu')"
            )
        if not built:
            raise ValueError(
                "ExpertGroup: backend: 'cpu' is not built into this installation (no module _wideep_cpu); run "
                "`pip install .` with a C++17 compiler, or use backend='xla'"
            )
    elif platforms != {"cpu"}:
        return "xla"
    elif not built:
        warnings.warn(
            "jax_wideep: the compiled CPU backend is not built; using JAX collectives (backend='xla')",
            stacklevel=4,
        )
        return "xla"
    _check_cpu_threads(mesh)
    return "cpu"


def _spans_processes(mesh: jax.sharding.Mesh) -> bool:
    return len({device.process_index for device in mesh.devices.flat}) > 1


def _check_cpu_threads(mesh: jax.sharding.Mesh) -> None:
    """XLA's CPU collectives, which run beside ours, can hang below two threads a device (jaxlib < 0.12)."""
    num_devices = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    needed = 2 * num_devices
    threads = _ffi.cpu_client_threads()
    if _ffi.cpu_thread_limit_applies() and threads < needed:
        raise ValueError(
            f"ExpertGroup: NPROC: expected at least {needed} threads for {num_devices} CPU devices on this "
            f"jaxlib, got {threads}; call jax_wideep.use_cpu_devices({num_devices}) before JAX starts, or "
            f"set NPROC={needed} in the environment"
        )
