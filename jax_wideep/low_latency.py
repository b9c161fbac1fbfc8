"""ll_dispatch and ll_combine: the latency shape (decode), and their send and receive halves.

No plan is made: a token's place at an expert follows from a formula that every rank computes alone, so up to
`group.chunk` tokens a rank go out without asking. Received rows are packed to the front of each expert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jax_wideep import _check, _exchange_ops, _ffi
from jax_wideep._types import Float, Int32
from jax_wideep.group import ExpertGroup
from jax_wideep.plan import backend_of
from jax_wideep.quantize import QUANT_BLOCK

Quantize = Literal["fp8"] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "scales", "counts", "row_source", "topk_idx"],
    meta_fields=["group", "num_tokens", "top_k"],
)
@dataclasses.dataclass(frozen=True)
class Received:
    """What a rank received; a pytree.

    Attributes:
      rows: [local_experts, ranks * chunk, hidden]; each expert's rows are packed to the front, in order of
        source rank, token, k.
      scales: float32 [local_experts, ranks * chunk, hidden / 128] where rows are FP8, otherwise None.
      counts: valid rows of each expert; rows past the count are zero (unspecified under zero_tail=False).
      row_source: for each row, (source rank * num_tokens + token) * top_k + k, or -1.
      topk_idx: what this rank sent by, [num_tokens, top_k].
      group: the group it came over.
      num_tokens: tokens per rank.
      top_k: selections per token.
    """

    rows: jax.Array
    scales: jax.Array | None
    counts: Int32[jax.Array, " local_experts"]
    row_source: Int32[jax.Array, "local_experts expert_rows"]
    topk_idx: Int32[jax.Array, "num_tokens top_k"]
    group: ExpertGroup
    num_tokens: int
    top_k: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "payload", "scales", "topk_idx", "ticket"],
    meta_fields=["group", "quantize", "dequantize", "zero_tail"],
)
@dataclasses.dataclass(frozen=True)
class DispatchInFlight:
    """Between ll_dispatch_send and ll_dispatch_recv; pass it on, once, and do not look inside."""

    x: jax.Array
    payload: jax.Array
    scales: jax.Array | None
    topk_idx: jax.Array
    ticket: jax.Array | None  # on the backend "cuda": rows are under way
    group: ExpertGroup
    quantize: Quantize
    dequantize: bool
    zero_tail: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["y", "topk_weights", "recv", "ticket"],
    meta_fields=["zero_tail"],
)
@dataclasses.dataclass(frozen=True)
class CombineInFlight:
    """Between ll_combine_send and ll_combine_recv; pass it on, once, and do not look inside."""

    y: jax.Array
    topk_weights: jax.Array
    recv: Received
    ticket: jax.Array | None
    zero_tail: bool


def ll_dispatch(
    x: Float[jax.Array, "tokens hidden"],
    topk_idx: Int32[jax.Array, "tokens k"],
    group: ExpertGroup,
    *,
    quantize: Quantize = "fp8",
    dequantize: bool = True,
    zero_tail: bool = True,
) -> Received:
    """Sends each token to its experts without asking first.

    Called inside `jax.shard_map` over `group.axis`, by all ranks. The same as `ll_dispatch_send` followed by
    `ll_dispatch_recv`. The gradient of the FP8 wire is straight through: that of an exact one.

    Args:
      x: at most `group.chunk` tokens; bfloat16, float16 or float32.
      topk_idx: experts of each token, in [0, num_experts); -1 masks a selection. The experts of one token must
        be distinct.
      group: the ExpertGroup.
      quantize: "fp8" halves the bytes sent: float8_e4m3fn with one float32 scale per 128 values; hidden must be
        a multiple of 128. None sends x as it is.
      dequantize: rows arrive in x's dtype. False leaves them FP8, with `scales` (not differentiable).
      zero_tail: rows past each expert's count are zero; otherwise they are unspecified.

    Returns:
      The rows; see Received.

    Raises:
      ValueError: at trace time, for arguments of the wrong shape or dtype, or more than chunk tokens.
      jax.errors.JaxRuntimeError: when run, for an index outside [-1, num_experts) or an expert twice in a token
        (the backend "xla" masks those instead), or for a rank that does not come within the deadline.
    """
    return ll_dispatch_recv(
        _dispatch_in_flight("ll_dispatch", x, topk_idx, group, quantize, dequantize, zero_tail)
    )


def ll_dispatch_send(
    x: Float[jax.Array, "tokens hidden"],
    topk_idx: Int32[jax.Array, "tokens k"],
    group: ExpertGroup,
    *,
    quantize: Quantize = "fp8",
    dequantize: bool = True,
    zero_tail: bool = True,
) -> DispatchInFlight:
    """The first half of ll_dispatch: what needs no other rank. Arguments and errors are those of ll_dispatch.

    Work placed between the halves may run while rows travel. On the backend "cuda" at most two calls may be under
    way, and the halves do not run under `jax.vmap`. On the CPU backend this half quantises and the other one moves
    the rows.
    """
    sent = _dispatch_in_flight("ll_dispatch_send", x, topk_idx, group, quantize, dequantize, zero_tail)
    if group.backend != "cuda":
        return sent
    ticket = _exchange_ops.ll_dispatch_send(sent.payload, sent.topk_idx, group, quantize == "fp8")
    return dataclasses.replace(sent, ticket=ticket)


def ll_dispatch_recv(sent: DispatchInFlight) -> Received:
    """The second half of ll_dispatch: waits for all ranks' rows and packs them."""
    op = "ll_dispatch_recv"
    _check.instance(op, "sent", sent, DispatchInFlight, "pass what ll_dispatch_send returned")
    _check.group(op, sent.group)
    rows, scales, counts, row_source = _receive(
        sent.x,
        (sent.payload, sent.scales, sent.topk_idx, sent.ticket),
        sent.group,
        sent.quantize,
        sent.dequantize,
        sent.zero_tail,
    )
    tokens, top_k = sent.topk_idx.shape
    return Received(
        rows, scales, counts, row_source, sent.topk_idx, group=sent.group, num_tokens=tokens, top_k=top_k
    )


