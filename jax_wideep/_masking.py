"""How the processes of a group change its mask: all that go on stop, meet, and begin again.

They meet through the key-value store of JAX's coordination service, which lives in process 0 unless the program
started it elsewhere. A process all of whose ranks are left out has nobody to meet.

A meeting has a name that its first process makes up, and the others find. So one that comes to nothing, since a process
did not come, leaves nothing behind that a later one could take for its own.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jax_wideep import _bootstrap, _ffi

#: How long processes wait for each other, beside the group's deadline: whoever waits for a rank that is gone comes only
#: after that.
TIMEOUT_S = 120.0

_POLL_MS = 100

# Names of the meetings that a process has joined, which it does once: (process, name).
_joined: set[tuple[int, str]] = set()


class Maskable(Protocol):
    """What a transport does to change its mask."""

    def wait(self) -> None:
        """Until no exchange of this process is under way."""

    def mask(self, ranks: Sequence[int]) -> None:
        """Leaves out `ranks`, takes back all others, and forgets errors."""


class Store(Protocol):
    """The part of JAX's coordination client that is used."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


def change(transport: Maskable, devices: np.ndarray, masked: Sequence[int], deadline_s: float) -> None:
    """Masks `masked` on every process that holds one of the other ranks, which all call this.

    Args:
      transport: the group's.
      devices: [ranks, groups side by side], the mesh in rank order.
      masked: ranks to leave out, sorted.
      deadline_s: the group's.

    Raises:
      ValueError: the processes name different ranks.
      RuntimeError: a process did not come, or the change failed; nothing changes unless all have come.
    """
    transport.wait()
    process = jax.process_index()
    going_on = {d.process_index for rank, row in enumerate(devices) if rank not in masked for d in row}
    if process not in going_on or len(going_on) == 1:
        transport.mask(masked)
        return
    store = _ffi.coordination_client()
    change_together(transport, masked, sorted(going_on), process, store, TIMEOUT_S + deadline_s)


def change_together(
    transport: Maskable,
    masked: Sequence[int],
    processes: Sequence[int],
    process: int,
    store: Store | None,
    timeout_s: float,
) -> None:
    """`change` where several `processes` go on, of which this one is `process`."""
    if store is None:
        raise RuntimeError(
            "mask_ranks: jax.distributed.initialize was not called, but the mesh spans processes"
        )
    meeting = _Meeting(processes, process, store, timeout_s)
    difference = _bootstrap.first_difference(meeting.gather({"ranks": list(masked)}))
    if difference is not None:
        raise ValueError(f"mask_ranks: expected the same ranks on every process, got {difference}")
    error = None
    try:
        transport.mask(masked)
    except RuntimeError as caught:
        error = str(caught)
    # Nobody begins an exchange before everybody has changed the mask.
    for other, record in sorted(meeting.gather_again({"error": error}).items()):
        if record["error"] is not None:
            raise RuntimeError(f"mask_ranks: process {other}: {record['error']}; close the group")


class _Meeting:
    """The first of `processes` leads: it names the meeting, and says when all have come."""

    def __init__(self, processes: Sequence[int], process: int, store: Store, timeout_s: float):
        self._processes = processes
        self._process = process
        self._store = store
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._root = f"wideep/mask/{'-'.join(map(str, processes))}"
        self._name = ""  # in the store

    def gather(self, record: dict[str, Any]) -> dict[int, Any]:
        """Everyone's record by process, once all have come."""
        text = json.dumps(record)
        if self._process == self._processes[0]:
            self._name = f"{self._root}/{secrets.token_hex(8)}"
            self._set(f"{self._root}/now", self._name)
            self._set(f"{self._name}/{self._process}", text)
            records = {p: self._wait(f"{self._name}/{p}", p) for p in self._processes}
            self._set(f"{self._name}/all", json.dumps(records))
        else:
            records = json.loads(self._find_meeting(text))
        return {int(p): json.loads(text) for p, text in records.items()}

    def gather_again(self, record: dict[str, Any]) -> dict[int, Any]:
        """The same once more, among those that have met."""
        self._until = time.monotonic() + self._timeout_s
        self._set(f"{self._name}/again/{self._process}", json.dumps(record))
        return {p: json.loads(self._wait(f"{self._name}/again/{p}", p)) for p in self._processes}

    def _find_meeting(self, text: str) -> str:
        """Joins every new meeting that the leader names, until in one of them all have come."""
        leader = self._processes[0]
        while True:
            name = self._get(f"{self._root}/now")
            if name is not None and (self._process, name) not in _joined:
                _joined.add((self._process, name))
                self._name = name
                self._set(f"{name}/{self._process}", text)
            everyone = self._get(f"{name}/all") if name is not None and name == self._name else None
            if everyone is not None:
                return everyone
            self._check_time(leader)
            if name is not None and name != self._name:
                time.sleep(_POLL_MS / 1e3)  # one of before; reading it did not wait

    def _wait(self, key: str, process: int) -> str:
        while (value := self._get(key)) is None:
            self._check_time(process)
        return value

    def _check_time(self, process: int) -> None:
        if time.monotonic() > self._until:
            raise RuntimeError(
                f"mask_ranks: waited {self._timeout_s:g} s in vain for process {process}, or for one that it waits "
                "for. Every process that holds a rank which is not masked must call mask_ranks with the same ranks. "
                "One that has ended cannot come back: mask its ranks too"
            )

    def _get(self, key: str) -> str | None:
        """Its value, or None if there is none for a while."""
        try:
            return self._store.blocking_key_value_get(key, _POLL_MS)
        except Exception as error:  # jaxlib's own type, with the reason in its text only
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise _no_answer(error) from error

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.key_value_set(key, value, allow_overwrite=True)
        except Exception as error:
            raise _no_answer(error) from error


def _no_answer(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"mask_ranks: JAX's coordination service does not answer ({error}). It runs in process 0 unless it was started "
        "elsewhere: a job that has lost it must be started again"
    )
