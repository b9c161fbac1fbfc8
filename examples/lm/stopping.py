"""Ending a run between two steps: Ctrl-C, or SIGTERM as cluster managers send it before they take a machine away."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the signals, so that a step and a save are never cut in two; the second signal ends at once.

    A context manager.

    Args:
      mesh: of the run's devices. All their processes stop after the same step, whichever got the signal.
    """

    def __init__(self, mesh: Mesh):
        self._number = 0
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._number = number
        # Not through the console, which may be in the middle of printing.
        os.write(2, b"\nStopping after this step; once more to end without saving.\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def agreed(self) -> int:
        """The number of the signal that some process got, 0 for none; every process calls it after every step."""
        if self._sharding.is_fully_addressable:
            return self._number
        number = np.full(1, self._number, np.int32)
        shape = (self._sharding.mesh.size,)
        return int(self._largest(jax.make_array_from_callback(shape, self._sharding, lambda _: number)))