def ll_combine(
    y: Float[jax.Array, "local_experts expert_rows hidden"],
    topk_weights: Float[jax.Array, "tokens k"],
    recv: Received,
    *,
    zero_tail: bool = True,
) -> Float[jax.Array, "tokens hidden"]:
    """Brings expert outputs home: out[token] = sum of topk_weights * y over the token's rows.

    The sum is in float32, in order of expert rank, then k, and is rounded once. Called inside
    `jax.shard_map`, by all ranks.

    Args:
      y: expert outputs in the order of `recv.rows`; rows past `recv.counts` are ignored.
      topk_weights: gate weights of this rank's tokens; used as float32.
      recv: from ll_dispatch.
      zero_tail: the gradient of rows past the counts is zero; otherwise it is unspecified.

    Returns:
      Outputs of this rank's tokens, in y's dtype.

    Raises:
      ValueError: at trace time, for arguments of the wrong shape or dtype.
      jax.errors.JaxRuntimeError: when run, for a rank that does not come within the group's deadline.
    """
    return ll_combine_recv(_combine_in_flight("ll_combine", y, topk_weights, recv, zero_tail))


def ll_combine_send(
    y: Float[jax.Array, "local_experts expert_rows hidden"],
    topk_weights: Float[jax.Array, "tokens k"],
    recv: Received,
    *,
    zero_tail: bool = True,
) -> CombineInFlight:
    """The first half of ll_combine. Arguments and errors are those of ll_combine; see ll_dispatch_send."""
    sent = _combine_in_flight("ll_combine_send", y, topk_weights, recv, zero_tail)
    if recv.group.backend != "cuda":
        return sent
    y = jax.lax.stop_gradient(sent.y)
    ticket = _exchange_ops.ll_combine_send(y, recv.topk_idx, recv.counts, recv.row_source, recv.group)
    return dataclasses.replace(sent, ticket=ticket)


def ll_combine_recv(sent: CombineInFlight) -> Float[jax.Array, "tokens hidden"]:
    """The second half of ll_combine: waits for all ranks' rows and sums them."""
    op = "ll_combine_recv"
    _check.instance(op, "sent", sent, CombineInFlight, "pass what ll_combine_send returned")
    recv = sent.recv
    _check.group(op, recv.group)
    return _combine(
        sent.y,
        sent.topk_weights,
        recv.topk_idx,
        recv.counts,
        recv.row_source,
        sent.ticket,
        recv.group,
        sent.zero_tail,
    )


