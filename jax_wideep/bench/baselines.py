"""What a JAX user would otherwise write: the same job with XLA's own collectives, without dropping a token.

Every baseline has two halves, called inside `jax.shard_map` over the ranks' axes:

    rows, group_sizes, state = baseline.dispatch(x, topk_idx, setting)
    out = baseline.combine(y, topk_weights, state, setting)

`rows` [capacity, hidden] are packed by expert and, inside an expert, in order of source rank, token, k, as
the library's; `out` is the float32 sum of topk_weights * y over each token's experts. All index arithmetic
is on integers; rows are gathered wherever they can be, forward and backward, which is what XLA compiles best.

| name | how | rows that cross a link |
|---|---|---|
| padded all_to_all | every pair of ranks exchanges a block of `pad` rows | ranks * pad |
| ring | all_gather of every token, psum_scatter of every token's partial sum | ranks * tokens |
| ragged_all_to_all | exact sizes, from counts that the ranks gather first | the selections |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_wideep import _ffi
from jax_wideep._types import Float, Int32


@dataclasses.dataclass(frozen=True)
class Setting:
    """Static sizes of a baseline.

    Attributes:
      axis: mesh axes of the ranks, in rank order.
      num_ranks: ranks (R).
      num_experts: experts over all ranks.
      capacity: rows that a rank can receive. The baselines count nothing: more rows than that are lost.
      pad: rows of a block of the padded all_to_all; fewer than a pair of ranks exchanges are lost.
    """

    axis: tuple[str, ...]
    num_ranks: int
    num_experts: int
    capacity: int
    pad: int

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.num_ranks


def no_drop_setting(
    axis: tuple[str, ...],
    num_ranks: int,
    num_experts: int,
    tokens: int,
    top_k: int,
    *,
    capacity: int | None = None,
    pad: int | None = None,
) -> Setting:
    """Sizes that can lose nothing, whatever the routing; `capacity` and `pad` override them."""
    worst_pair = tokens * top_k
    return Setting(
        axis=tuple(axis),
        num_ranks=num_ranks,
        num_experts=num_experts,
        capacity=num_ranks * worst_pair if capacity is None else capacity,
        pad=worst_pair if pad is None else pad,
    )


class Baseline(NamedTuple):
    """One way to do the job.

    Attributes:
      dispatch: (x, topk_idx, setting) -> rows, group_sizes, state.
      combine: (y, topk_weights, state, setting) -> out.
      missing_on: platforms whose XLA lacks the collective, with the reason.
    """

    dispatch: Callable[..., tuple[jax.Array, jax.Array, Any]]
    combine: Callable[..., jax.Array]
    missing_on: Mapping[str, str] = MappingProxyType({})


def moe(
    baseline: Baseline,
    x: Float[jax.Array, "tokens hidden"],
    topk_idx: Int32[jax.Array, "tokens k"],
    topk_weights: Float[jax.Array, "tokens k"],
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    setting: Setting,
) -> Float[jax.Array, "tokens hidden"]:
    """dispatch, `experts(rows, group_sizes)`, combine: what `jax_wideep.moe_ffn` does."""
    rows, group_sizes, state = baseline.dispatch(x, topk_idx, setting)
    return baseline.combine(experts(rows, group_sizes), topk_weights, state, setting)


# ---- index arithmetic ----


class _Sorted(NamedTuple):
    """A rank's selections in order of expert."""

    order: jax.Array  # [tokens * k] selection at each place
    place: jax.Array  # [tokens, k] place of each selection
    counts: jax.Array  # [ranks, local_experts]
    rank: jax.Array  # [tokens, k] destination, num_ranks where masked


