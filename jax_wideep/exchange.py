"""dispatch and combine: the throughput shape, and their paired gradients.

Dispatch's gradient is a combine of the rows' cotangents, combine's gradient a dispatch of the output's: both
follow the plan of the forward pass, so nothing is routed twice.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jax_wideep import _check, _ffi, _kernels
from jax_wideep._types import Float, Float32
from jax_wideep.group import ExpertGroup
from jax_wideep.plan import DispatchPlan, backend_of
from jax_wideep.quantize import QUANT_BLOCK
from jax_wideep.quantize import dequantize as dequantize_rows

Quantize = Literal["fp8"] | None
QuantizedRows = tuple[jax.Array, Float32[jax.Array, "capacity blocks"]]


def dispatch(
    x: Float[jax.Array, "tokens hidden"],
    topk_weights: Float[jax.Array, "tokens k"],
    plan: DispatchPlan,
    *,
    quantize: Quantize = None,
    dequantize: bool = True,
    zero_tail: bool = True,
) -> tuple[Float[jax.Array, "capacity hidden"] | QuantizedRows, Float32[jax.Array, " capacity"]]:
    """Brings each token to the ranks that host its experts, in expert order.

    Called inside `jax.shard_map` over the plan's group, by all ranks.

    Args:
      x: tokens of this rank; bfloat16, float16 or float32.
      topk_weights: gate weights; used as float32. NaN and infinities travel like any other value.
      plan: from `make_plan`.
      quantize: "fp8" halves the bytes sent: float8_e4m3fn with one float32 scale per 128 values (see
        `jax_wideep.quantize`); hidden must be a multiple of 128. The gradient is straight-through: x's cotangent
        is the sum of its rows', as without quantisation.
      dequantize: rows arrive in x's dtype. False leaves them FP8, with their scales (not differentiable).
      zero_tail: rows past `plan.num_rows` are zero; otherwise they are unspecified, which saves writing them.

    Returns:
      rows: received tokens, packed by expert as `plan.group_sizes` counts them, in x's dtype; with
        dequantize=False a pair of values [capacity, hidden] float8_e4m3fn and scales [capacity, hidden / 128].
      row_weights: the gate weight of each row.

    Raises:
      ValueError: at trace time, for arguments of the wrong shape or dtype.
      jax.errors.JaxRuntimeError: when run, for a rank that does not come within the group's deadline.
    """
    op = "dispatch"
    _check_plan(op, plan)
    _check.rows(op, "x", x, (plan.num_tokens, plan.group.hidden))
    _check.gate_weights(op, "topk_weights", topk_weights, (plan.num_tokens, plan.top_k))
    if quantize not in ("fp8", None):
        raise ValueError(f"{op}: quantize: expected 'fp8' or None, got {quantize!r}")
    if quantize == "fp8" and plan.group.hidden % QUANT_BLOCK:
        raise ValueError(
            f"{op}: quantize: 'fp8' expects hidden to be a multiple of {QUANT_BLOCK}, got {plan.group.hidden}; use "
            "quantize=None"
        )
    x, topk_weights, _ = _ffi.vary([x, topk_weights, plan.dest_row], plan.group.axis)
    topk_weights = topk_weights.astype(jnp.float32)
    if quantize is None:
        return _dispatch(x, topk_weights, plan, zero_tail)
    return _dispatch_fp8(x, topk_weights, plan, dequantize, zero_tail)


def combine(
    y: Float[jax.Array, "capacity hidden"],
    row_weights: Float[jax.Array, " capacity"],
    plan: DispatchPlan,
    *,
    zero_tail: bool = True,
) -> Float[jax.Array, "tokens hidden"]:
    """Brings expert outputs home: out[token] = sum of row_weights * y over the token's rows.

    The sum is in float32, in order of expert rank, then k, and is rounded once. Tokens without a row give
    zeros. Called inside `jax.shard_map` over the plan's group, by all ranks.

    Args:
      y: expert outputs in the order of dispatch's rows; rows past `plan.num_rows` are ignored.
      row_weights: weight of each row, as dispatch returned it; used as float32.
      plan: the plan that the rows were dispatched with.
      zero_tail: the gradient of rows past `plan.num_rows` is zero; otherwise it is unspecified.

    Returns:
      Outputs of this rank's tokens, in y's dtype.

    Raises:
      ValueError: at trace time, for arguments of the wrong shape or dtype.
      jax.errors.JaxRuntimeError: when run, for a rank that does not come within the group's deadline.
    """
    op = "combine"
    _check_plan(op, plan)
    _check.rows(op, "y", y, (plan.capacity, plan.group.hidden))
    _check.gate_weights(op, "row_weights", row_weights, (plan.capacity,))
    y, row_weights, _ = _ffi.vary([y, row_weights, plan.dest_row], plan.group.axis)
    return _combine(y, row_weights.astype(jnp.float32), plan, zero_tail)


def _check_plan(op: str, plan: DispatchPlan) -> None:
    _check.instance(op, "plan", plan, DispatchPlan, "pass what make_plan returned")
    _check.group(op, plan.group)
    selections = (plan.num_tokens, plan.top_k)
    remedy = "pass the plan as make_plan returned it on this rank"
    _check.shape(op, "plan.dest_rank", plan.dest_rank, selections, remedy)
    _check.shape(op, "plan.dest_row", plan.dest_row, selections, remedy)
    _check.shape(op, "plan.row_source", plan.row_source, (plan.capacity,), remedy)
    _check.shape(op, "plan.num_rows", plan.num_rows, (), remedy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x, topk_weights, plan, zero_tail):
    rows, row_weights = backend_of(plan.group).dispatch(x, topk_weights, plan, zero_tail)
    return rows, row_weights


def _dispatch_fwd(x, topk_weights, plan, zero_tail):
    return _dispatch(x, topk_weights, plan, zero_tail), plan


def _dispatch_bwd(zero_tail, plan, cotangents):
    drows, drow_weights = cotangents
    dx, dweights = backend_of(plan.group).dispatch_grad(drows, drow_weights, plan)
    return dx, dweights, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dispatch_fp8(x, topk_weights, plan, dequantize, zero_tail):
    wire_rows, row_weights = backend_of(plan.group).dispatch(
        _to_wire(x, plan.group), topk_weights, plan, zero_tail
    )
    q, scales = _from_wire(wire_rows, x.shape[1])
    return (dequantize_rows(q, scales, x.dtype) if dequantize else (q, scales)), row_weights


def _dispatch_fp8_fwd(x, topk_weights, plan, dequantize, zero_tail):
    if not dequantize:
        raise ValueError(
            "dispatch: rows left in FP8 (dequantize=False) have no gradient; use dequantize=True where you "
            "differentiate"
        )
    return _dispatch_fp8(x, topk_weights, plan, dequantize, zero_tail), plan


def _dispatch_fp8_bwd(dequantize, zero_tail, plan, cotangents):
    return _dispatch_bwd(zero_tail, plan, cotangents)


_dispatch_fp8.defvjp(_dispatch_fp8_fwd, _dispatch_fp8_bwd)


def _to_wire(x: jax.Array, group: ExpertGroup) -> jax.Array:
    """Rows as they travel: FP8 values, then their scales, then zeros up to 16 bytes; uint8."""
    if group.backend == "cuda":
        return _kernels.quantize_rows(x)
    q, scales = backend_of(group).quantize(x)
    tokens, hidden = x.shape
    parts = [_bytes_of(q), _bytes_of(scales).reshape(tokens, hidden // QUANT_BLOCK * 4)]
    spare = _kernels.wire_row_bytes(hidden) - sum(part.shape[1] for part in parts)
    return jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, spare)))


def _from_wire(wire_rows: jax.Array, hidden: int) -> QuantizedRows:
    rows, blocks = wire_rows.shape[0], hidden // QUANT_BLOCK
    q = jax.lax.bitcast_convert_type(wire_rows[:, :hidden], jnp.float8_e4m3fn)
    scales = wire_rows[:, hidden : hidden + 4 * blocks].reshape(rows, blocks, 4)
    return q, jax.lax.bitcast_convert_type(scales, jnp.float32)


def _bytes_of(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(y, row_weights, plan, zero_tail):
    return backend_of(plan.group).combine(y, row_weights, plan)


def _combine_fwd(y, row_weights, plan, zero_tail):
    return _combine(y, row_weights, plan, zero_tail), (y, row_weights, plan)


def _combine_bwd(zero_tail, residuals, dout):
    y, row_weights, plan = residuals
    dy, drow_weights = backend_of(plan.group).combine_grad(dout, y, row_weights, plan, zero_tail)
    return dy, drow_weights, None


_combine.defvjp(_combine_fwd, _combine_bwd)