def _dispatch_in_flight(op, x, topk_idx, group, quantize, dequantize, zero_tail) -> DispatchInFlight:
    _check.group(op, group)
    _check.rows(op, "x", x, ("tokens", group.hidden))
    _check.topk_idx(op, topk_idx, group)
    _check.shape(op, "topk_idx", topk_idx, (x.shape[0], group.top_k), "one row per token of x")
    if x.shape[0] > group.chunk:
        raise ValueError(
            f"{op}: x: expected at most chunk={group.chunk} tokens a rank and call, got {x.shape[0]}; send several "
            "microbatches (moe_ffn does), or make the ExpertGroup with a larger chunk"
        )
    if quantize not in ("fp8", None):
        raise ValueError(f"{op}: quantize: expected 'fp8' or None, got {quantize!r}")
    if quantize == "fp8" and group.hidden % QUANT_BLOCK:
        raise ValueError(
            f"{op}: quantize: 'fp8' expects hidden to be a multiple of {QUANT_BLOCK}, got {group.hidden}; "
            "use quantize=None"
        )
    x, topk_idx = _ffi.vary([x, topk_idx], group.axis)
    payload, scales = jax.lax.stop_gradient(x), None
    if quantize == "fp8" and group.backend != "cuda":  # whose kernels quantise as they send
        payload, scales = backend_of(group).quantize(payload)
    dequantize = dequantize or quantize is None
    return DispatchInFlight(x, payload, scales, topk_idx, None, group, quantize, dequantize, zero_tail)


def _combine_in_flight(op, y, topk_weights, recv, zero_tail) -> CombineInFlight:
    _check.instance(op, "recv", recv, Received, "pass what ll_dispatch returned")
    group = recv.group
    _check.group(op, group)
    _check.rows(op, "y", y, (group.local_experts, group.num_ranks * group.chunk, group.hidden))
    _check.gate_weights(op, "topk_weights", topk_weights, (recv.num_tokens, recv.top_k))
    y, topk_weights, _ = _ffi.vary([y, topk_weights, recv.counts], group.axis)
    return CombineInFlight(y, topk_weights.astype(jnp.float32), recv, None, zero_tail)


# The payload is derived from x, but the gradient goes to x directly: straight through the quantisation.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _receive(x, wire, group, quantize, dequantize, zero_tail):
    payload, scales, topk_idx, ticket = wire
    rows_dtype = x.dtype if dequantize else jnp.float8_e4m3fn
    if ticket is not None:
        return _exchange_ops.ll_dispatch_recv(
            ticket, topk_idx, group, rows_dtype, zero_tail, quantize == "fp8"
        )
    if group.backend == "cuda":
        return _exchange_ops.ll_dispatch(
            payload, scales, topk_idx, group, rows_dtype, zero_tail, quantize=quantize == "fp8"
        )
    return backend_of(group).ll_dispatch(payload, scales, topk_idx, group, rows_dtype, zero_tail)


def _receive_fwd(x, wire, group, quantize, dequantize, zero_tail):
    if not dequantize:
        raise ValueError(
            "ll_dispatch: rows left in FP8 (dequantize=False) have no gradient; use dequantize=True where you "
            "differentiate"
        )
    rows, scales, counts, row_source = _receive(x, wire, group, quantize, dequantize, zero_tail)
    return (rows, scales, counts, row_source), (counts, row_source, wire[2])


def _receive_bwd(group, quantize, dequantize, zero_tail, residuals, cotangents):
    counts, row_source, topk_idx = residuals
    ones = _ffi.vary([jnp.ones(topk_idx.shape, jnp.float32), counts])[0]
    dx = backend_of(group).ll_combine(cotangents[0], ones, topk_idx, counts, row_source, group)
    return dx, None


_receive.defvjp(_receive_fwd, _receive_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _combine(y, topk_weights, topk_idx, counts, row_source, ticket, group, zero_tail):
    if ticket is not None:
        return _exchange_ops.ll_combine_recv(ticket, topk_weights, topk_idx, group, y.dtype)
    return backend_of(group).ll_combine(y, topk_weights, topk_idx, counts, row_source, group)


def _combine_fwd(y, topk_weights, topk_idx, counts, row_source, ticket, group, zero_tail):
    out = _combine(y, topk_weights, topk_idx, counts, row_source, ticket, group, zero_tail)
    return out, (y, topk_weights, topk_idx, counts, row_source)


def _combine_bwd(group, zero_tail, residuals, dout):
    dy, dweights = backend_of(group).ll_combine_grad(dout, *residuals, group, zero_tail)
    return dy, dweights, None, None, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)
