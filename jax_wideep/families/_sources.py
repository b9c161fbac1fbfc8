"""Tensors of a checkpoint as float arrays, whatever they are stored as: plain floats, float8 in scaled blocks
(DeepSeek-V3), or MXFP4 (GPT-OSS)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import ml_dtypes
import numpy as np

from jax_wideep.families._safetensors import Checkpoint, Tensor

_PLAIN = tuple(np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
_FP8_BLOCK = 128  # rows and columns that share a scale (arXiv:2412.19437 section 3.3)
_MXFP4_BLOCK = 32  # values that share a scale (OCP Microscaling Formats 1.0)


class Source(Protocol):
    """A tensor's values, whose rows can be read apart."""

    @property
    def dtype(self) -> np.dtype:
        """The narrowest float dtype that holds the values; bfloat16, which models compute with, for quantised ones."""
        ...

    def nbytes(self, start: int, stop: int) -> int:
        """Bytes that reading rows [start, stop) takes."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop)."""
        ...


def locate(op: str, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Source:
    """The tensor of that name, checked against `shape`; no values are read.

    Raises:
      ValueError: it is missing, of another shape, or not of floats; the message names it.
    """
    tensor = checkpoint.find(name)
    if tensor is None and checkpoint.find(f"{name}_blocks") is not None:
        return _locate_mxfp4(op, checkpoint, name, shape)
    if tensor is None:
        examples = ", ".join(checkpoint.names()[:3])
        raise ValueError(
            f"{op}: tensor {name!r}: expected it in {checkpoint.path}, which has no such tensor, but {examples}, ..; "
            "check preset, number and prefix"
        )
    check_shape(op, tensor, shape)
    if tensor.dtype == np.dtype(ml_dtypes.float8_e4m3fn):
        return _locate_fp8(op, checkpoint, tensor)
    if tensor.dtype not in _PLAIN:
        raise _wrong_dtype(op, tensor, "floats")
    return _Plain(checkpoint, tensor)


def check_shape(op: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{op}: tensor {tensor.name!r} of {tensor.path}: expected shape {list(shape)}, got {list(tensor.shape)}; "
            "is the preset that of this checkpoint?"
        )


def _wrong_dtype(op: str, tensor: Tensor, expected: str) -> ValueError:
    got = "an unknown dtype" if tensor.dtype is None else tensor.dtype.name
    return ValueError(
        f"{op}: tensor {tensor.name!r} of {tensor.path}: expected {expected}, got {got}; use a checkpoint that is not "
        "quantised"
    )


def _companion(op: str, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: type) -> Tensor:
    tensor = checkpoint.find(name)
    if tensor is None:
        raise ValueError(
            f"{op}: tensor {name!r}: expected it in {checkpoint.path} beside the quantised values of that name, got "
            "nothing; use a checkpoint that is not quantised"
        )
    check_shape(op, tensor, shape)
    if tensor.dtype != np.dtype(dtype):
        raise _wrong_dtype(op, tensor, np.dtype(dtype).name)
    return tensor


@dataclasses.dataclass(frozen=True)
class _Plain:
    checkpoint: Checkpoint
    tensor: Tensor

    @property
    def dtype(self) -> np.dtype:
        assert self.tensor.dtype is not None
        return self.tensor.dtype

    def nbytes(self, start: int, stop: int) -> int:
        return (stop - start) * self.tensor.row_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.checkpoint.read(self.tensor, start, stop)


def _locate_fp8(op: str, checkpoint: Checkpoint, tensor: Tensor) -> Source:
    if len(tensor.shape) != 2:
        raise _wrong_dtype(op, tensor, "floats, or float8 in a matrix with scales")
    blocks = tuple(-(-size // _FP8_BLOCK) for size in tensor.shape)
    scales = _companion(op, checkpoint, f"{tensor.name}_scale_inv", blocks, np.float32)
    return _Fp8(checkpoint, tensor, scales)


@dataclasses.dataclass(frozen=True)
class _Fp8:
    """Value times the scale of its block of 128 by 128."""

    checkpoint: Checkpoint
    tensor: Tensor
    scales: Tensor
    dtype = np.dtype(ml_dtypes.bfloat16)

    def _scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        return start // _FP8_BLOCK, -(-stop // _FP8_BLOCK)

    def nbytes(self, start: int, stop: int) -> int:
        first, last = self._scale_rows(start, stop)
        return (stop - start) * self.tensor.row_bytes + (last - first) * self.scales.row_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        first, last = self._scale_rows(start, stop)
        values = self.checkpoint.read(self.tensor, start, stop).astype(np.float32)
        scales = self.checkpoint.read(self.scales, first, last)
        scales = scales.repeat(_FP8_BLOCK, axis=0)[start - first * _FP8_BLOCK :][: stop - start]
        return values * scales.repeat(_FP8_BLOCK, axis=1)[:, : values.shape[1]]


def _locate_mxfp4(op: str, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Source:
    # Stored transposed, [experts, n_out, n_in]: blocks run along n_in, which the layer's matrices sum over.
    experts, n_in, n_out = shape
    blocks = (experts, n_out, n_in // _MXFP4_BLOCK)
    values = _companion(op, checkpoint, f"{name}_blocks", (*blocks, _MXFP4_BLOCK // 2), np.uint8)
    return _Mxfp4(checkpoint, values, _companion(op, checkpoint, f"{name}_scales", blocks, np.uint8))


@dataclasses.dataclass(frozen=True)
class _Mxfp4:
    """Four bits a value (e2m1), the lower half of a byte first, times two to the (scale - 127) of its 32."""

    checkpoint: Checkpoint
    values: Tensor
    scales: Tensor
    dtype = np.dtype(ml_dtypes.bfloat16)

    def nbytes(self, start: int, stop: int) -> int:
        return (stop - start) * (self.values.row_bytes + self.scales.row_bytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        packed = self.checkpoint.read(self.values, start, stop)
        exponents = self.checkpoint.read(self.scales, start, stop).astype(np.int32) - 127
        codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], _MXFP4_BLOCK)
        decoded = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        unpacked = np.ldexp(decoded, exponents[..., None])
        return unpacked.reshape(*unpacked.shape[:-2], -1).swapaxes(1, 2)
