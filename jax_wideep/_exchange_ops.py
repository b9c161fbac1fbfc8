"""The exchange on the compiled backends: primitives, and the ops as functions on one rank's arrays.

The functions have the names, arguments and meaning of those in reference.py, which plan.backend_of chooses between. All
operands of one must vary over the same axes: the public ops see to it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_wideep import _ffi


def _plan_outputs(
    rank: Any, topk_idx: Any, *, num_experts: int, num_ranks: int, capacity: int, **_: Any
) -> list[_ffi.Spec]:
    return [
        ((num_experts // num_ranks,), jnp.int32),  # group_sizes
        ((), jnp.int32),  # num_rows
        ((), jnp.int32),  # overflow
        ((num_experts,), jnp.int32),  # tokens_per_expert
        (topk_idx.shape, jnp.int32),  # dest_rank
        (topk_idx.shape, jnp.int32),  # dest_row
        ((capacity,), jnp.int32),  # row_source
        ((capacity,), jnp.int32),  # arrival_rows
        ((num_ranks,), jnp.int32),  # rows_per_source
    ]


def _dispatch_outputs(x: Any, weights: Any, *_: Any, capacity: int, **__: Any) -> list[_ffi.Spec]:
    return [((capacity, x.shape[1]), x.dtype), ((capacity,), jnp.float32)]


def _dispatch_grad_outputs(
    drows: Any, drow_weights: Any, dest_rank: Any, *_: Any, form: str, **__: Any
) -> list[_ffi.Spec]:
    num_tokens, top_k = dest_rank.shape
    dx = ((num_tokens, drows.shape[1]), drows.dtype)
    return [dx, ((num_tokens, top_k), jnp.float32), *_combine_scratch(drows, form)]


def _combine_outputs(
    y: Any, row_weights: Any, dest_rank: Any, *_: Any, form: str, **__: Any
) -> list[_ffi.Spec]:
    return [((dest_rank.shape[0], y.shape[1]), y.dtype), *_combine_scratch(y, form)]


def _combine_scratch(rows: Any, form: str) -> list[_ffi.Spec]:
    """The sums of one form; XLA keeps them in memory that peers can read."""
    return [(rows.shape, rows.dtype)] if form == "reduce" else []


def _combine_grad_outputs(dout: Any, y: Any, row_weights: Any, *_: Any, **__: Any) -> list[_ffi.Spec]:
    return [(y.shape, y.dtype), (row_weights.shape, jnp.float32)]


def _quantize_outputs(x: Any) -> list[_ffi.Spec]:
    tokens, hidden = x.shape
    return [(x.shape, jnp.float8_e4m3fn), ((tokens, hidden // 128), jnp.float32)]


def _ll_dispatch_outputs(rank: Any, payload: Any, *_: Any, **params: Any) -> list[_ffi.Spec]:
    return _packed_rows(payload.shape[1], **params)


def _ll_dispatch_recv_outputs(*_: Any, hidden: int, **params: Any) -> list[_ffi.Spec]:
    return _packed_rows(hidden, **params)


def _packed_rows(
    hidden: int, *, num_experts: int, num_ranks: int, chunk: int, rows_dtype: Any, **_: Any
) -> list[_ffi.Spec]:
    packed = (num_experts // num_ranks, num_ranks * chunk)
    with_scales = rows_dtype == jnp.float8_e4m3fn
    return [
        ((*packed, hidden), rows_dtype),  # rows
        ((*packed, hidden // 128) if with_scales else (0, 0, 0), jnp.float32),  # row_scales
        (packed[:1], jnp.int32),  # counts
        (packed, jnp.int32),  # row_source
    ]


def _ll_combine_outputs(y: Any, topk_weights: Any, *_: Any, **__: Any) -> list[_ffi.Spec]:
    return [((topk_weights.shape[0], y.shape[2]), y.dtype)]


def _ll_combine_recv_outputs(
    ticket: Any, topk_weights: Any, *_: Any, hidden: int, out_dtype: Any, **__: Any
) -> list[_ffi.Spec]:
    return [((topk_weights.shape[0], hidden), out_dtype)]


def _ll_combine_grad_outputs(dout: Any, y: Any, topk_weights: Any, *_: Any, **__: Any) -> list[_ffi.Spec]:
    return [(y.shape, y.dtype), (topk_weights.shape, jnp.float32)]


_GROUP: _ffi.Attrs = {"group": np.int64}
_TAIL: _ffi.Attrs = {"zero_tail": np.bool_}
_LL: _ffi.Attrs = {"num_experts": np.int64, "chunk": np.int64}

# C++'s DispatchForm and CombineForm.
_DISPATCH_FORMS = ("push", "pull")
_COMBINE_FORMS = ("pull", "push", "reduce")
_DISPATCH_FORM: _ffi.Attrs = {"form": lambda form: np.int32(_DISPATCH_FORMS.index(form))}
_COMBINE_FORM: _ffi.Attrs = {"form": lambda form: np.int32(_COMBINE_FORMS.index(form))}

# Of the plan's arrays, which are the last six operands (_plan_operands), the CPU takes only the first.
_plan_p = _ffi.exchange_primitive(
    "plan",
    _plan_outputs,
    _GROUP | {"num_experts": np.int64, "overflow_is_error": np.bool_},
    cuda_operands=slice(1, None),
    cuda_attrs={},
)
_dispatch_p = _ffi.exchange_primitive(
    "dispatch", _dispatch_outputs, _GROUP | _TAIL, cpu_operands=slice(5), cuda_attrs=_DISPATCH_FORM
)
_dispatch_grad_p = _ffi.exchange_primitive(
    "dispatch_grad", _dispatch_grad_outputs, _GROUP, cpu_operands=slice(6), cuda_attrs=_COMBINE_FORM
)
_combine_p = _ffi.exchange_primitive(
    "combine", _combine_outputs, _GROUP, cpu_operands=slice(6), cuda_attrs=_COMBINE_FORM
)
_combine_grad_p = _ffi.exchange_primitive(
    "combine_grad", _combine_grad_outputs, _GROUP | _TAIL, cpu_operands=slice(6), cuda_attrs={}
)
_quantize_p = _ffi.exchange_primitive("quantize", _quantize_outputs, {})
# CUDA knows its rank, casts to FP8 itself, and its combine takes topk_idx, the last operand, too.
_WIRE: _ffi.Attrs = {"quantize": np.bool_}
_ll_dispatch_p = _ffi.exchange_primitive(
    "ll_dispatch",
    _ll_dispatch_outputs,
    _GROUP | _LL | _TAIL,
    cuda_operands=slice(1, None),
    cuda_attrs=_WIRE,
)
_ll_combine_p = _ffi.exchange_primitive(
    "ll_combine", _ll_combine_outputs, _GROUP | _LL, cpu_operands=slice(4), cuda_attrs={}
)
_ll_combine_grad_p = _ffi.exchange_primitive(
    "ll_combine_grad",
    _ll_combine_grad_outputs,
    _GROUP | _LL | _TAIL,
    cpu_operands=slice(5),
    cuda_attrs={},
)

_ll_dispatch_send_p = _ffi.send_primitive("ll_dispatch_send", _GROUP | _LL | _WIRE)
_ll_dispatch_recv_p = _ffi.half_primitive(
    "ll_dispatch_recv", _ll_dispatch_recv_outputs, _GROUP | _LL | _TAIL | _WIRE
)
_ll_combine_send_p = _ffi.send_primitive("ll_combine_send", _GROUP | _LL)
_ll_combine_recv_p = _ffi.half_primitive("ll_combine_recv", _ll_combine_recv_outputs, _GROUP | _LL)


def plan(topk_idx, group, capacity, overflow_is_error):
    operands = _ffi.vary([jax.lax.axis_index(group.axis), topk_idx])
    return _plan_p.bind(
        *operands,
        group=group.handle,
        num_experts=group.num_experts,
        num_ranks=group.num_ranks,
        capacity=capacity,
        overflow_is_error=overflow_is_error,
    )


def _plan_operands(plan):
    return [
        plan.dest_rank,
        plan.dest_row,
        plan.num_rows,
        plan.row_source,
        plan.arrival_rows,
        plan.rows_per_source,
    ]


def dispatch(x, weights, plan, zero_tail):
    return _dispatch_p.bind(
        *_ffi.vary([x, weights, *_plan_operands(plan)]),
        group=plan.group.handle,
        capacity=plan.capacity,
        zero_tail=zero_tail,
        form=plan.group.dispatch_form,
    )


def dispatch_grad(drows, drow_weights, plan):
    operands = _ffi.vary([drows, drow_weights, *_plan_operands(plan)])
    form = _combine_form(plan.group)
    return _dispatch_grad_p.bind(*operands, group=plan.group.handle, form=form)[:2]


def combine(y, row_weights, plan):
    operands = _ffi.vary([y, row_weights, *_plan_operands(plan)])
    return _combine_p.bind(*operands, group=plan.group.handle, form=_combine_form(plan.group))[0]


def _combine_form(group):
    """Only CUDA's handlers have forms."""
    return group.combine_form if group.backend == "cuda" else "auto"


