"""Checkpoints of a training run: model, optimiser and settings, kept by orbax.

Every process writes and reads the shards of its own devices, so the folder must be one that all of them see. What is
read is laid out as the model is now, whatever processes and devices wrote it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils


class Checkpoints:
    """The checkpoints in a folder; the newest one counts. A context manager, which waits for the last save.

    Args:
      folder: made if it is missing.
      fresh: whether to remove what is there.
    """

    def __init__(self, folder: Path, *, fresh: bool = False):
        self.folder = folder.resolve()
        if fresh:
            if jax.process_index() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            multihost_utils.sync_global_devices("removed checkpoints")
        self._manager = ocp.CheckpointManager(
            self.folder,
            # What a killed run left half written goes.
            options=ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other processes may not come: waiting for them would hide it.
        if error is None:
            self._manager.close()

    def step(self) -> int | None:
        """Steps that the newest checkpoint's run had done, or None where there is no checkpoint."""
        return self._manager.latest_step()

    def save(self, model: nnx.Module, optimizer: nnx.Optimizer, step: int, settings: dict[str, Any]) -> None:
        """Saves the state after `step` steps; `settings` as JSON takes them.

        Returns as soon as the arrays are copied to the host, and writes while training goes on. A checkpoint counts
        once it is written whole. Waits for the save before.
        """
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(_pure(model)),
            optimizer=ocp.args.StandardSave(_pure(optimizer)),
            settings=ocp.args.JsonSave(settings),
        )
        self._manager.save(step, args=args)

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

    def restore(self, model: nnx.Module, optimizer: nnx.Optimizer | None = None) -> None:
        """Fills the model, and the optimiser if given, from the newest checkpoint, laid out as they are now."""
        wanted = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
        args = {name: ocp.args.StandardRestore(_abstract(module)) for name, module in wanted.items()}
        found = self._read(**args)
        for name, module in wanted.items():
            state = nnx.state(module)
            nnx.replace_by_pure_dict(state, found[name])
            nnx.update(module, state)

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
