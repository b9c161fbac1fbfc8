"""In what order the microbatches of a layer take their turns, and what they leave for the backward pass.

Throughput mode, where d is dispatch, E the experts, c combine, and a number the microbatch. Dispatch of the second may
run beside the experts of the first, and combine of the first beside the experts of the second:

    exchange   plan0 plan1 d0 d1        c0        c1       and further rounds, where there are any
    compute                   E0        E1

Low-latency mode, whose ops have halves, s to send and r to receive: between the halves of one op there is always work
of the other microbatch:

    exchange   s0 s1 r0        s0' r1        s1' r0' r1'
    compute             E0            E1

Optimization barriers ask XLA for this order, and for the reverse of it in the backward pass. Whatever it makes of them
is the same on every rank, since all run one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_wideep import _ffi, _rounds
from jax_wideep._types import Float, Int32
from jax_wideep.exchange import combine, dispatch
from jax_wideep.group import ExpertGroup
from jax_wideep.low_latency import (
    CombineInFlight,
    DispatchInFlight,
    Quantize,
    Received,
    ll_combine,
    ll_combine_recv,
    ll_combine_send,
    ll_dispatch,
    ll_dispatch_recv,
    ll_dispatch_send,
)
from jax_wideep.plan import DispatchPlan

#: Names that jax.checkpoint policies can save or offload (jax.checkpoint_policies.save_only_these_names): the
#: rows that dispatch brought with their weights, the experts' inner activations, what combine returned, and
#: the plan's integers. The backward pass dispatches again unless both rows and plan are saved.
CHECKPOINT_NAMES = ("wideep_dispatch_rows", "wideep_expert_hidden", "wideep_combine_output", "wideep_plan")
ROWS, HIDDEN, OUTPUT, PLAN = CHECKPOINT_NAMES


def _after(arrays: Any, earlier: Any) -> Any:
    """`arrays`, not ready before `earlier` is. All integers or all floats: the others have no cotangents."""
    leaves, tree = jax.tree.flatten((arrays, earlier))
    return jax.tree.unflatten(tree, jax.lax.optimization_barrier(_ffi.vary(leaves)))[0]


# ---- throughput ----


def make_plans(
    make: Callable[[jax.Array], DispatchPlan], topk_idx: Int32[jax.Array, "tokens k"], number: int
) -> list[DispatchPlan]:
    """The plan of each of `number` microbatches."""
    plans: list[DispatchPlan] = []
    for part in jnp.array_split(topk_idx, number):
        plans.append(make(_after(part, plans[-1].dest_row) if plans else part))
    return plans


def throughput(
    x: Float[jax.Array, "tokens hidden"],
    topk_weights: Float[jax.Array, "tokens k"],
    params: Any,
    plans: list[DispatchPlan],
    experts: _rounds.WeighedExperts,
    *,
    round_capacity: int | None,
    keep_nothing: bool,
) -> Float[jax.Array, "tokens hidden"]:
    """Dispatch, experts and combine of microbatches, one for each plan.

    Args:
      x: tokens of this rank, those of all microbatches.
      topk_weights: gate weights.
      params: of the experts.
      plans: of the microbatches, as make_plans makes them.
      experts: what comes between dispatch and combine.
      round_capacity: rows of a round; None: the plans' rows come all at once.
      keep_nothing: the backward pass of the first round dispatches again, and computes the experts again.

    Returns:
      Outputs in x's dtype.
    """
    number = len(plans)
    plans = [checkpoint_name(plan, PLAN) for plan in plans]
    operands: _rounds.Operands = (jnp.array_split(x, number), jnp.array_split(topk_weights, number), params)

    def first_round(operands: _rounds.Operands, plans: list[DispatchPlan]) -> list[jax.Array]:
        return _first_round(experts, operands, plans)

    if keep_nothing:
        first_round = jax.checkpoint(first_round)
    if round_capacity is None or all(plan.capacity <= round_capacity for plan in plans):
        return jnp.concatenate(first_round(operands, plans))

    # The same axes for all, so that their gradients can be summed in one loop.
    leaves, tree = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(tree, _ffi.vary(leaves, tuple(_ffi.varying_axes(plans[0].dest_row))))
    collected, wires = _rounds.collect_gradients(experts, round_capacity, operands, plans)
    parts = [checkpoint_name(_rounds.round_of(plan, 0, round_capacity), PLAN) for plan in plans]
    outs = first_round(collected, parts)
    with jax.named_scope("wideep_further_rounds"):
        operands = jax.lax.stop_gradient(operands)
        return jnp.concatenate(_rounds.further_rounds(experts, round_capacity, outs, wires, operands, plans))


def _first_round(
    experts: _rounds.WeighedExperts, operands: _rounds.Operands, plans: list[DispatchPlan]
) -> list[jax.Array]:
    xs, weights, params = operands
    if len(plans) > 1:  # no dispatch before all plans are made
        plans = _after(plans, ())
    # No op looks at rows past the plan's, so nobody has to clear them.
    received: list[tuple[jax.Array, jax.Array]] = []
    for x, topk_weights, plan in zip(xs, weights, plans, strict=True):
        with jax.named_scope("wideep_dispatch"):
            if received:
                x = _after(x, received[-1][0])
            received.append(checkpoint_name(dispatch(x, topk_weights, plan, zero_tail=False), ROWS))
    outs: list[jax.Array] = []
    for (rows, row_weights), plan in zip(received, plans, strict=True):
        y, row_weights = experts(rows, row_weights, params, plan.group_sizes)
        with jax.named_scope("wideep_combine"):
            if outs:
                y = _after(y, outs[-1])
            outs.append(checkpoint_name(combine(y, row_weights, plan, zero_tail=False), OUTPUT))
    return outs


# ---- low latency ----


def low_latency(
    x: Float[jax.Array, "tokens hidden"],
    topk_idx: Int32[jax.Array, "tokens k"],
    topk_weights: Float[jax.Array, "tokens k"],
    params: Any,
    *,
    experts: _rounds.Experts,
    group: ExpertGroup,
    quantize: Quantize,
    number: int,
) -> tuple[Float[jax.Array, "tokens hidden"], Int32[jax.Array, ""]]:
    """The layer without a plan: `number` microbatches under way at a time, of at most `group.chunk` tokens each.

    Returns its outputs, and how many rows this rank received.
    """

    def one_call(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        if number == 1 or x.shape[0] < 2:
            return _alone(x, topk_idx, topk_weights, params, experts, group, quantize)
        pieces = zip(*(jnp.array_split(array, number) for array in (x, topk_idx, topk_weights)), strict=True)
        outs, num_rows = _in_flight(list(pieces), params, experts, group, quantize)
        return jnp.concatenate(outs), num_rows

    tokens, together = x.shape[0], number * group.chunk
    if tokens <= together:
        return one_call(x, topk_idx, topk_weights)
    calls = -(-tokens // together)
    spare = calls * together - tokens

    def split(array: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(array, ((0, spare), (0, 0)), constant_values=fill)
        return padded.reshape(calls, together, array.shape[1])

    pieces = (split(x, 0), split(topk_idx, -1), split(topk_weights, 0))
    outs, num_rows = jax.lax.map(lambda piece: one_call(*piece), pieces)
    return outs.reshape(-1, x.shape[1])[:tokens], jnp.sum(num_rows, dtype=jnp.int32)


def _alone(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    params: Any,
    experts: _rounds.Experts,
    group: ExpertGroup,
    quantize: Quantize,
) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("wideep_dispatch"):
        recv = _named(ll_dispatch(x, topk_idx, group, quantize=quantize, zero_tail=False))
    y = experts(recv.rows, params, recv.counts)
    with jax.named_scope("wideep_combine"):
        out = checkpoint_name(ll_combine(y, topk_weights, recv, zero_tail=False), OUTPUT)
    return out, jnp.sum(recv.counts, dtype=jnp.int32)


def _in_flight(
    pieces: list[tuple[jax.Array, jax.Array, jax.Array]],
    params: Any,
    experts: _rounds.Experts,
    group: ExpertGroup,
    quantize: Quantize,
) -> tuple[list[jax.Array], jax.Array]:
    """Microbatches that are under way together."""
    sent: list[DispatchInFlight] = []
    for x, topk_idx, _ in pieces:
        with jax.named_scope("wideep_dispatch"):
            if sent and sent[-1].ticket is not None:
                topk_idx = _after(topk_idx, sent[-1].ticket)
            sent.append(ll_dispatch_send(x, topk_idx, group, quantize=quantize, zero_tail=False))
    home: list[CombineInFlight] = []
    for i, (_, _, topk_weights) in enumerate(pieces):
        # The first microbatch comes in once all are sent, the second once the first one's outputs are on their way.
        with jax.named_scope("wideep_dispatch"):
            recv = _named(ll_dispatch_recv(_with_ticket_after(sent[i], home[-1] if home else sent[-1])))
        y = experts(recv.rows, params, recv.counts)
        with jax.named_scope("wideep_combine"):
            home.append(ll_combine_send(y, topk_weights, recv, zero_tail=False))
    with jax.named_scope("wideep_combine"):
        outs = [checkpoint_name(ll_combine_recv(_with_ticket_after(sent, home[-1])), OUTPUT) for sent in home]
    return outs, jnp.sum(jnp.stack([sent.recv.counts for sent in home]), dtype=jnp.int32)


def _with_ticket_after(mine: Any, other: DispatchInFlight | CombineInFlight) -> Any:
    """What is in flight, to be received only once `other` is sent. Without tickets nothing is under way yet."""
    if mine.ticket is None or mine is other:
        return mine
    return dataclasses.replace(mine, ticket=_after(mine.ticket, other.ticket))


def _named(recv: Received) -> Received:
    return dataclasses.replace(
        recv,
        rows=checkpoint_name(recv.rows, ROWS),
        counts=checkpoint_name(recv.counts, PLAN),
        row_source=checkpoint_name(recv.row_source, PLAN),
    )
