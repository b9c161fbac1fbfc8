"""Checkpoints of a training run: model, optimiser, settings and history, kept by orbax."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx


@dataclasses.dataclass
class History:
    """What a run saw so far, one entry a step unless it says otherwise.

    Attributes:
      loss: next-byte loss of each step's batch, nats a byte.
      dropped: selections dropped.
      tokens_per_expert: [layers][experts] selections.
      held_out: (steps done, held-out loss) pairs.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    dropped: list[int] = dataclasses.field(default_factory=list)
    tokens_per_expert: list[list[list[int]]] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.loss)


class Checkpoints:
    """The checkpoints in a folder; the newest one counts.

    Args:
      folder: made if it is missing.
      fresh: whether to remove what is there.
    """

    def __init__(self, folder: Path, *, fresh: bool = False):
        self.folder = folder.resolve()
        if fresh and self.folder.exists():
            shutil.rmtree(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def step(self) -> int | None:
        """Steps that the newest checkpoint's run had done, or None where there is no checkpoint."""
        return self._manager.latest_step()

    def save(
        self, model: nnx.Module, optimizer: nnx.Optimizer, history: History, settings: dict[str, Any]
    ) -> None:
        """Saves the run as of its last step; `settings` as JSON takes them."""
        if self.step() == history.steps:
            return
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(_pure(model)),
            optimizer=ocp.args.StandardSave(_pure(optimizer)),
            history=ocp.args.JsonSave(dataclasses.asdict(history)),
            settings=ocp.args.JsonSave(settings),
        )
        self._manager.save(history.steps, args=args)
        self._manager.wait_until_finished()

    def settings(self) -> dict[str, Any]:
        """The settings of the newest checkpoint."""
        return self._read(settings=ocp.args.JsonRestore())["settings"]

    def check_settings(self, wanted: dict[str, Any]) -> None:
        """Raises ValueError, naming what differs, unless the newest checkpoint has the settings `wanted`."""
        found = self.settings()
        different = [f"{name} = {found.get(name)!r}" for name in wanted if found.get(name) != wanted[name]]
        if different:
            raise ValueError(
                f"checkpoint: expected one with {wanted} in {self.folder}, got one with {', '.join(different)}; "
                "use its settings or another folder, or pass --fresh to remove it"
            )

    def restore(self, model: nnx.Module, optimizer: nnx.Optimizer | None = None) -> History:
        """Fills the model, and the optimiser if given, from the newest checkpoint, laid out as they are now."""
        wanted = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
        args = {name: ocp.args.StandardRestore(_abstract(module)) for name, module in wanted.items()}
        found = self._read(history=ocp.args.JsonRestore(), **args)
        for name, module in wanted.items():
            state = nnx.state(module)
            nnx.replace_by_pure_dict(state, found[name])
            nnx.update(module, state)
        return History(**found["history"])

    def _read(self, **args: Any) -> Any:
        step = self.step()
        if step is None:
            raise ValueError(
                f"checkpoint: expected a checkpoint in {self.folder}, found none; train one with "
                "examples/train_lm.py, or give another folder"
            )
        return self._manager.restore(step, args=ocp.args.Composite(**args))


def _pure(module: nnx.Module) -> dict[str, Any]:
    """The arrays of a module as nested dicts with keys that are strings."""
    return _string_keys(nnx.to_pure_dict(nnx.state(module)))


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree


def _abstract(module: nnx.Module) -> dict[str, Any]:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, _pure(module))
