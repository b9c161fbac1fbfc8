"""Experts in rounds of bounded size: overflow="spill", the experts' rows in chunks, and what the backward pass keeps.

A plan without a capacity says for every selection which row of its expert's rank is its own. Round i serves rows
[i * capacity, (i + 1) * capacity) of every rank. Each rank knows from `tokens_per_expert`, which all hold alike, how
many rounds the fullest rank needs, so all run the same number of exchanges, without asking.

The first round is ordinary differentiable code: it costs the same as a layer that drops. Further rounds run in loops
whose number of turns is read at run time, which JAX cannot differentiate; their backward pass is written out here. It
keeps nothing of a round but its number: rows come again, and the experts are computed again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_wideep import _ffi
from jax_wideep._types import Bool, Float, Int32
from jax_wideep.exchange import combine, dispatch
from jax_wideep.plan import DispatchPlan, backend_of

# (rows [m, hidden], parameters: a pytree, group_sizes) -> [m, hidden]. Rows of no group may hold anything.
Experts = Callable[[jax.Array, Any, jax.Array], jax.Array]
# What comes between dispatch and combine: (rows, row_weights, parameters, group_sizes) -> (y, row_weights).
WeighedExperts = Callable[[Any, jax.Array, Any, jax.Array], tuple[jax.Array, jax.Array]]
# x and topk_weights of each microbatch, and the experts' parameters.
Operands = tuple[list[Float[jax.Array, "tokens hidden"]], list[Float[jax.Array, "tokens k"]], Any]


def num_rounds(plan: DispatchPlan, capacity: int) -> Int32[jax.Array, ""]:
    """Rounds that the fullest rank needs; the same on every rank."""
    group = plan.group
    rows_per_rank = jnp.sum(plan.tokens_per_expert.reshape(group.num_ranks, group.local_experts), axis=1)
    return -(-jnp.max(rows_per_rank) // capacity)


def round_of(plan: DispatchPlan, number: int | jax.Array, capacity: int) -> DispatchPlan:
    """The part of a plan that serves rows [number * capacity, (number + 1) * capacity) of every rank.

    It is what make_plan would make of the selections that have these rows, but for `tokens_per_expert`.
    """
    first = jnp.asarray(number, jnp.int32) * capacity

    def is_mine(row: jax.Array) -> jax.Array:
        return (row >= first) & (row < first + capacity)

    mine = is_mine(plan.dest_row)
    row_source = plan.row_source.at[first + jnp.arange(capacity, dtype=jnp.int32)].get(
        mode="fill", fill_value=-1
    )
    arrives = is_mine(plan.arrival_rows)
    place = jnp.where(arrives, jnp.cumsum(arrives, dtype=jnp.int32) - 1, capacity)
    ranks = jnp.arange(plan.group.num_ranks, dtype=jnp.int32)
    source_rank = row_source // (plan.num_tokens * plan.top_k)  # -1 where there is no row
    return dataclasses.replace(
        plan,
        group_sizes=_sizes_inside(plan.group_sizes, first, first + capacity),
        num_rows=jnp.clip(plan.num_rows - first, 0, capacity),
        overflow=jnp.zeros_like(plan.overflow),
        dest_rank=jnp.where(mine, plan.dest_rank, -1),
        dest_row=jnp.where(mine, plan.dest_row - first, -1),
        row_source=row_source,
        arrival_rows=jnp.full_like(row_source, -1).at[place].set(plan.arrival_rows - first, mode="drop"),
        rows_per_source=jnp.sum(source_rank == ranks[:, None], axis=1, dtype=jnp.int32),
        capacity=capacity,
    )


def _sizes_inside(group_sizes: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    """Rows of each group that lie in [first, end)."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return jnp.clip(ends, first, end) - jnp.clip(ends - group_sizes, first, end)


# ---- further rounds, and their gradients ----
# further_rounds adds their outputs to the first round's; collect_gradients, which comes before the first round, adds
# their gradients to its own. Where there are none, nothing is added. Between the two runs a wire: zeros that nobody
# reads, whose cotangent is the output's. All microbatches go through one loop: XLA orders the collectives of one
# computation, not those of two loops that do not depend on each other.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def collect_gradients(
    experts: WeighedExperts, capacity: int, operands: Operands, plans: list[DispatchPlan]
) -> tuple[Operands, list[jax.Array]]:
    """The operands for the first round, and the wire."""
    return operands, [jnp.zeros_like(x) for x in operands[0]]


def _collect_fwd(experts, capacity, operands, plans):
    return collect_gradients(experts, capacity, operands, plans), (operands, plans)


def _collect_bwd(experts, capacity, residuals, cotangents):
    (xs, weights, params), plans = residuals
    gradients, douts = cotangents
    backend = backend_of(plans[0].group)

    def one_round(number, totals):
        sums, dparams = [], totals[2]
        for x, topk_weights, plan, dout in zip(xs, weights, plans, douts, strict=True):
            part = round_of(plan, number, capacity)
            rows, row_weights = dispatch(x, topk_weights, part, zero_tail=False)
            (y, row_weights), backward = jax.vjp(
                functools.partial(_call, experts, part.group_sizes), rows, row_weights, params
            )
            dy, drow_weights = backend.combine_grad(dout, y, row_weights, part, False)
            drows, drow_weights, more = backward((dy, drow_weights))
            dparams = jax.tree.map(_add, dparams, more)
            sums.append(backend.dispatch_grad(drows, drow_weights, part))
        dxs, dweights = map(list, zip(*sums, strict=True))
        return *jax.tree.map(_add, totals[:2], (dxs, dweights)), dparams

    return _add_rounds(plans, capacity, one_round, gradients), None


