"""Every op in plain JAX collectives: the backend "xla", which runs on any device and across hosts, and the
oracle that the compiled backends are tested against.

Functions have the names and signatures of `_ffi`. They are written to be read: whole activations are
gathered, so memory and traffic grow with the number of ranks. Integer outputs equal the compiled backends'
exactly; float sums may differ in their order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_wideep._types import Float, Float32, Int32
from jax_wideep.group import ExpertGroup
from jax_wideep.quantize import dequantize, quantize

__all__ = [
    "combine", "combine_grad", "dispatch", "dispatch_grad", "ll_combine", "ll_combine_grad", "ll_dispatch", "plan",
    "quantize",
]  # fmt: skip


def _gather(array: jax.Array, group: ExpertGroup) -> jax.Array:
    """[ranks, *array.shape]: every rank's array, in rank order."""
    if group.num_ranks == 1:
        return array[None]
    return jax.lax.all_gather(array, group.axis)


def _sum_at_home(array: jax.Array, group: ExpertGroup) -> jax.Array:
    """Sums [ranks * n, ...] over the ranks; each keeps its own n."""
    if array.shape[0] == 0 or group.num_ranks == 1:
        return array  # a scatter of nothing is not allowed
    return jax.lax.psum_scatter(array, group.axis, scatter_dimension=0, tiled=True)


