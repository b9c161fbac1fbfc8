"""Kernels of one GPU: grouped matmul, SwiGLU on grouped rows, rows in FP8 as they travel. On CUDA only."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_wideep import _ffi


def _workspace_spec(num_groups: int) -> _ffi.Spec:
    """What grouped_matmul.h calls GroupedMatmulWorkspaceBytes; the handlers check it."""
    return (16 * (1 + num_groups),), jnp.uint8


def _grouped_matmul_outputs(
    rows: Any, w: Any, group_sizes: Any, *, transpose_w: bool, out_dtype: Any, **_: Any
) -> list[_ffi.Spec]:
    columns = w.shape[1 if transpose_w else 2]
    return [((*rows.shape[:-1], columns), out_dtype), _workspace_spec(group_sizes.shape[0])]


def _grouped_matmul_weight_grad_outputs(
    rows: Any, dout: Any, group_sizes: Any, *, out_dtype: Any
) -> list[_ffi.Spec]:
    num_groups = group_sizes.shape[0]
    return [((num_groups, rows.shape[-1], dout.shape[-1]), out_dtype), _workspace_spec(num_groups)]


def _quantize_rows_outputs(x: Any) -> list[_ffi.Spec]:
    return [((x.shape[0], wire_row_bytes(x.shape[1])), jnp.uint8)]


def _swiglu_outputs(hidden: Any, group_sizes: Any) -> list[_ffi.Spec]:
    return [((*hidden.shape[:-1], hidden.shape[-1] // 2), hidden.dtype)]


def _swiglu_grad_outputs(hidden: Any, dout: Any, group_sizes: Any) -> list[_ffi.Spec]:
    return [(hidden.shape, hidden.dtype)]


_grouped_matmul_p = _ffi.kernel_primitive(
    "grouped_matmul", _grouped_matmul_outputs, {"transpose_w": np.bool_, "zero_tail": np.bool_}
)
_grouped_matmul_weight_grad_p = _ffi.kernel_primitive(
    "grouped_matmul_weight_grad", _grouped_matmul_weight_grad_outputs, {}
)
_quantize_rows_p = _ffi.kernel_primitive("quantize_rows", _quantize_rows_outputs, {})
_swiglu_p = _ffi.kernel_primitive("swiglu", _swiglu_outputs, {})
_swiglu_grad_p = _ffi.kernel_primitive("swiglu_grad", _swiglu_grad_outputs, {})


def grouped_matmul(rows, w, group_sizes, transpose_w, out_dtype, zero_tail):
    """out[rows of g] = rows[rows of g] @ w[g], or @ w[g].T; [m, d] or [groups, cap, d]."""
    operands = _ffi.vary([rows, w, group_sizes])
    out_dtype = jnp.dtype(out_dtype)
    return _grouped_matmul_p.bind(
        *operands, transpose_w=transpose_w, out_dtype=out_dtype, zero_tail=zero_tail
    )[0]


def grouped_matmul_weight_grad(rows, dout, group_sizes, out_dtype):
    """dw[g] = rows[rows of g].T @ dout[rows of g]."""
    operands = _ffi.vary([rows, dout, group_sizes])
    return _grouped_matmul_weight_grad_p.bind(*operands, out_dtype=jnp.dtype(out_dtype))[0]


def swiglu(hidden, group_sizes):
    """silu(gate) * up on the rows of groups; the others are left unspecified."""
    return _swiglu_p.bind(*_ffi.vary([hidden, group_sizes]))[0]


def swiglu_grad(hidden, dout, group_sizes):
    return _swiglu_grad_p.bind(*_ffi.vary([hidden, dout, group_sizes]))[0]


def wire_row_bytes(hidden):
    """Bytes of a row on the FP8 wire: values, then a float32 scale for 128 of them, then zeros up to 16 bytes."""
    return (hidden + hidden // 128 * 4 + 15) // 16 * 16


def quantize_rows(x):
    """FP8 rows as they travel (wire_row_bytes) on CUDA; uint8."""
    return _quantize_rows_p.bind(x)[0]
