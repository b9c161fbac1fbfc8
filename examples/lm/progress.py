"""A progress bar of training on a terminal; lines now and then where there is none."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY = 25


class TrainingProgress:
    """Shows step, loss, held-out loss, tokens a second and dropped selections; a context manager.

    Args:
      console: where to show it.
      steps: steps in all.
      done: steps that are done already.
    """

    def __init__(self, console: Console, steps: int, done: int):
        self._console = console
        self._steps = steps
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, numbers="compiling")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, record: dict[str, Any], held_out: float) -> None:
        """Shows a step's record as metrics.py describes it, and the last held-out loss."""
        done = record["step"]
        numbers = (
            f"loss {record['loss']:.2f}  held out {held_out:.2f}  lr {record['learning_rate']:.1e}  "
            f"{record['tokens_per_s']:,.0f} tokens/s  dropped {sum(layer['dropped'] for layer in record['layers'])}"
        )
        if record["mfu"] is not None:
            numbers += f"  MFU {record['mfu']:.1%}"
        self._bar.update(self._task, completed=done, numbers=numbers)
        if not self._console.is_terminal and (done % _LINE_EVERY == 0 or done == self._steps):
            self._console.print(f"step {done}/{self._steps}  {numbers}", highlight=False)