def _sort(topk_idx: jax.Array, setting: Setting) -> _Sorted:
    expert = jnp.where(topk_idx >= 0, topk_idx, setting.num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    selections = jnp.arange(expert.size, dtype=jnp.int32)
    place = jnp.zeros_like(selections).at[order].set(selections, unique_indices=True)
    counts = jnp.zeros(setting.num_experts, jnp.int32).at[expert].add(1, mode="drop")
    return _Sorted(
        order,
        place.reshape(topk_idx.shape),
        counts.reshape(setting.num_ranks, setting.local_experts),
        (expert // setting.local_experts).reshape(topk_idx.shape),
    )


def _exclusive_cumsum(counts: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(counts, axis=axis) - counts


def _take(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Rows at `at`; zeros where that is out of range. No row is taken twice unless it is summed over."""
    return rows.at[at].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _move(rows: jax.Array, at: jax.Array, back: jax.Array) -> jax.Array:
    """Rows at `at`, where `back` [rows, copies] says where each row goes: its gradient is a gather as well,
    while JAX's own would be a scatter in float32, slower and several times larger."""
    del back
    return _take(rows, at)


def _move_fwd(rows: jax.Array, at: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(rows, at), back


def _move_bwd(back: jax.Array, dout: jax.Array) -> tuple[jax.Array, None, None]:
    return _weighted_sum(dout, back, jnp.ones(back.shape, jnp.float32)), None, None


_move.defvjp(_move_fwd, _move_bwd)


def _expert_order(counts: jax.Array, first_slot: jax.Array, capacity: int) -> jax.Array:
    """The arrival slot of each row of the expert order; -1 past the last row.

    Args:
      counts: [ranks, local_experts] rows that came from each source for each expert.
      first_slot: [ranks] where a source's rows begin; they lie there in order of expert.
      capacity: rows of the expert order.
    """
    runs = counts.T.reshape(-1)  # expert major, then source: the order wanted
    run_start = _exclusive_cumsum(runs)
    slot_start = (first_slot[:, None] + _exclusive_cumsum(counts, axis=1)).T.reshape(-1)
    row = jnp.arange(capacity, dtype=jnp.int32)
    # An empty run starts where the next one does, so the last run that starts here is the one that is filled.
    run = jnp.searchsorted(run_start, row, side="right") - 1
    return jnp.where(row < jnp.sum(counts), slot_start[run] + row - run_start[run], -1)


def _inverse(slot_of_row: jax.Array, num_slots: int) -> jax.Array:
    """The row in each slot; past the last row where it holds none."""
    capacity = slot_of_row.shape[0]
    at = jnp.where(slot_of_row >= 0, slot_of_row, num_slots)
    row = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.full(num_slots, capacity, jnp.int32).at[at].set(row, mode="drop")


def _weighted_sum(rows: jax.Array, at: jax.Array, weights: jax.Array) -> jax.Array:
    """out[t] = sum over k of weights[t, k] * rows[at[t, k]] in float32; nothing where `at` is out of range."""
    total = jnp.zeros((at.shape[0], rows.shape[1]), jnp.float32)
    for k in range(at.shape[1]):
        total = total + weights[:, k, None].astype(jnp.float32) * _take(rows, at[:, k]).astype(jnp.float32)
    return total.astype(rows.dtype)


# ---- padded all_to_all ----


def _padded_dispatch(x, topk_idx, setting):
    mine = _sort(topk_idx, setting)
    top_k, pad, num_ranks = topk_idx.shape[1], setting.pad, setting.num_ranks
    num_slots = num_ranks * pad
    per_rank = mine.counts.sum(axis=1)
    first = _exclusive_cumsum(per_rank)
    slot = jnp.arange(pad, dtype=jnp.int32)
    place = jnp.minimum(first[:, None] + slot, max(mine.order.size - 1, 0))
    selection = jnp.where(slot < per_rank[:, None], mine.order[place], topk_idx.size).reshape(-1)
    # Where each selection's row lies in the blocks that go out, and in those that come home.
    in_block = mine.place - first[jnp.minimum(mine.rank, num_ranks - 1)]
    home_slot = jnp.where((mine.rank < num_ranks) & (in_block < pad), mine.rank * pad + in_block, num_slots)

    blocks = _move(x, selection // top_k, home_slot).reshape(num_ranks, pad, -1)
    blocks = jax.lax.all_to_all(blocks, setting.axis, 0, 0, tiled=True).reshape(num_slots, -1)
    counts = jax.lax.all_to_all(mine.counts, setting.axis, 0, 0, tiled=True)
    slots = _expert_order(counts, jnp.arange(num_ranks, dtype=jnp.int32) * pad, setting.capacity)
    row_of_slot = _inverse(slots, num_slots)
    slots = jnp.where(slots >= 0, slots, num_slots)
    rows = _move(blocks, slots, row_of_slot[:, None])
    return rows, counts.sum(axis=0), (slots, row_of_slot, selection, home_slot)


def _padded_combine(y, topk_weights, state, setting):
    slots, row_of_slot, selection, home_slot = state
    blocks = _move(y, row_of_slot, slots[:, None]).reshape(setting.num_ranks, setting.pad, -1)
    home = jax.lax.all_to_all(blocks, setting.axis, 0, 0, tiled=True).reshape(selection.size, -1)
    return _sum_of_selections(home, home_slot, selection, topk_weights)


def _sum_of_selections(home, home_slot, selection, topk_weights):
    """out[t] = sum over k of topk_weights[t, k] * home[home_slot[t, k]], in float32."""
    chosen = _move(home, home_slot.reshape(-1), selection[:, None])
    chosen = chosen.reshape(*home_slot.shape, -1).astype(jnp.float32)
    return jnp.sum(topk_weights[:, :, None].astype(jnp.float32) * chosen, axis=1).astype(home.dtype)


# ---- ring ----


def _ring_dispatch(x, topk_idx, setting):
    tokens, top_k = topk_idx.shape
    everyone = jax.lax.all_gather(x, setting.axis, tiled=True)
    expert = jax.lax.all_gather(topk_idx, setting.axis, tiled=True).reshape(-1)
    local = expert - jax.lax.axis_index(setting.axis) * setting.local_experts
    local = jnp.where((local >= 0) & (local < setting.local_experts), local, setting.local_experts)
    # A stable counting sort: few local experts, many selections.
    chosen = (local[None, :] == jnp.arange(setting.local_experts, dtype=jnp.int32)[:, None]).astype(jnp.int32)
    so_far = jnp.cumsum(chosen, axis=1)
    group_sizes = so_far[:, -1]
    row = jnp.sum(chosen * (_exclusive_cumsum(group_sizes)[:, None] + so_far - 1), axis=0)
    row = jnp.where(local < setting.local_experts, row, setting.capacity)
    selections = jnp.arange(expert.size, dtype=jnp.int32)
    source = jnp.full(setting.capacity, expert.size, jnp.int32).at[row].set(selections, mode="drop")
    rows = _take(everyone, source // top_k)
    return rows, group_sizes, (source, tokens)


def _ring_combine(y, topk_weights, state, setting):
    source, tokens = state
    top_k = topk_weights.shape[1]
    weights = jax.lax.all_gather(topk_weights, setting.axis, tiled=True).reshape(-1)
    weighted = _take(weights, source)[:, None].astype(jnp.float32) * y.astype(jnp.float32)
    partial = jnp.zeros((setting.num_ranks * tokens, y.shape[1]), jnp.float32)
    partial = partial.at[source // top_k].add(weighted, mode="drop")
    return jax.lax.psum_scatter(partial, setting.axis, tiled=True).astype(y.dtype)


# ---- ragged_all_to_all ----


class RaggedSizes(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all` on one rank, each [ranks] int32."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array

    def reversed(self, pair: jax.Array, me: jax.Array) -> RaggedSizes:
        """The way home: what came from a rank goes back to where it lay there."""
        return RaggedSizes(
            _exclusive_cumsum(self.recv_sizes),
            self.recv_sizes,
            _exclusive_cumsum(pair, axis=1)[:, me],
            self.send_sizes,
        )


def ragged_sizes(pair: Int32[jax.Array, "ranks ranks"], me: jax.Array) -> RaggedSizes:
    """Sizes and offsets on rank `me`, from `pair[source, destination]` rows; arrivals in order of source."""
    return RaggedSizes(_exclusive_cumsum(pair[me]), pair[me], _exclusive_cumsum(pair)[me], pair[:, me])


def _ragged_all_to_all(operand: jax.Array, rows: int, sizes: Any, setting: Setting) -> jax.Array:
    # The result varies over what the output argument varies over: not what zeros do.
    output = _ffi.vary([jnp.zeros((rows, operand.shape[1]), operand.dtype)], setting.axis)[0]
    return jax.lax.ragged_all_to_all(operand, output, *sizes, axis_name=setting.axis)


def _ragged_dispatch(x, topk_idx, setting):
    mine = _sort(topk_idx, setting)
    me = jax.lax.axis_index(setting.axis)
    counts = jax.lax.all_gather(mine.counts, setting.axis)  # [source, destination, local expert]
    pair = counts.sum(axis=2)
    sizes = ragged_sizes(pair, me)
    place = jnp.where(mine.rank < setting.num_ranks, mine.place, topk_idx.size)
    operand = _move(x, mine.order // topk_idx.shape[1], place)
    arrived = _ragged_all_to_all(operand, setting.capacity, sizes, setting)
    slots = _expert_order(counts[:, me], _exclusive_cumsum(sizes.recv_sizes), setting.capacity)
    row_of_slot = _inverse(slots, setting.capacity)
    slots = jnp.where(slots >= 0, slots, setting.capacity)
    rows = _move(arrived, slots, row_of_slot[:, None])
    return rows, counts[:, me].sum(axis=0), (slots, row_of_slot, mine.order, place, sizes.reversed(pair, me))


def _ragged_combine(y, topk_weights, state, setting):
    slots, row_of_slot, selection, place, sizes = state
    operand = _move(y, row_of_slot, slots[:, None])
    home = _ragged_all_to_all(operand, place.size, sizes, setting)
    return _sum_of_selections(home, place, selection, topk_weights)


BASELINES = {
    "padded all_to_all": Baseline(_padded_dispatch, _padded_combine),
    "ring": Baseline(_ring_dispatch, _ring_combine),
    "ragged_all_to_all": Baseline(
        _ragged_dispatch, _ragged_combine, {"cpu": "XLA:CPU has no ragged_all_to_all"}
    ),
}


def missing_on(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """The baselines that the mesh's platform lacks, with the reason."""
    platform = mesh.devices.flat[0].platform
    return {
        name: baseline.missing_on[platform]
        for name, baseline in BASELINES.items()
        if platform in baseline.missing_on
    }
