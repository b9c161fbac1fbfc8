"""A progress bar of training on a terminal; lines now and then where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm.checkpoint import History

_LINE_EVERY = 25


class TrainingProgress:
    """Shows step, loss, held-out loss, tokens a second and dropped selections; a context manager.

    Args:
      console: where to show it.
      steps: steps in all.
      history: the run's, which the caller adds to.
    """

    def __init__(self, console: Console, steps: int, history: History):
        self._console = console
        self._steps = steps
        self._history = history
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=history.steps, numbers="compiling")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, tokens_per_s: float) -> None:
        """Shows the history's last step."""
        history = self._history
        numbers = (
            f"loss {history.loss[-1]:.2f}  held out {history.held_out[-1][1]:.2f}  "
            f"{tokens_per_s:,.0f} tokens/s  dropped {history.dropped[-1]}"
        )
        self._bar.update(self._task, completed=history.steps, numbers=numbers)
        if not self._console.is_terminal and (
            history.steps % _LINE_EVERY == 0 or history.steps == self._steps
        ):
            self._console.print(f"step {history.steps}/{self._steps}  {numbers}", highlight=False)