def combine_grad(dout, y, row_weights, plan, zero_tail):
    operands = _ffi.vary([dout, y, row_weights, *_plan_operands(plan)])
    return _combine_grad_p.bind(*operands, group=plan.group.handle, zero_tail=zero_tail)


def quantize(x):
    return _quantize_p.bind(x)


def _ll_params(group):
    return {"group": group.handle, "num_experts": group.num_experts, "chunk": group.chunk}


def ll_dispatch(payload, scales, topk_idx, group, rows_dtype, zero_tail, quantize=False):
    """`quantize`: payload is not FP8 but travels so; on CUDA only."""
    no_scales = jnp.zeros((0, 0), jnp.float32)
    rank = jax.lax.axis_index(group.axis)
    operands = _ffi.vary([rank, payload, no_scales if scales is None else scales, topk_idx])
    received = _ll_dispatch_p.bind(
        *operands,
        **_ll_params(group),
        num_ranks=group.num_ranks,
        rows_dtype=jnp.dtype(rows_dtype),
        zero_tail=zero_tail,
        quantize=quantize,
    )
    return _without_empty_scales(*received)


def ll_dispatch_send(x, topk_idx, group, quantize):
    """The ticket."""
    return _ll_dispatch_send_p.bind(*_ffi.vary([x, topk_idx]), **_ll_params(group), quantize=quantize)[0]


