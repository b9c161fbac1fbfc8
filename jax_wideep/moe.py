"""moe_ffn: the experts of a Mixture-of-Experts layer, from a routing decision to the tokens' outputs.

topk_idx, topk_weights (routing)  ->  plan  ->  dispatch  ->  experts  ->  combine       mode "throughput"
                                  ->  ll_dispatch  ->  experts  ->  ll_combine           mode "low_latency"
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_wideep import _check, _ffi
from jax_wideep._expert_bias import add_expert_bias
from jax_wideep._swiglu import ClampedSwiGLU, swiglu, swiglu_of_groups
from jax_wideep._types import Float, Float32, Int32
from jax_wideep.exchange import combine, dispatch
from jax_wideep.group import ExpertGroup
from jax_wideep.grouped_matmul import Implementation, grouped_matmul
from jax_wideep.low_latency import Quantize, ll_combine, ll_dispatch
from jax_wideep.placement import Placement
from jax_wideep.plan import DispatchPlan, Overflow, make_plan

Mode = Literal["throughput", "low_latency"]
Activation = Literal["swiglu", "gelu", "relu2"] | ClampedSwiGLU

#: Names that jax.checkpoint policies can save or offload (jax.checkpoint_policies.save_only_these_names): the
#: rows that dispatch brought with their weights, the experts' inner activations, what combine returned, and
#: the plan's integers. The backward pass dispatches again unless both rows and plan are saved.
CHECKPOINT_NAMES = ("wideep_dispatch_rows", "wideep_expert_hidden", "wideep_combine_output", "wideep_plan")
_ROWS, _HIDDEN, _OUTPUT, _PLAN = CHECKPOINT_NAMES


class MoEStats(NamedTuple):
    """What a layer saw; a pytree of arrays.

    Attributes:
      tokens_per_expert: selections of every (logical) expert, over all ranks, dropped ones included.
      overflow: selections dropped; on this rank's receive side from moe_ffn, over all ranks from the layers.
      aux_loss: load-balance loss of the router over all ranks; None from moe_ffn, which does not route.
      z_loss: mean squared logsumexp of the router's logits over all ranks; None from moe_ffn.
      rows_per_rank: selections of the experts that each rank hosts, dropped ones included.
    """

    tokens_per_expert: Int32[jax.Array, " experts"]
    overflow: Int32[jax.Array, ""]
    aux_loss: Float32[jax.Array, ""] | None = None
    z_loss: Float32[jax.Array, ""] | None = None
    rows_per_rank: Int32[jax.Array, " ranks"] | None = None


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
      capacity: rows a rank can receive, see make_plan; throughput mode only.
      overflow: what happens above the capacity, see make_plan.
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
    if mode == "low_latency":
        if plan is not None or capacity is not None:
            raise ValueError(
                f"{op}: plan, capacity: expected None in mode 'low_latency', which makes no plan and drops nothing; "
                "leave them out, or use mode='throughput'"
            )
        if weigh_input:
            if group.top_k != 1:
                raise ValueError(
                    f"{op}: weigh_input: expected top_k = 1 in mode 'low_latency', got {group.top_k}; use "
                    "mode='throughput'"
                )
            x, topk_weights = x * topk_weights.astype(x.dtype), jnp.ones_like(topk_weights)
        experts = functools.partial(
            _experts, wi=wi, wo=wo, bi=bi, bo=bo, activation=activation, implementation=implementation
        )
        out = _low_latency(x, topk_idx, topk_weights, experts, group, quantize)
        return out, (_low_latency_stats(topk_idx, group, placement) if return_stats else None)

    if plan is None:
        with jax.named_scope("wideep_plan"):
            plan = make_plan(topk_idx, group, capacity=capacity, overflow=overflow)
    elif plan.group is not group:
        raise ValueError(
            f"{op}: plan: expected one made over the group that was passed, got one of another ExpertGroup; use one "
            "group for make_plan, dispatch and combine"
        )
    elif plan.num_tokens != x.shape[0]:
        raise ValueError(f"{op}: plan: expected one for {x.shape[0]} tokens, got one for {plan.num_tokens}")
    plan = checkpoint_name(plan, _PLAN)
    # No op below looks at rows past the plan's, so nobody has to clear them.
    with jax.named_scope("wideep_dispatch"):
        rows, row_weights = checkpoint_name(dispatch(x, topk_weights, plan, zero_tail=False), _ROWS)
    if weigh_input:
        rows, row_weights = rows * row_weights[:, None].astype(rows.dtype), jnp.ones_like(row_weights)
    y = _experts(
        rows,
        plan.group_sizes,
        wi=wi,
        wo=wo,
        bi=bi,
        bo=bo,
        activation=activation,
        implementation=implementation,
    )
    with jax.named_scope("wideep_combine"):
        out = checkpoint_name(combine(y, row_weights, plan, zero_tail=False), _OUTPUT)
    return out, (_stats(plan.tokens_per_expert, plan.overflow, group, placement) if return_stats else None)


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
def _experts(rows, group_sizes, *, wi, wo, bi, bo, activation, implementation):
    # Rows past a group's end stay unspecified throughout, with their gradients: neither the products nor combine
    # look at them.
    multiply = functools.partial(grouped_matmul, implementation=implementation, zero_tail=False)
    hidden = multiply(rows, wi, group_sizes)
    if bi is not None:
        hidden = add_expert_bias(hidden, bi, group_sizes, implementation)
    hidden = checkpoint_name(hidden, _HIDDEN)
    if activation == "swiglu":
        inner = swiglu_of_groups(hidden, group_sizes, implementation)
    else:
        inner = activate(hidden, activation)
    y = multiply(inner, wo, group_sizes)
    return y if bo is None else add_expert_bias(y, bo, group_sizes, implementation)


def _low_latency(x, topk_idx, topk_weights, experts, group, quantize):
    def one_microbatch(x, topk_idx, topk_weights):
        with jax.named_scope("wideep_dispatch"):
            recv = ll_dispatch(x, topk_idx, group, quantize=quantize, zero_tail=False)
        recv = dataclasses.replace(
            recv,
            rows=checkpoint_name(recv.rows, _ROWS),
            counts=checkpoint_name(recv.counts, _PLAN),
            row_source=checkpoint_name(recv.row_source, _PLAN),
        )
        y = experts(recv.rows, recv.counts)
        with jax.named_scope("wideep_combine"):
            return checkpoint_name(ll_combine(y, topk_weights, recv, zero_tail=False), _OUTPUT)

    tokens = x.shape[0]
    if tokens <= group.chunk:
        return one_microbatch(x, topk_idx, topk_weights)
    batches = -(-tokens // group.chunk)
    spare = batches * group.chunk - tokens

    def split(array: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(array, ((0, spare), (0, 0)), constant_values=fill)
        return padded.reshape(batches, group.chunk, array.shape[1])

    pieces = (split(x, 0), split(topk_idx, -1), split(topk_weights, 0))
    return jax.lax.map(lambda piece: one_microbatch(*piece), pieces).reshape(-1, x.shape[1])[:tokens]


def _stats(counts, dropped, group, placement):
    """Statistics from selections per physical expert."""
    rows_per_rank = counts.reshape(group.num_ranks, -1).sum(axis=1)
    if placement is not None:
        counts = placement.to_logical_counts(counts)
    return MoEStats(counts, dropped, rows_per_rank=rows_per_rank)


def _low_latency_stats(topk_idx, group, placement):
    counted = jnp.where(topk_idx >= 0, topk_idx, group.num_experts).reshape(-1)
    own = jnp.zeros(group.num_experts, jnp.int32).at[counted].add(1, mode="drop")
    (own,) = _ffi.vary([own], group.axis)
    (dropped,) = _ffi.vary([jnp.int32(0)], tuple(_ffi.varying_axes(own)))
    return _stats(jax.lax.psum(own, group.axis), dropped, group, placement)


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
