"""make_plan: the coordination pass of the throughput shape."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax

from jax_wideep import _check, _exchange_ops, _ffi, reference
from jax_wideep._types import Int32
from jax_wideep.group import ExpertGroup

Overflow = Literal["drop", "error", "spill"]


# In the order in which the backends return them.
_ARRAYS = (
    "group_sizes", "num_rows", "overflow", "tokens_per_expert", "dest_rank", "dest_row", "row_source",
    "arrival_rows", "rows_per_source",
)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=_ARRAYS,
    meta_fields=["group", "capacity", "num_tokens", "top_k"],
)
@dataclasses.dataclass(frozen=True)
class DispatchPlan:
    """Where every selected token's row goes; a pytree of arrays, so it passes through any transformation.

    A selection is one (token, k) pair. Rows of a rank are packed by expert, and inside an expert they are
    in order of source rank, token, k.

    Attributes:
      group_sizes: rows that this rank received, per expert it hosts.
      num_rows: their sum; rows from here to `capacity` are empty.
      overflow: selections dropped because this rank's capacity was full, and this rank's own of experts on masked
        ranks (ExpertGroup.mask_ranks).
      tokens_per_expert: selections of every expert over all ranks that are not masked, dropped ones included.
      dest_rank: rank that each selection went to, -1 where masked or dropped.
      dest_row: row there, or -1.
      row_source: for each row, (source rank * num_tokens + token) * top_k + k, or -1.
      arrival_rows: this rank's rows in order of source rank, token, k, then -1.
      rows_per_source: rows that came from each rank; they lie one after the other in `arrival_rows`.
      group: the group it was made for.
      capacity: rows that a rank can receive.
      num_tokens: tokens per rank.
      top_k: selections per token.
    """

    group_sizes: Int32[jax.Array, " local_experts"]
    num_rows: Int32[jax.Array, ""]
    overflow: Int32[jax.Array, ""]
    tokens_per_expert: Int32[jax.Array, " experts"]
    dest_rank: Int32[jax.Array, "tokens k"]
    dest_row: Int32[jax.Array, "tokens k"]
    row_source: Int32[jax.Array, " capacity"]
    arrival_rows: Int32[jax.Array, " capacity"]
    rows_per_source: Int32[jax.Array, " ranks"]
    group: ExpertGroup
    capacity: int
    num_tokens: int
    top_k: int


def make_plan(
    topk_idx: Int32[jax.Array, "tokens k"],
    group: ExpertGroup,
    *,
    capacity: int | None = None,
    overflow: Overflow = "drop",
) -> DispatchPlan:
    """Tells every rank how many rows it will receive and every selection which row is its own.

    Called inside `jax.shard_map` over `group.axis`, by all ranks. Ranks exchange counts only.

    Args:
      topk_idx: experts of each token, in [0, num_experts); -1 masks a selection. An expert may occur more than
        once in a token.
      group: the ExpertGroup.
      capacity: rows that a rank can receive. None is the worst case, num_ranks * tokens * top_k: nothing is
        ever dropped. Memory for rows is proportional to it.
      overflow: what happens to selections past the capacity. "drop" drops them, later source ranks and later
        tokens first, and counts them in `overflow`; "error" fails the computation (compiled backends only).
        "spill" is for moe_ffn, which plans without a capacity and serves the plan's rows in rounds.

    Returns:
      The plan; see DispatchPlan. Its integers are the same on every backend.

    Raises:
      ValueError: at trace time, for arguments of the wrong shape or dtype.
      jax.errors.JaxRuntimeError: when run, for an index outside [-1, num_experts) (the backend "xla" masks it
        instead), for a rank that does not come within `group.deadline_s`, or for overflow under "error".
    """
    op = "make_plan"
    _check.group(op, group)
    _check.topk_idx(op, topk_idx, group)
    num_tokens, top_k = topk_idx.shape
    worst_case = group.num_ranks * num_tokens * top_k
    if capacity is None:
        capacity = worst_case
    check_capacity(op, capacity, worst_case)
    if max(worst_case, capacity) >= 2**31:
        raise ValueError(
            f"{op}: expected num_ranks * tokens * top_k and capacity below 2**31, got {worst_case} and {capacity}; "
            "use fewer tokens per call"
        )
    if overflow == "spill":
        raise ValueError(
            f"{op}: overflow: expected 'drop' or 'error', got 'spill', which applies the experts once a round; use "
            "moe_ffn(..., overflow='spill')"
        )
    if overflow not in ("drop", "error"):
        raise ValueError(f"{op}: overflow: expected 'drop' or 'error', got {overflow!r}")
    if overflow == "error" and group.backend == "xla":
        raise ValueError(
            f"{op}: overflow: 'error' needs a compiled backend, got backend='xla', whose collectives cannot fail; "
            "use overflow='drop' and look at plan.overflow"
        )
    (topk_idx,) = _ffi.vary([topk_idx], group.axis)
    arrays = backend_of(group).plan(topk_idx, group, capacity, overflow == "error")
    by_name = dict(zip(_ARRAYS, arrays, strict=True))
    return DispatchPlan(**by_name, group=group, capacity=capacity, num_tokens=num_tokens, top_k=top_k)


def check_capacity(op: str, capacity: Any, worst_case: int) -> None:
    """Raises ValueError for what is no number of rows."""
    if not isinstance(capacity, int) or capacity < min(1, worst_case):
        raise ValueError(
            f"{op}: capacity: expected None or a number of rows of at least 1, got {capacity!r}; it is part of the "
            "compiled shapes, so it must be a Python int"
        )


def backend_of(group: ExpertGroup) -> Any:
    """The module that carries out `group`'s ops: the compiled ones, or JAX collectives."""
    return reference if group.backend == "xla" else _exchange_ops
