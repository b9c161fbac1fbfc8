"""moe_ffn: the experts of a Mixture-of-Experts layer, from a routing decision to the tokens' outputs.

topk_idx, topk_weights (routing)  ->  plan  ->  dispatch  ->  experts  ->  combine       mode "throughput"
                                  ->  ll_dispatch  ->  experts  ->  ll_combine           mode "low_latency"

`_rounds.py` bounds the memory that rows take; `_microbatches.py` says in what order microbatches take their turns.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_wideep import _check, _ffi, _microbatches, _rounds
from jax_wideep._expert_bias import add_expert_bias
from jax_wideep._swiglu import ClampedSwiGLU, swiglu, swiglu_of_groups
from jax_wideep._types import Float, Float32, Int32
from jax_wideep.group import ExpertGroup
from jax_wideep.grouped_matmul import Implementation, grouped_matmul
from jax_wideep.low_latency import Quantize
from jax_wideep.placement import Placement
from jax_wideep.plan import DispatchPlan, Overflow, check_capacity, make_plan

Mode = Literal["throughput", "low_latency"]
Activation = Literal["swiglu", "gelu", "relu2"] | ClampedSwiGLU

#: What the backward pass keeps; see moe_ffn.
Remat = Literal["none", "hidden", "all"]


class MoEStats(NamedTuple):
    """What a layer saw; a pytree of arrays.

    Attributes:
      tokens_per_expert: selections of every (logical) expert, over all ranks, dropped ones included.
      overflow: selections dropped, those of masked ranks' experts (ExpertGroup.mask_ranks) among them; as
        DispatchPlan has it from moe_ffn (in low-latency mode on this rank's receive side), over all ranks from the
        layers.
      aux_loss: load-balance loss of the router over all ranks; None from moe_ffn, which does not route.
      z_loss: mean squared logsumexp of the router's logits over all ranks; None from moe_ffn.
      rows_per_rank: selections of the experts that each rank hosts, dropped ones included.
      spilled: selections served in a round after the first; over ranks as `overflow`.
    """

    tokens_per_expert: Int32[jax.Array, " experts"]
    overflow: Int32[jax.Array, ""]
    aux_loss: Float32[jax.Array, ""] | None = None
    z_loss: Float32[jax.Array, ""] | None = None
    rows_per_rank: Int32[jax.Array, " ranks"] | None = None
    spilled: Int32[jax.Array, ""] | None = None


def moe_ffn(
    x: Float[jax.Array, "tokens hidden"],
    topk_idx: Int32[jax.Array, "tokens k"],
    topk_weights: Float[jax.Array, "tokens k"],
    wi: Float[jax.Array, "local_experts hidden inner"],
    wo: Float[jax.Array, "local_experts ffn hidden"],
    group: ExpertGroup,
    *,
    mode: Mode = "throughput",
    capacity: int | None = None,
    overflow: Overflow = "drop",
    activation: Activation = "swiglu",
    bi: Float[jax.Array, "local_experts inner"] | None = None,
    bo: Float[jax.Array, "local_experts hidden"] | None = None,
    weigh_input: bool = False,
    quantize: Quantize = "fp8",
    plan: DispatchPlan | None = None,
    implementation: Implementation = "auto",
    placement: Placement | None = None,
    microbatches: int = 1,
    expert_chunk: int | None = None,
    remat: Remat = "none",
    return_stats: bool = True,
) -> tuple[Float[jax.Array, "tokens hidden"], MoEStats | None]:
    """Sends tokens to their experts, applies them, and sums the outputs at home.

        out[t] = sum over k of topk_weights[t, k] * expert[topk_idx[t, k]](x[t])
        expert(x) = activation(x @ wi + bi) @ wo + bo

    Called inside `jax.shard_map` over `group.axis`, by all ranks, on one rank's shards.

    Args:
      x: tokens of this rank; bfloat16, float16 or float32.
      topk_idx: experts of each token; -1 masks a selection.
      topk_weights: gate weights.
      wi: first matrices of this rank's experts, in x's dtype or in float32 (see grouped_matmul):
        [local_experts, hidden, 2 * ffn], gate before up, for "swiglu" and ClampedSwiGLU, otherwise
        [local_experts, hidden, ffn].
      wo: second matrices, likewise.
      group: the ExpertGroup.
      mode: "throughput" plans first and sends exactly what is needed, for training and prefill. "low_latency"
        sends without a plan, for decode; tokens above `group.chunk` go in several microbatches.
      capacity: rows a rank can receive at a time, see make_plan; throughput mode only.
      overflow: what happens above the capacity. "drop" and "error" as make_plan does. "spill" loses nothing: as many
        further rounds of `capacity` rows as the fullest rank needs, whose number is read at run time. Equal to
        capacity=None but for rounding; memory is that of one round.
      activation: "swiglu" silu(gate) * up (arXiv:2002.05202), "gelu" (arXiv:1606.08415, tanh form), or "relu2"
        relu(x)^2 (arXiv:2109.08668), or a ClampedSwiGLU (GPT-OSS, arXiv:2508.10925).
      bi: biases after the first matrices, in x's dtype or in float32; None for none.
      bo: biases after the second matrices, likewise.
      weigh_input: out[t] = sum over k of expert[topk_idx[t, k]](topk_weights[t, k] * x[t]) instead, as in Llama 4;
        in low-latency mode for top_k = 1 only, since there weights stay at home.
      quantize: wire format of low-latency mode, see ll_dispatch.
      plan: a plan already made from topk_idx over this group, to make no second one; throughput mode only.
      implementation: of the expert products, see grouped_matmul.
      placement: where experts and their replicas lie. topk_idx then holds logical experts, and wi, wo and the
        group physical ones; a `plan` is one made from `placement.to_physical(topk_idx, rank)`.
      microbatches: parts of the tokens, one after the other, so that the exchange of one can run beside the experts
        of another; at most 2 in low-latency mode. Each may receive ceil(capacity / microbatches) rows.
      expert_chunk: rows that experts work on at a time; their inner activations take no more memory than that, and
        are computed again for the backward pass. None: all rows. Throughput mode only.
      remat: what the backward pass keeps of a round. "none": all it needs. "hidden": not the experts' inner
        activations, which it computes again. "all": only tokens, gate weights and the plan; it dispatches again, too.
      return_stats: False: None in place of statistics, which cost a sum over all ranks in low-latency mode.

    Returns:
      Outputs in x's dtype, and statistics.

    Raises:
      ValueError: at trace time, for arguments of the wrong shape or dtype.
      jax.errors.JaxRuntimeError: when run, as make_plan and ll_dispatch say.
    """
    op = "moe_ffn"
    _check.group(op, group)
    _check.rows(op, "x", x, ("tokens", group.hidden))
    _check.topk_idx(op, topk_idx, group)
    _check.shape(op, "topk_idx", topk_idx, (x.shape[0], group.top_k), "one row per token of x")
    _check.gate_weights(op, "topk_weights", topk_weights, topk_idx.shape)
    _check_experts(op, x, wi, wo, bi, bo, group, activation)
    if placement is not None:
        _check.instance(op, "placement", placement, Placement, "make one with compute_placement")
        if placement.num_physical != group.num_experts:
            raise ValueError(
                f"{op}: placement: expected one of the group's {group.num_experts} physical experts, got one of "
                f"{placement.num_physical}; make the ExpertGroup with num_experts={placement.num_physical}"
            )
        with jax.named_scope("wideep_place"):
            topk_idx = placement.to_physical(topk_idx, jax.lax.axis_index(group.axis))
    if mode not in ("throughput", "low_latency"):
        raise ValueError(f"{op}: mode: expected 'throughput' or 'low_latency', got {mode!r}")
    if remat not in get_args(Remat):
        raise ValueError(f"{op}: remat: expected one of {get_args(Remat)}, got {remat!r}")
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"{op}: microbatches: expected a number of at least 1, got {microbatches!r}")
    if expert_chunk is not None and (not isinstance(expert_chunk, int) or expert_chunk < 1):
        raise ValueError(f"{op}: expert_chunk: expected None or at least 1 row, got {expert_chunk!r}")
    params = (wi, wo, bi, bo)
    experts: _rounds.Experts = functools.partial(
        _experts, activation=activation, implementation=implementation
    )
    if expert_chunk is not None:
        experts = functools.partial(_rounds.in_chunks, experts, expert_chunk)
    elif remat == "hidden":
        experts = jax.checkpoint(experts)
    if mode == "low_latency":
        if plan is not None or capacity is not None or expert_chunk is not None:
            raise ValueError(
                f"{op}: plan, capacity, expert_chunk: expected None in mode 'low_latency', which makes no plan and "
                "drops nothing; leave them out, or use mode='throughput'"
            )
        if microbatches > 2:
            raise ValueError(
                f"{op}: microbatches: expected 1 or 2 in mode 'low_latency', whose buffers are doubled, got "
                f"{microbatches}"
            )
        if weigh_input:
            if group.top_k != 1:
                raise ValueError(
                    f"{op}: weigh_input: expected top_k = 1 in mode 'low_latency', got {group.top_k}; use "
                    "mode='throughput'"
                )
            x, topk_weights = x * topk_weights.astype(x.dtype), jnp.ones_like(topk_weights)
        call: Callable[..., tuple[jax.Array, jax.Array]] = functools.partial(
            _microbatches.low_latency, experts=experts, group=group, quantize=quantize, number=microbatches
        )
        if remat == "all":
            call = jax.checkpoint(call)
        out, num_rows = call(x, topk_idx, topk_weights, params)
        return out, (_low_latency_stats(topk_idx, num_rows, group, placement) if return_stats else None)

    parts = min(microbatches, max(1, x.shape[0]))
    if capacity is not None:
        check_capacity(op, capacity, group.num_ranks * topk_idx.size)
        capacity = -(-capacity // parts)
    if plan is None:
        in_plan = (
            {"overflow": "drop"} if overflow == "spill" else {"overflow": overflow, "capacity": capacity}
        )
        with jax.named_scope("wideep_plan"):
            plans = _microbatches.make_plans(
                functools.partial(make_plan, group=group, **in_plan), topk_idx, parts
            )
    else:
        _check_plan(op, plan, x, group, microbatches, overflow)
        plans = [plan]
    round_capacity = capacity if overflow == "spill" else None
    out = _microbatches.throughput(
        x,
        topk_weights,
        params,
        plans,
        functools.partial(_weighed_experts, experts=experts, weigh_input=weigh_input),
        round_capacity=round_capacity,
        keep_nothing=remat == "all",
    )
    return out, (_stats_of_plans(plans, round_capacity, placement) if return_stats else None)


def activate(hidden: jax.Array, activation: Activation) -> jax.Array:
    """The activation of an expert on [..., inner]; "swiglu" and ClampedSwiGLU halve the last axis."""
    if isinstance(activation, ClampedSwiGLU):
        return activation(hidden)
    if activation == "swiglu":
        return swiglu(hidden)
    if activation == "gelu":
        return jax.nn.gelu(hidden, approximate=True)
    return jnp.square(jax.nn.relu(hidden))


def inner_size(ffn: int, activation: Activation) -> int:
    """Columns of wi for experts of inner size `ffn`."""
    return 2 * ffn if activation == "swiglu" or isinstance(activation, ClampedSwiGLU) else ffn


def check_activation(op: str, activation: Any) -> None:
    """Raises ValueError for what is no Activation."""
    names, _ = get_args(Activation)
    if activation not in get_args(names) and not isinstance(activation, ClampedSwiGLU):
        raise ValueError(
            f"{op}: activation: expected one of {get_args(names)} or a ClampedSwiGLU, got {activation!r}"
        )


@jax.named_scope("wideep_experts")
def _experts(rows, params, group_sizes, *, activation, implementation):
    # Rows past a group's end stay unspecified throughout, with their gradients: neither the products nor combine
    # look at them.
    wi, wo, bi, bo = params
    multiply = functools.partial(grouped_matmul, implementation=implementation, zero_tail=False)
    hidden = multiply(rows, wi, group_sizes)
    if bi is not None:
        hidden = add_expert_bias(hidden, bi, group_sizes, implementation)
    hidden = checkpoint_name(hidden, _microbatches.HIDDEN)
    if activation == "swiglu":
        inner = swiglu_of_groups(hidden, group_sizes, implementation)
    else:
        inner = activate(hidden, activation)
    y = multiply(inner, wo, group_sizes)
    return y if bo is None else add_expert_bias(y, bo, group_sizes, implementation)


def _weighed_experts(rows, row_weights, params, group_sizes, *, experts, weigh_input):
    if weigh_input:
        rows, row_weights = rows * row_weights[:, None].astype(rows.dtype), jnp.ones_like(row_weights)
    return experts(rows, params, group_sizes), row_weights


def _stats_of_plans(plans, round_capacity, placement):
    """The sums over microbatches."""

    def total(count):
        return functools.reduce(operator.add, map(count, plans))

    dropped = total(lambda plan: plan.overflow)
    spilled = jnp.zeros_like(dropped)
    if round_capacity is not None:
        spilled = total(lambda plan: jnp.maximum(plan.num_rows - round_capacity, 0))
    return _stats(total(lambda plan: plan.tokens_per_expert), dropped, spilled, plans[0].group, placement)


def _stats(counts, dropped, spilled, group, placement):
    """Statistics from selections per physical expert."""
    rows_per_rank = counts.reshape(group.num_ranks, -1).sum(axis=1)
    if placement is not None:
        counts = placement.to_logical_counts(counts)
    return MoEStats(counts, dropped, rows_per_rank=rows_per_rank, spilled=spilled)


def _low_latency_stats(topk_idx, num_rows, group, placement):
    counted = jnp.where(topk_idx >= 0, topk_idx, group.num_experts).reshape(-1)
    own = jnp.zeros(group.num_experts, jnp.int32).at[counted].add(1, mode="drop")
    own, num_rows = _ffi.vary([own, num_rows], group.axis)
    counts = jax.lax.psum(own, group.axis)
    wanted = counts.reshape(group.num_ranks, -1).sum(axis=1)[jax.lax.axis_index(group.axis)]
    return _stats(counts, wanted - num_rows, jnp.zeros_like(num_rows), group, placement)


def _check_plan(op, plan, x, group, microbatches, overflow):
    if plan.group is not group:
        raise ValueError(
            f"{op}: plan: expected one made over the group that was passed, got one of another ExpertGroup; use one "
            "group for make_plan, dispatch and combine"
        )
    if plan.num_tokens != x.shape[0]:
        raise ValueError(f"{op}: plan: expected one for {x.shape[0]} tokens, got one for {plan.num_tokens}")
    if microbatches > 1:
        raise ValueError(
            f"{op}: plan: expected None for microbatches={microbatches}, each of which makes its own"
        )
    if overflow == "spill" and plan.capacity < group.num_ranks * plan.num_tokens * plan.top_k:
        raise ValueError(
            f"{op}: plan: expected one that drops nothing for overflow='spill', got one of capacity {plan.capacity}; "
            "leave capacity out of make_plan and pass it to moe_ffn"
        )


def _check_experts(op, x, wi, wo, bi, bo, group, activation):
    check_activation(op, activation)
    _check.shape(op, "wo", wo, (group.local_experts, "ffn", group.hidden), "pass this rank's experts only")
    inner = inner_size(wo.shape[1], activation)
    _check.shape(
        op,
        "wi",
        wi,
        (group.local_experts, group.hidden, inner),
        "wi has 2 * ffn columns (gate before up) for gated activations, otherwise ffn",
    )
    arrays = {"wi": wi, "wo": wo}
    for name, bias, size in (("bi", bi, inner), ("bo", bo, group.hidden)):
        if bias is not None:
            _check.shape(
                op, name, bias, (group.local_experts, size), "one bias for each of this rank's experts"
            )
            arrays[name] = bias
    for name, array in arrays.items():
        _check.dtype(op, name, array, (x.dtype, jnp.float32), "cast x and the experts to one dtype")