collect_gradients.defvjp(_collect_fwd, _collect_bwd)


def _call(experts, group_sizes, rows, row_weights, params):
    return experts(rows, row_weights, params, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def further_rounds(
    experts: WeighedExperts,
    capacity: int,
    outs: list[Float[jax.Array, "tokens hidden"]],
    wires: list[jax.Array],
    operands: Operands,
    plans: list[DispatchPlan],
) -> list[Float[jax.Array, "tokens hidden"]]:
    """The first round's outputs plus those of all others."""
    xs, weights, params = operands

    def one_round(number, totals):
        more = []
        for x, topk_weights, plan in zip(xs, weights, plans, strict=True):
            part = round_of(plan, number, capacity)
            rows, row_weights = dispatch(x, topk_weights, part, zero_tail=False)
            y, row_weights = experts(rows, row_weights, params, part.group_sizes)
            more.append(combine(y, row_weights, part, zero_tail=False))
        return jax.tree.map(_add, totals, more)

    return _add_rounds(plans, capacity, one_round, outs)


def _further_fwd(experts, capacity, outs, wires, operands, plans):
    return further_rounds(experts, capacity, outs, wires, operands, plans), None


def _further_bwd(experts, capacity, _, douts):
    return douts, douts, None, None


further_rounds.defvjp(_further_fwd, _further_bwd)


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    return total + more.astype(total.dtype)


def _add_rounds(
    plans: list[DispatchPlan], capacity: int, one_round: Callable[[jax.Array, Any], Any], first: Any
) -> Any:
    """`first` plus rounds 1, 2, .., summed in float32 and rounded once; `first` itself if there are none."""
    rounds = functools.reduce(jnp.maximum, [num_rounds(plan, capacity) for plan in plans])

    def add(first: Any) -> Any:
        wide = jax.tree.map(lambda array: array.astype(jnp.float32), first)
        wide = jax.lax.fori_loop(1, rounds, one_round, wide)
        return jax.tree.map(lambda total, array: total.astype(array.dtype), wide, first)

    return jax.lax.cond(rounds > 1, add, lambda first: first, first)


# ---- experts on a chunk of rows at a time ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(
    experts: Experts,
    chunk_rows: int,
    rows: Float[jax.Array, "rows hidden"],
    params: Any,
    group_sizes: Int32[jax.Array, " groups"],
) -> Float[jax.Array, "rows hidden"]:
    """experts(rows, params, group_sizes), on chunk_rows rows at a time; the backward pass computes them again."""

    chunk_rows = min(chunk_rows, max(1, rows.shape[0]))

    def one_chunk(number, y):
        at = _Chunk.of(rows, group_sizes, chunk_rows, number)
        return at.write(y, experts(at.read(rows), params, at.group_sizes))

    (y,) = _ffi.vary(
        [jnp.zeros_like(rows)], tuple(_ffi.varying_axes(rows, group_sizes, *jax.tree.leaves(params)))
    )
    return jax.lax.fori_loop(0, -(-rows.shape[0] // chunk_rows), one_chunk, y)


def _chunks_fwd(experts, chunk_rows, rows, params, group_sizes):
    return in_chunks(experts, chunk_rows, rows, params, group_sizes), (rows, params, group_sizes)


def _chunks_bwd(experts, chunk_rows, residuals, dy):
    rows, params, group_sizes = residuals
    chunk_rows = min(chunk_rows, max(1, rows.shape[0]))

    def one_chunk(number, totals):
        drows, dparams = totals
        at = _Chunk.of(rows, group_sizes, chunk_rows, number)
        _, backward = jax.vjp(
            lambda rows, params: experts(rows, params, at.group_sizes), at.read(rows), params
        )
        dpiece, more = backward(jnp.where(at.is_new, at.read(dy), 0))
        return at.write(drows, dpiece), jax.tree.map(_add, dparams, more)

    wide = jax.tree.map(lambda array: jnp.zeros_like(array, jnp.float32), params)
    leaves, tree = jax.tree.flatten((jnp.zeros_like(rows), wide))
    totals = jax.tree.unflatten(tree, _ffi.vary(leaves, tuple(_ffi.varying_axes(dy, group_sizes))))
    drows, dparams = jax.lax.fori_loop(0, -(-rows.shape[0] // chunk_rows), one_chunk, totals)
    return drows, jax.tree.map(lambda total, array: total.astype(array.dtype), dparams, params), None


in_chunks.defvjp(_chunks_fwd, _chunks_bwd)


class _Chunk(NamedTuple):
    """A window of rows. The last one begins earlier if need be, so that it lies inside; only new rows count."""

    start: jax.Array
    is_new: Bool[jax.Array, "chunk_rows 1"]
    group_sizes: Int32[jax.Array, " groups"]

    @classmethod
    def of(cls, rows: jax.Array, group_sizes: jax.Array, chunk_rows: int, number: jax.Array) -> _Chunk:
        first = number * chunk_rows
        start = jnp.minimum(first, rows.shape[0] - chunk_rows)
        at = start + jnp.arange(chunk_rows, dtype=jnp.int32)
        return cls(start, (at >= first)[:, None], _sizes_inside(group_sizes, start, start + chunk_rows))

    def read(self, array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.is_new.shape[0])

    def write(self, array: jax.Array, piece: jax.Array) -> jax.Array:
        piece = jnp.where(self.is_new, piece.astype(array.dtype), self.read(array))
        return jax.lax.dynamic_update_slice_in_dim(array, piece, self.start, axis=0)
