"""From Hugging Face checkpoints into layers whose experts are spread over ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_wideep.families import _sources, mapping
from jax_wideep.families._safetensors import Checkpoint
from jax_wideep.families.presets import Preset
from jax_wideep.group import ExpertGroup
from jax_wideep.placement import Placement

Params = dict[str, jax.Array]


def load_layer(
    layer: Any,
    checkpoint: Checkpoint,
    preset: Preset,
    number: int,
    *,
    prefix: str | None = None,
    cast: bool = False,
    progress: bool = True,
) -> None:
    """Fills a `jax_wideep.flax.MoE` with the weights of one layer of a Hugging Face checkpoint.

    Each process reads the rows of the experts that its devices host, replicas included, and what is whole on every
    rank. A layer without a placement may be abstract (from `nnx.eval_shape`): then nothing is allocated before the
    weights are there.

    Args:
      layer: made with `preset.make_layer`, or with the same settings.
      checkpoint: the checkpoint.
      preset: the model's family and sizes.
      number: the layer's number in the model.
      prefix: what the names of the MoE block's tensors begin with, with `{number}` where the number stands; None is
        the family's own.
      cast: allows values to be rounded to the layer's dtypes.
      progress: shows a bar on process 0, which needs tqdm.

    Raises:
      ValueError: the layer's settings are not the preset's, it is abstract and has a placement, or a tensor is missing,
        truncated, of the wrong shape or of the wrong dtype; the message names it.
    """
    config = layer.config
    for name in (
        "hidden",
        "ffn",
        "router",
        "activation",
        "shared_ffn",
        "shared_gate",
        "use_bias",
        "weigh_input",
    ):
        expected, got = getattr(preset, name), getattr(config, name)
        if name == "router":  # noise is added in training only
            got = dataclasses.replace(got, jitter=expected.jitter)
        if got != expected:
            raise ValueError(
                f"load_layer: layer: expected {name} = {expected!r} as in preset, got {got!r}; make it with "
                "preset.make_layer"
            )
    placement = None
    if layer.places is not None:
        if isinstance(layer.places.replicas.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                "load_layer: layer: expected arrays in one that has a placement, got an abstract one; make it without "
                "nnx.eval_shape"
            )
        placement = layer.places.get()
    params = load_params(
        checkpoint,
        preset,
        config.group,
        number,
        prefix=prefix,
        param_dtype=config.param_dtype,
        placement=placement,
        cast=cast,
        progress=progress,
    )
    assign(layer, params)


def load_params(
    checkpoint: Checkpoint,
    preset: Preset,
    group: ExpertGroup,
    number: int,
    *,
    prefix: str | None = None,
    param_dtype: Any = None,
    placement: Placement | None = None,
    cast: bool = False,
    progress: bool = True,
) -> Params:
    """The weights of one layer by parameter name, laid out over the group's mesh, without a layer.

    Names and shapes are those of `jax_wideep.flax.MoE`; the linen layer has "gate.kernel" as `gate/kernel`, and
    "gate.selection_bias" in the collection `router_state`.

    Args:
      checkpoint, preset, number, prefix, cast, progress: as in load_layer.
      group: says where experts live.
      param_dtype: of what the router does not need in float32; None is that of the checkpoint.
      placement: where experts and their replicas lie; None if the group's experts are the model's.

    Raises:
      ValueError: as load_layer; or the group has another number of experts than the preset, or the placement.
    """
    op = "load_params"
    logical = (
        np.arange(preset.router.num_experts)
        if placement is None
        else np.asarray(placement.logical_of_physical)
    )
    if group.num_experts != len(logical):
        raise ValueError(
            f"{op}: group: expected one of {len(logical)} experts, got one of {group.num_experts}; make it with "
            "preset.make_group, or pass the placement"
        )
    prefix = _find_prefix(checkpoint, preset, number) if prefix is None else prefix.format(number=number)
    wanted = [
        _Wanted(op, checkpoint, preset, prefix, group, logical, name, shape, param_dtype, cast)
        for name, shape in mapping.parameter_shapes(preset).items()
    ]
    with progress_bar(sum(param.nbytes() for param in wanted), f"layer {number}", progress) as advance:
        return {param.name: param.load(advance) for param in wanted}


class _Wanted:
    """A parameter to load: the tensors that this process needs for it, found and checked."""

    def __init__(
        self,
        op: str,
        checkpoint: Checkpoint,
        preset: Preset,
        prefix: str,
        group: ExpertGroup,
        logical: np.ndarray,
        name: str,
        shape: tuple[int, ...],
        param_dtype: Any,
        cast: bool,
    ):
        self.name, self.logical = name, logical
        self.shape = (len(logical), *shape[1:]) if name in mapping.OF_EXPERTS else shape
        self.sharding = _sharding(group, name, len(shape))
        self.ranges = {
            self._range(index) for index in self.sharding.addressable_devices_indices_map(self.shape).values()
        }
        # tensor's name -> its values and the pieces that it is made of
        self.tensors: dict[str, tuple[_sources.Source, list[mapping.Piece]]] = {}
        for piece in mapping.pieces(preset):
            hosted = (piece.rows(*span) for at in self.ranges for span in self._spans(*at))
            if piece.param == name and any(hosted):
                tensor = prefix + piece.tensor
                if tensor not in self.tensors:
                    self.tensors[tensor] = _sources.locate(op, checkpoint, tensor, piece.shape), []
                self.tensors[tensor][1].append(piece)
        stored = [source.dtype for source, _ in self.tensors.values()]
        natural = jnp.dtype(jnp.float32) if name in mapping.FLOAT32 else param_dtype
        self.dtype = jnp.dtype(max(stored, key=lambda dtype: dtype.itemsize) if natural is None else natural)
        for tensor, (source, _) in self.tensors.items():
            if not cast and jnp.promote_types(source.dtype, self.dtype) != self.dtype:
                raise ValueError(
                    f"{op}: tensor {tensor!r}: expected values that {self.dtype.name}, the dtype of {name}, holds, got "
                    f"{source.dtype.name}; pass cast=True to round them, or another param_dtype"
                )

    def _range(self, index: tuple[slice, ...] | None) -> tuple[int, int]:
        assert index is not None
        start, stop, _ = index[0].indices(self.shape[0])
        return start, stop

    def _spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows [start, stop) of the parameter as rows of the model's, which has no replicas and is in order."""
        if self.name not in mapping.OF_EXPERTS:
            return [(start, stop)]
        ends = np.flatnonzero(np.diff(self.logical[start:stop], append=-1) != 1) + 1
        begins = [0, *ends[:-1]]
        first = [int(self.logical[start + begin]) for begin in begins]
        return [(at, at + int(end - begin)) for at, begin, end in zip(first, begins, ends, strict=True)]

    def nbytes(self) -> int:
        """Bytes that `load` reads."""
        total = 0
        for at in self.ranges:
            for span in self._spans(*at):
                for source, pieces in self.tensors.values():
                    rows = pieces[0].rows(*span)
                    total += source.nbytes(*rows) if rows else 0
        return total

    def load(self, advance: Callable[[int], Any]) -> jax.Array:
        read: dict[tuple[int, int], np.ndarray] = {}  # once for all devices that hold the same rows

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            key = self._range(index)
            if key not in read:
                parts = [self._read(*span, advance) for span in self._spans(*key)]
                read[key] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return read[key]

        return jax.make_array_from_callback(self.shape, self.sharding, shard)

    def _read(self, start: int, stop: int, advance: Callable[[int], Any]) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for source, pieces in self.tensors.values():
            rows = pieces[0].rows(start, stop)
            if rows is None:
                continue
            values = source.read(*rows)
            for piece in pieces:
                part = out if piece.expert is None else out[piece.expert - start]
                mapping.copy(piece.of_parameter(part), piece.of_tensor(values))
            advance(source.nbytes(*rows))
        return out


