"""What a run writes down about each step: JSON lines, and the same for TensorBoard.

`metrics.jsonl` is read by `python -m jax_wideep.report RUN` and by `read_history`. Its first line is `{"run": {..}}`,
the settings. Then one object a step; what is not known is left out:

    {"step": 1, "loss": 5.54, "learning_rate": 1.5e-4, "tokens_per_s": 9100.0, "step_s": 0.22, "mfu": 0.31,
     "held_out_loss": 5.5,
     "layers": [{"tokens_per_expert": [..], "rows_per_rank": [..], "dropped": 0, "spilled": 0}, ..]}

`step` counts the steps done, the loss is that of its batch before the update (nats a byte), `held_out_loss` that after
it. `rows_per_rank` are the selections of each rank's experts, those that were dropped included.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from jax_wideep.load import imbalance

FILE = "metrics.jsonl"


@dataclasses.dataclass
class History:
    """The lines of a run as lists, for figures.

    Attributes:
      loss: of each step's batch, nats a byte.
      tokens_per_expert: [steps][layers][experts] selections.
      held_out: (steps done, held-out loss) pairs.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    tokens_per_expert: list[list[list[int]]] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.loss)


def read_history(run: Path) -> History:
    """What the run in folder `run` wrote so far."""
    history = History()
    for record in _read_records(run / FILE):
        if "loss" in record:
            history.loss.append(record["loss"])
            history.tokens_per_expert.append([layer["tokens_per_expert"] for layer in record["layers"]])
        if "held_out_loss" in record:
            history.held_out.append((record["step"], record["held_out_loss"]))
    return history


class MetricsLog:
    """Writes the files; a context manager. Process 0 writes, in the others nothing happens.

    Args:
      run: folder, made if it is missing; None writes nothing.
      settings: of the run, for people and reports.
      step: steps done. Lines of later steps, which a run wrote after its last checkpoint, are removed.

    Attributes:
      first_held_out: the run's first held-out loss, if it is known here.
    """

    def __init__(self, run: Path | None, settings: dict[str, Any], step: int):
        self.first_held_out: float | None = None
        self._file, self._board = None, None
        if run is None or jax.process_index() != 0:
            return
        run.mkdir(parents=True, exist_ok=True)
        path = run / FILE
        kept = [record for record in _read_records(path) if step and record["step"] <= step]
        if kept:
            self.first_held_out = kept[0].get("held_out_loss")
        lines = [json.dumps(record) + "\n" for record in ({"run": settings}, *kept)]
        # Never half a file, should this process be killed here.
        aside = path.with_suffix(".part")
        aside.write_text("".join(lines))
        os.replace(aside, path)
        self._file = path.open("a", buffering=1)
        from tensorboardX import SummaryWriter  # here, since it imports PyTorch where that is installed

        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line; values that are None are left out."""
        if self._file is None or self._board is None:
            return
        record = {name: value for name, value in record.items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "layers", "replaced"):
                self._board.add_scalar(name, value, record["step"])
        for number, layer in enumerate(record.get("layers", [])):
            for unit in ("expert", "rank"):
                counts = layer["tokens_per_expert" if unit == "expert" else "rows_per_rank"]
                self._board.add_scalar(f"load/layer{number}/{unit}", float(imbalance(counts)), record["step"])
            for kind in ("dropped", "spilled"):
                if kind in layer:
                    self._board.add_scalar(f"{kind}/layer{number}", layer[kind], record["step"])


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of steps; the last one may be half written."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if "step" in record:
            records.append(record)
    return records
