"""How the processes of a group meet while it is set up: small records and file descriptors from each to all.

Both transports between processes use it, for their settings, versions and builds to be equal, too.

Records go through the key-value store of JAX's coordination service; descriptors through a Unix socket, since all
processes that exchange them are on one host. Every step is collective: all processes call it, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import os
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

# Groups that this process has begun to make, by the processes that take part.
_meetings: Counter[tuple[int, ...]] = Counter()

#: How long processes wait for each other at the most while a group is made; it is the group's deadline, or what a
#: transport needs at the least, if that is less.
TIMEOUT_S = 120.0

_MAX_DESCRIPTORS = 250  # the kernel takes 253 a message
_HEADER = struct.Struct("!32sII")  # token, process, descriptors


class Store(Protocol):
    """The part of JAX's coordination client that is used."""

    def key_value_set(self, key: str, value: str) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class BootstrapError(RuntimeError):
    """A process did not come, or what came was not understood."""


class UnavailableError(Exception):
    """This mesh cannot use the transport; the same on every process."""


class _StrangerError(BootstrapError):
    """Whoever connected does not belong to the group."""


class Bootstrap:
    """One meeting of `processes`, of which this one is `process`.

    Attributes:
      name: the same in all of them, and used only once.
    """

    def __init__(self, processes: Sequence[int], process: int, store: Store | None, timeout_s: float):
        self.processes = tuple(sorted(processes))
        self.process = process
        self._store = store
        self._timeout_s = timeout_s
        _meetings[self.processes] += 1
        self.name = f"wideep/{'-'.join(map(str, self.processes))}/{_meetings[self.processes]}"

    def all_gather(self, step: str, record: Any) -> dict[int, Any]:
        """Everyone's `record` by process; records are what JSON can hold."""
        text = json.dumps(record)
        if self._store is not None and len(self.processes) > 1:
            self._store.key_value_set(f"{self.name}/{step}/{self.process}", text)
        deadline = time.monotonic() + self._timeout_s
        return {
            p: json.loads(text if p == self.process else self._get(step, p, deadline)) for p in self.processes
        }

    def _get(self, step: str, process: int, deadline: float) -> str:
        if self._store is None:
            raise BootstrapError("jax.distributed.initialize was not called, but the mesh spans processes")
        remaining_ms = max(1, int((deadline - time.monotonic()) * 1e3))
        try:
            return self._store.blocking_key_value_get(f"{self.name}/{step}/{process}", remaining_ms)
        except Exception as error:  # jaxlib's own type, with the reason in its text only
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise BootstrapError(
                f"process {process} did not come within {self._timeout_s:g} s (step {step!r} of {self.name}). All "
                f"processes of {self.processes} must make the same ExpertGroups in the same order"
            ) from error

    def let_all_hear(self, step: str) -> None:
        """Before an error that all processes raise: none ends while another has yet to read what was gathered.

        The coordination service ends with the process that runs it, and takes its clients along.
        """
        with contextlib.suppress(Exception):  # the error is worth more than the courtesy
            self.all_gather(f"{step} heard", None)

    def all_gather_descriptors(
        self, descriptors: Sequence[int] | Mapping[int, Sequence[int]]
    ) -> dict[int, list[int]]:
        """Every other process's descriptors by process, in the order it gave them. The caller closes them.

        `descriptors` go to all other processes; a mapping says which go to which process.

        Only processes of the same user take part: the socket's credentials are looked at, and a secret that went
        through the store is asked for.
        """
        others = [p for p in self.processes if p != self.process]
        given = descriptors if isinstance(descriptors, Mapping) else dict.fromkeys(others, descriptors)
        most = max((len(numbers) for numbers in given.values()), default=0)
        if most > _MAX_DESCRIPTORS:
            raise BootstrapError(f"expected at most {_MAX_DESCRIPTORS} descriptors, got {most}")
        received: dict[int, list[int]] = {}
        try:
            self._swap_descriptors(given, received)
        except BaseException:
            close_descriptors(received)
            raise
        return received

    def _swap_descriptors(self, given: Mapping[int, Sequence[int]], received: dict[int, list[int]]) -> None:
        """A connection for each pair of processes, made by the later one."""
        token = secrets.token_bytes(32)
        address = f"\0wideep-{secrets.token_hex(16)}"  # abstract: no file, gone with the process
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_new_socket(self._timeout_s))
            listener.bind(address)
            listener.listen(len(self.processes))
            hello = self.all_gather("descriptors", {"address": address[1:], "token": token.hex()})
            deadline = time.monotonic() + self._timeout_s

            waiting = {}
            for other in self.processes[: self.processes.index(self.process)]:
                peer = stack.enter_context(_new_socket(self._timeout_s))
                peer.connect("\0" + hello[other]["address"])
                _check_user(peer)
                # At once: it lies in the socket until the other process accepts, so nobody waits in a circle.
                _send(peer, bytes.fromhex(hello[other]["token"]), self.process, given[other])
                waiting[other] = peer
            later = set(self.processes[self.processes.index(self.process) + 1 :])
            while later:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer = stack.enter_context(listener.accept()[0])
                    peer.settimeout(self._timeout_s)
                    sender, came = _receive(peer, token)
                except _StrangerError:
                    peer.close()
                    continue
                except TimeoutError as error:
                    raise BootstrapError(
                        f"processes {sorted(later)} sent no descriptors within {self._timeout_s:g} s"
                    ) from error
                received.setdefault(sender, []).extend(came)
                if sender not in later:
                    raise BootstrapError(
                        f"expected descriptors of processes {sorted(later)}, got process {sender}'s"
                    )
                later.remove(sender)
                _send(peer, bytes.fromhex(hello[sender]["token"]), self.process, given[sender])
            for other, peer in waiting.items():
                sender, received[other] = _receive(peer, token)
                if sender != other:
                    raise BootstrapError(f"expected descriptors of process {other}, got process {sender}'s")