def assign(layer: Any, params: Mapping[str, Any]) -> None:
    """Puts arrays by parameter name, from load_params or from_maxtext, in the place of a layer's parameters.

    Args:
      layer: a `jax_wideep.flax.MoE`, which may be abstract.
      params: every parameter and, where the router has one, "gate.selection_bias".

    Raises:
      ValueError: a name is missing or unknown, or a shape is not the layer's.
    """
    shapes = {name: layer.parameter(name).shape for name in mapping.parameter_shapes(layer.config)}
    if set(params) != set(shapes):
        raise ValueError(
            f"assign: params: expected {sorted(shapes)}, got {sorted(params)}; is the preset that of the layer?"
        )
    for name, shape in shapes.items():
        if np.shape(params[name]) != shape:
            raise ValueError(
                f"assign: params[{name!r}]: expected shape {list(shape)}, got {list(np.shape(params[name]))}"
            )
    for name, value in params.items():
        dtype = jnp.float32 if name in mapping.FLOAT32 else layer.config.param_dtype
        layer.parameter(name).set_value(
            _place(value, dtype, _sharding(layer.config.group, name, np.ndim(value)))
        )


def _place(value: Any, dtype: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array) and (value.sharding == sharding or not value.is_fully_addressable):
        return jax.device_put(value.astype(dtype), sharding)
    host = np.asarray(value).astype(dtype)  # the same in every process
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _sharding(group: ExpertGroup, name: str, ndim: int) -> NamedSharding:
    """Written as the layers write it, so that a step compiled before need not be compiled again."""
    axis = group.axis[0] if len(group.axis) == 1 else group.axis
    first = axis if name in mapping.OF_EXPERTS else None
    return NamedSharding(group.mesh, PartitionSpec(first, *[None] * (ndim - 1)))


def _find_prefix(checkpoint: Checkpoint, preset: Preset, number: int) -> str:
    candidates = mapping.prefixes(preset, number)
    names = checkpoint.names()
    found = [prefix for prefix in candidates if any(name.startswith(prefix) for name in names)]
    return (found or candidates)[0]


@contextlib.contextmanager
def progress_bar(total_bytes: int, what: str, progress: bool) -> Iterator[Callable[[int], Any]]:
    """Yields what is called with the number of bytes done."""
    if not progress or jax.process_index() != 0:
        yield lambda nbytes: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: expected tqdm, which is not installed; install it or pass progress=False"
        ) from error
    with tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True) as bar:
        yield bar.update
