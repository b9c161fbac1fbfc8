"""How the processes of a group change its mask: all that go on stop, meet, and begin again.

They meet through the key-value store of JAX's coordination service, which lives in process 0 unless the program
started it elsewhere. A process all of whose ranks are left out has nobody to meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jax_wideep import _bootstrap, _ffi

#: How long processes wait for each other. One that waits for a rank that is gone comes only after the deadline.
MEETING_TIMEOUT_S = 120.0


class Maskable(Protocol):
    """What a transport does to change its mask."""

    def wait(self) -> None:
        """Until no exchange of this process is under way."""

    def mask(self, ranks: Sequence[int]) -> None:
        """Leaves out `ranks`, takes back all others, and forgets errors."""


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
    meeting = _bootstrap.Bootstrap(
        sorted(going_on), process, _ffi.coordination_client(), MEETING_TIMEOUT_S + deadline_s
    )
    stopped = _all_gather(meeting, "mask", {"ranks": list(masked)})
    difference = _bootstrap.first_difference(stopped)
    if difference is not None:
        raise ValueError(f"mask_ranks: expected the same ranks on every process, got {difference}")
    error = None
    try:
        transport.mask(masked)
    except RuntimeError as caught:
        error = str(caught)
    # Nobody begins an exchange before everybody has changed the mask.
    for other, record in sorted(_all_gather(meeting, "masked", {"error": error}).items()):
        if record["error"] is not None:
            raise RuntimeError(f"mask_ranks: process {other}: {record['error']}; close the group")


def _all_gather(meeting: _bootstrap.Bootstrap, step: str, record: dict[str, Any]) -> dict[int, Any]:
    gather: Callable[[str, Any], dict[int, Any]] = meeting.all_gather
    try:
        return gather(step, record)
    except _bootstrap.BootstrapError as error:
        raise RuntimeError(
            f"mask_ranks: {error}. Every process that holds a rank which is not masked must call mask_ranks with the "
            "same ranks; one that has ended cannot come back: mask its ranks too"
        ) from error
    except Exception as error:  # jaxlib's own type
        raise RuntimeError(
            f"mask_ranks: JAX's coordination service does not answer ({error}). It runs in process 0 unless it was "
            "started elsewhere: a job that has lost it must be started again"
        ) from error