def timeout_s(deadline_s: float, shortest_s: float) -> float:
    """Of the meeting in which a group with this deadline is made."""
    return min(max(deadline_s, shortest_s), TIMEOUT_S)


def host_id() -> str:
    """The same in all processes that reach each other by Unix sockets: of one running host and network namespace.

    Abstract sockets belong to the network namespace, so containers with networks of their own are hosts of their own.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def versions() -> dict[str, str]:
    """Of what has to be the same in all processes."""

    def of(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            return "not installed"

    return {package: of(package) for package in ("jax", "jaxlib", "jax_wideep")}


def build_id(module: ModuleType) -> str:
    """A hash of a compiled module."""
    with open(str(module.__file__), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def agree(records: dict[int, dict[str, Any]], one_host: bool = True) -> None:
    """Compares what the processes say of themselves: "obstacle", "host", "settings".

    Raises:
      ValueError: settings differ.
      UnavailableError: a process has an obstacle, or, if `one_host`, they are on several hosts.
    """
    if all(record["settings"] for record in records.values()):
        agree_on_settings(records)
    for process, record in sorted(records.items()):
        if record["obstacle"] is not None:
            where = f" (process {process})" if len(records) > 1 else ""
            raise UnavailableError(record["obstacle"] + where)
    if one_host and len({record["host"] for record in records.values()}) > 1:
        raise UnavailableError("the mesh spans several hosts")


def agree_on_settings(records: dict[int, dict[str, Any]]) -> None:
    difference = first_difference({p: record["settings"] for p, record in records.items()})
    if difference is not None:
        raise ValueError(
            "ExpertGroup: expected the same settings, versions and build in all processes, got "
            f"{difference}; start all processes with the same program and installation"
        )


def raise_first_error(records: dict[int, dict[str, Any]]) -> None:
    for process, record in sorted(records.items()):
        if record["error"] is not None:
            raise UnavailableError(f"process {process}: {record['error']}")


def first_difference(records: dict[int, dict[str, Any]]) -> str | None:
    """Where the processes' settings differ, naming both sides; None if nowhere."""
    first = min(records)
    for process, settings in sorted(records.items()):
        for key in sorted(settings.keys() | records[first].keys()):
            ours, theirs = records[first].get(key), settings.get(key)
            if ours != theirs:
                return f"{key}: process {first} has {ours!r}, process {process} has {theirs!r}"
    return None


def close_descriptors(by_process: dict[int, list[int]]) -> None:
    for numbers in by_process.values():
        _close_all(numbers)


def _close_all(numbers: Sequence[int]) -> None:
    for number in numbers:
        os.close(number)


def _new_socket(timeout_s: float) -> socket.socket:
    new = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    new.settimeout(timeout_s)
    return new


def _check_user(peer: socket.socket) -> None:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise _StrangerError(f"a process of user {user} is at the other end, expected user {os.geteuid()}")


def _send(peer: socket.socket, token: bytes, process: int, descriptors: Sequence[int]) -> None:
    socket.send_fds(peer, [_HEADER.pack(token, process, len(descriptors))], list(descriptors))


def _receive(peer: socket.socket, token: bytes) -> tuple[int, list[int]]:
    """Process and descriptors of a message that carries this process's token."""
    _check_user(peer)
    message, numbers, flags, _ = socket.recv_fds(peer, _HEADER.size, _MAX_DESCRIPTORS)
    problem: BootstrapError | None = None
    if len(message) != _HEADER.size or not hmac.compare_digest(message[: len(token)], token):
        problem = _StrangerError("a message of descriptors does not belong to this group")
    else:
        _, process, count = _HEADER.unpack(message)
        if count != len(numbers) or flags & socket.MSG_CTRUNC:
            problem = BootstrapError(f"process {process} sent {count} descriptors, {len(numbers)} came")
    if problem is not None:
        _close_all(numbers)
        raise problem
    return process, list(numbers)