def _place_in_order(key: jax.Array, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """How many entries come before each one with the same key, and how many there are of each key.

    Entries whose key is num_keys or more are not counted.
    """
    order = jnp.argsort(key, stable=True)
    counts = jnp.zeros(num_keys, jnp.int32).at[key].add(1, mode="drop")
    first = jnp.cumsum(counts) - counts
    place = jnp.arange(key.size, dtype=jnp.int32) - first[jnp.minimum(key[order], num_keys - 1)]
    return jnp.zeros(key.size, jnp.int32).at[order].set(place, unique_indices=True), counts


# ---- throughput shape ----


def plan(
    topk_idx: Int32[jax.Array, "tokens k"], group: ExpertGroup, capacity: int, overflow_is_error: bool
) -> tuple[jax.Array, ...]:
    """The arrays of a DispatchPlan, in its order. Indices out of range are masked."""
    del overflow_is_error  # refused by make_plan
    tokens, top_k = topk_idx.shape
    num_experts, num_ranks, local_experts = group.num_experts, group.num_ranks, group.local_experts
    me = jax.lax.axis_index(group.axis)
    expert = _gather(topk_idx, group).reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    tokens_per_expert = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")

    # Capacity: selections in order until the rank is full.
    rank = expert // local_experts
    arrival, _ = _place_in_order(rank, num_ranks)
    kept = expert < num_experts
    if capacity < expert.size:  # otherwise there is room, and `arrival` need not be known
        kept &= arrival < capacity
    overflow = jnp.sum((expert < num_experts) & ~kept & (rank == me), dtype=jnp.int32)

    # Rows of a rank are packed by expert.
    expert = jnp.where(kept, expert, num_experts)
    place, group_sizes = _place_in_order(expert, num_experts)
    sizes_by_rank = group_sizes.reshape(num_ranks, local_experts)
    first_row = (jnp.cumsum(sizes_by_rank, axis=1) - sizes_by_rank).reshape(-1)
    row = jnp.where(kept, first_row[jnp.minimum(expert, num_experts - 1)] + place, -1)
    rank = jnp.where(kept, rank, -1)

    here = jnp.where(rank == me, row, capacity)
    row_source = (
        jnp.full(capacity, -1, jnp.int32).at[here].set(jnp.arange(expert.size, dtype=jnp.int32), mode="drop")
    )
    # `arrival` leaves no gaps: a rank that is full stays full.
    arrival_rows = (
        jnp.full(capacity, -1, jnp.int32).at[jnp.where(rank == me, arrival, capacity)].set(row, mode="drop")
    )
    own = (num_ranks, tokens, top_k)
    return (
        sizes_by_rank[me],
        jnp.sum(sizes_by_rank[me]),
        overflow,
        tokens_per_expert,
        rank.reshape(own)[me],
        row.reshape(own)[me],
        row_source,
        arrival_rows,
        jnp.sum(rank.reshape(num_ranks, -1) == me, axis=1, dtype=jnp.int32),
    )


def dispatch(
    x: Float[jax.Array, "tokens hidden"], weights: Float32[jax.Array, "tokens k"], plan, zero_tail: bool
) -> tuple[Float[jax.Array, "capacity hidden"], Float32[jax.Array, " capacity"]]:
    del zero_tail  # the tail is always zero here
    filled = plan.row_source >= 0
    source = jnp.maximum(plan.row_source, 0)
    x_all = _gather(x, plan.group).reshape(-1, x.shape[1])
    rows = jnp.where(filled[:, None], _take(x_all, source // plan.top_k), 0)
    row_weights = jnp.where(filled, _take(_gather(weights, plan.group).reshape(-1), source), 0)
    return rows, row_weights


def dispatch_grad(
    drows: Float[jax.Array, "capacity hidden"], drow_weights: Float32[jax.Array, " capacity"], plan
) -> tuple[Float[jax.Array, "tokens hidden"], Float32[jax.Array, "tokens k"]]:
    """dx[token] = sum of drows over its rows; dweights[token, k] = drow_weights of its row."""
    dx = _home_sum(drows, None, plan)
    selections = plan.group.num_ranks * plan.num_tokens * plan.top_k
    at = jnp.where(plan.row_source >= 0, plan.row_source, selections)
    dweights = jnp.zeros(selections, jnp.float32).at[at].add(drow_weights, mode="drop")
    dweights = _sum_at_home(dweights, plan.group).reshape(plan.num_tokens, plan.top_k)
    return dx.astype(drows.dtype), dweights


def combine(
    y: Float[jax.Array, "capacity hidden"], row_weights: Float32[jax.Array, " capacity"], plan
) -> Float[jax.Array, "tokens hidden"]:
    """out[token] = sum of row_weights * y over its rows, in float32."""
    return _home_sum(y, row_weights, plan).astype(y.dtype)


def combine_grad(
    dout: Float[jax.Array, "tokens hidden"],
    y: Float[jax.Array, "capacity hidden"],
    row_weights: Float32[jax.Array, " capacity"],
    plan,
    zero_tail: bool,
) -> tuple[Float[jax.Array, "capacity hidden"], Float32[jax.Array, " capacity"]]:
    """dy[row] = row_weights * dout[token]; drow_weights[row] = <y[row], dout[token]>."""
    del zero_tail
    filled = plan.row_source >= 0
    dout_all = _gather(dout, plan.group).reshape(-1, dout.shape[1])
    douts = _take(dout_all, jnp.maximum(plan.row_source, 0) // plan.top_k).astype(jnp.float32)
    dy = jnp.where(filled[:, None], row_weights[:, None] * douts, 0)
    drow_weights = jnp.where(filled, jnp.sum(douts * y.astype(jnp.float32), axis=1), 0)
    return dy.astype(y.dtype), drow_weights


def _take(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of `array`; also where it has none, and then nothing that is read."""
    if array.shape[0] == 0:
        return jnp.zeros((indices.shape[0], *array.shape[1:]), array.dtype)
    return array[indices]


def _home_sum(
    rows: Float[jax.Array, "capacity hidden"], row_weights: Float32[jax.Array, " capacity"] | None, plan
) -> Float32[jax.Array, "tokens hidden"]:
    """Each token's sum over its rows on all ranks, weighted if there are weights."""

    def weighted(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
        rows = rows.astype(jnp.float32)
        return rows if weights is None else weights[:, None] * rows

    if plan.group.num_ranks == 1:
        # All rows are here: tokens look theirs up, which GPUs do several times faster than a scattered sum.
        sums = jnp.zeros((plan.num_tokens, rows.shape[1]), jnp.float32)
        for dest_row in plan.dest_row.T:
            at = jnp.maximum(dest_row, 0)
            found = weighted(_take(rows, at), None if row_weights is None else _take(row_weights, at))
            sums += jnp.where(dest_row[:, None] >= 0, found, 0)
        return sums
    num_tokens = plan.group.num_ranks * plan.num_tokens
    token = jnp.where(plan.row_source >= 0, plan.row_source // plan.top_k, num_tokens)
    sums = jnp.zeros((num_tokens, rows.shape[1]), jnp.float32)
    return _sum_at_home(sums.at[token].add(weighted(rows, row_weights), mode="drop"), plan.group)


# ---- low-latency shape ----


def ll_dispatch(
    payload: jax.Array,
    scales: Float32[jax.Array, "tokens blocks"] | None,
    topk_idx: Int32[jax.Array, "tokens k"],
    group: ExpertGroup,
    rows_dtype,
    zero_tail: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """rows, row_scales (None unless rows are FP8), counts, row_source.

    Indices out of range, and an expert's second occurrence in a token, are masked.
    """
    del zero_tail
    top_k = topk_idx.shape[1]
    num_experts, local_experts = group.num_experts, group.local_experts
    expert_rows = group.num_ranks * group.chunk
    me = jax.lax.axis_index(group.axis)
    again = jnp.any(jnp.tril(topk_idx[:, :, None] == topk_idx[:, None, :], k=-1), axis=2)
    valid = (topk_idx >= 0) & (topk_idx < num_experts) & ~again
    expert = _gather(jnp.where(valid, topk_idx, num_experts), group).reshape(-1)

    place, counts = _place_in_order(expert, num_experts)
    local = expert - me * local_experts
    is_local = (local >= 0) & (local < local_experts)
    row = jnp.where(is_local, local * expert_rows + place, local_experts * expert_rows)
    row_source = (
        jnp.full(local_experts * expert_rows, -1, jnp.int32)
        .at[row]
        .set(jnp.arange(expert.size, dtype=jnp.int32), mode="drop")
    )
    filled = (row_source >= 0)[:, None]
    token = jnp.maximum(row_source, 0) // top_k

    def received(array: jax.Array) -> jax.Array:
        everyone = _gather(array, group).reshape(-1, array.shape[1])
        return jnp.where(filled, _take(everyone, token), jnp.zeros((), array.dtype))

    rows = received(payload)
    row_scales = None
    if scales is not None:
        row_scales = received(scales)
        if rows_dtype != payload.dtype:
            rows, row_scales = dequantize(rows, row_scales, rows_dtype), None
    packed = (local_experts, expert_rows)
    if row_scales is not None:
        row_scales = row_scales.reshape(*packed, -1)
    return (
        rows.reshape(*packed, -1),
        row_scales,
        counts.reshape(group.num_ranks, local_experts)[me],
        row_source.reshape(packed),
    )


def _weight_of_rows(topk_weights: jax.Array, row_source: jax.Array, group: ExpertGroup) -> jax.Array:
    everyone = _gather(topk_weights, group).reshape(-1)
    return jnp.where(row_source >= 0, _take(everyone, jnp.maximum(row_source, 0)), 0)


def ll_combine(
    y: Float[jax.Array, "local_experts expert_rows hidden"],
    topk_weights: Float32[jax.Array, "tokens k"],
    topk_idx: Int32[jax.Array, "tokens k"],
    counts: Int32[jax.Array, " local_experts"],
    row_source: Int32[jax.Array, "local_experts expert_rows"],
    group: ExpertGroup,
) -> Float[jax.Array, "tokens hidden"]:
    """out[token] = sum of topk_weights * y over its rows, in float32."""
    del topk_idx, counts  # row_source says which rows are filled, and whose they are
    tokens, top_k = topk_weights.shape
    source = row_source.reshape(-1)
    weights = _weight_of_rows(topk_weights, source, group)
    rows = y.reshape(-1, y.shape[2]).astype(jnp.float32)
    num_tokens = group.num_ranks * tokens
    token = jnp.where(source >= 0, source // top_k, num_tokens)
    sums = jnp.zeros((num_tokens, y.shape[2]), jnp.float32)
    sums = sums.at[token].add(weights[:, None] * rows, mode="drop")
    return _sum_at_home(sums, group).astype(y.dtype)


def ll_combine_grad(
    dout: Float[jax.Array, "tokens hidden"],
    y: Float[jax.Array, "local_experts expert_rows hidden"],
    topk_weights: Float32[jax.Array, "tokens k"],
    topk_idx: Int32[jax.Array, "tokens k"],
    counts: Int32[jax.Array, " local_experts"],
    row_source: Int32[jax.Array, "local_experts expert_rows"],
    group: ExpertGroup,
    zero_tail: bool,
) -> tuple[jax.Array, Float32[jax.Array, "tokens k"]]:
    """dy[row] = topk_weights * dout[token]; dtopk_weights[token, k] = <y[row], dout[token]>."""
    del topk_idx, counts, zero_tail
    tokens, top_k = topk_weights.shape
    source = row_source.reshape(-1)
    filled = source >= 0
    douts = _take(_gather(dout, group).reshape(-1, dout.shape[1]), jnp.maximum(source, 0) // top_k)
    douts = douts.astype(jnp.float32)
    dy = jnp.where(filled[:, None], _weight_of_rows(topk_weights, source, group)[:, None] * douts, 0)
    rows = y.reshape(-1, y.shape[2]).astype(jnp.float32)
    selections = group.num_ranks * tokens * top_k
    dweights = jnp.zeros(selections, jnp.float32)
    dweights = dweights.at[jnp.where(filled, source, selections)].add(
        jnp.sum(douts * rows, axis=1), mode="drop"
    )
    return dy.reshape(y.shape).astype(y.dtype), _sum_at_home(dweights, group).reshape(tokens, top_k)