def ll_dispatch_recv(ticket, topk_idx, group, rows_dtype, zero_tail, quantize):
    received = _ll_dispatch_recv_p.bind(
        *_ffi.vary([ticket, topk_idx]),
        **_ll_params(group),
        num_ranks=group.num_ranks,
        hidden=group.hidden,
        rows_dtype=jnp.dtype(rows_dtype),
        zero_tail=zero_tail,
        quantize=quantize,
    )
    return _without_empty_scales(*received)


def _without_empty_scales(rows, row_scales, counts, row_source):
    return rows, (row_scales if row_scales.size else None), counts, row_source


def ll_combine(y, topk_weights, topk_idx, counts, row_source, group):
    operands = _ffi.vary([y, topk_weights, counts, row_source, topk_idx])
    return _ll_combine_p.bind(*operands, **_ll_params(group))[0]


def ll_combine_send(y, topk_idx, counts, row_source, group):
    """The ticket."""
    return _ll_combine_send_p.bind(*_ffi.vary([y, counts, row_source, topk_idx]), **_ll_params(group))[0]


def ll_combine_recv(ticket, topk_weights, topk_idx, group, out_dtype):
    params = _ll_params(group) | {"hidden": group.hidden, "out_dtype": jnp.dtype(out_dtype)}
    return _ll_combine_recv_p.bind(*_ffi.vary([ticket, topk_weights, topk_idx]), **params)[0]


def ll_combine_grad(dout, y, topk_weights, topk_idx, counts, row_source, group, zero_tail):
    operands = _ffi.vary([dout, y, topk_weights, counts, row_source, topk_idx])
    return _ll_combine_grad_p.bind(*operands, **_ll_params(group), zero_tail=zero_tail)
