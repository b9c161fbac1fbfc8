"""From layers whose experts are spread over ranks into Hugging Face checkpoints."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_wideep import _ffi
from jax_wideep.families import _safetensors, mapping
from jax_wideep.families.loading import progress_bar
from jax_wideep.families.presets import Preset

_BARRIER_TIMEOUT_MS = 600_000
_barriers = itertools.count()


def save_layers(
    folder: str | os.PathLike,
    layers: Mapping[int, Any],
    preset: Preset,
    *,
    prefix: str | None = None,
    dtype: Any = None,
    max_file_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> None:
    """Writes layers as a Hugging Face checkpoint: the family's names and layout, and an index if there are several
    files. Called by all processes, on a file system that they share; each writes the experts that it hosts.

    Files appear under their names when they are complete.

    Args:
      folder: is made if need be; must not hold a checkpoint yet.
      layers: by number in the model: a `jax_wideep.flax.MoE`, or its arrays by parameter name.
      preset: the model's family and sizes.
      prefix: as in load_layer.
      dtype: of the tensors, but for the selection bias, which stays float32; None is that of the layer's experts.
      max_file_bytes: a file that would be larger is divided.
      progress: shows a bar on process 0, which needs tqdm.

    Raises:
      ValueError: a layer's arrays are not the preset's, or split otherwise than by experts.
      FileExistsError: the folder holds a checkpoint.
    """
    op = "save_layers"
    folder = pathlib.Path(folder)
    for name in (_safetensors.INDEX, _safetensors.SINGLE):
        if (folder / name).exists():
            raise FileExistsError(f"{op}: folder: expected one without {name}, got {folder}; pass a new one")
    params = [
        param
        for number, layer in layers.items()
        for param in _params_of(
            op,
            layer,
            preset,
            mapping.prefixes(preset, number)[0] if prefix is None else prefix.format(number=number),
            dtype,
        )
    ]
    layout = _safetensors.lay_out(
        folder,
        {
            tensor: (param.dtype, pieces[0].shape)
            for param in params
            for tensor, pieces in param.tensors.items()
        },
        max_file_bytes,
    )
    first = jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for path, header in layout.headers.items():
            with open(_unfinished(path), "wb") as file:
                file.write(header)
                file.truncate(layout.sizes[path])
    _barrier()
    with progress_bar(sum(param.nbytes(layout) for param in params), "saving", progress) as advance:
        for param in params:
            param.save(layout, advance)
    _barrier()
    if first:
        for path in layout.headers:
            _unfinished(path).rename(path)
        if layout.index is not None:
            (folder / _safetensors.INDEX).write_text(layout.index, encoding="utf-8")
    _barrier()


class _Param:
    """A parameter to save, and the tensors that it makes up."""

    def __init__(
        self, array: Any, tensors: dict[str, list[mapping.Piece]], dtype: np.dtype, logical: np.ndarray | None
    ):
        self.array, self.tensors, self.dtype, self.logical = array, tensors, dtype, logical

    def _shards(self) -> Iterator[tuple[int, int, Any, int]]:
        """What this process writes, everything once over all processes: rows [start, stop) of the model's parameter,
        and the array that holds them, from which row on."""
        for start, stop, data in self._physical_shards():
            if self.logical is None:
                yield start, stop, data, 0
                continue
            for at in range(start, stop):
                expert = int(self.logical[at])
                if expert not in self.logical[:at]:  # replicas are alike
                    yield expert, expert + 1, data, at - start

    def _physical_shards(self) -> Iterator[tuple[int, int, Any]]:
        rows = self.array.shape[0]
        if not isinstance(self.array, jax.Array):
            if jax.process_index() == 0:
                yield 0, rows, self.array
            return
        for shard in self.array.addressable_shards:
            start, stop, _ = shard.index[0].indices(rows)
            if shard.replica_id == 0:
                yield start, stop, shard.data

    def nbytes(self, layout: _safetensors.Layout) -> int:
        """Bytes that `save` writes."""
        total = 0
        for start, stop, *_ in self._shards():
            for tensor, pieces in self.tensors.items():
                first, last = pieces[0].rows(start, stop) or (0, 0)
                total += (last - first) * layout.tensors[tensor].row_bytes
        return total

    def save(self, layout: _safetensors.Layout, advance: Callable[[int], Any]) -> None:
        for start, stop, data, at in self._shards():
            values = np.asarray(data)[at : at + stop - start]
            for name, pieces in self.tensors.items():
                span = pieces[0].rows(start, stop)
                if span is None:
                    continue
                tensor = layout.tensors[name]
                rows = np.empty((span[1] - span[0], *tensor.shape[1:]), self.dtype)
                for piece in pieces:
                    part = values if piece.expert is None else values[piece.expert - start]
                    mapping.copy(piece.of_tensor(rows), piece.of_parameter(part))
                _safetensors.write_rows(tensor, _unfinished(tensor.path), span[0], rows)
                advance(rows.nbytes)


def _params_of(op: str, layer: Any, preset: Preset, prefix: str, dtype: Any) -> list[_Param]:
    shapes = mapping.parameter_shapes(preset)
    logical = None
    if isinstance(layer, Mapping):
        arrays = dict(layer)
    else:
        arrays = {name: layer.parameter(name)[...] for name in mapping.parameter_shapes(layer.config)}
        if layer.places is not None:
            logical = np.asarray(layer.places.get().logical_of_physical)
            shapes |= {
                name: (len(logical), *shapes[name][1:]) for name in mapping.OF_EXPERTS if name in shapes
            }
    for name in (*shapes, *(set(arrays) - set(shapes))):
        expected, got = shapes.get(name), np.shape(arrays[name]) if name in arrays else None
        if expected is None or expected != got:
            raise ValueError(
                f"{op}: layers: expected {name!r} of shape {expected} under {prefix!r}, got {got}; is the preset that "
                "of the layer?"
            )
        if isinstance(arrays[name], jax.Array):
            part = arrays[name].sharding.shard_shape(expected)
            if part[1:] != expected[1:] or (name not in mapping.OF_EXPERTS and part != expected):
                raise ValueError(
                    f"{op}: layers: expected {name!r} split by experts or not at all, got parts of {list(part)}; "
                    "reshard it"
                )
    dtype = jnp.dtype(arrays["wi"].dtype if dtype is None else dtype)
    tensors: dict[str, dict[str, list[mapping.Piece]]] = {name: {} for name in shapes}
    for piece in mapping.pieces(preset):
        tensors[piece.param].setdefault(prefix + piece.tensor, []).append(piece)
    return [
        _Param(
            arrays[name],
            tensors[name],
            np.dtype(np.float32) if name in mapping.STORED_FLOAT32 else dtype,
            logical if name in mapping.OF_EXPERTS else None,
        )
        for name in shapes
    ]


def _unfinished(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".part")


def _barrier() -> None:
    """Until all processes have come. Host to host, so that it needs no collectives of the devices."""
    if jax.process_count() > 1:
        name = f"jax_wideep_save_layers_{next(_barriers)}"
        _ffi.coordination_client().wait_at_barrier(name, _BARRIER_TIMEOUT_MS)
