"""Placement: which physical expert holds which logical expert, and how selections are spread over replicas.

The router chooses among E *logical* experts. An ExpertGroup made for P >= E *physical* experts has P - E places to
spare: a hot expert gets several of them, its replicas, and the experts are packed so that all ranks get about the
same number of rows. Exchanges see physical experts only, so a placement works on every backend:

    placement = compute_placement(load, num_physical=320, num_ranks=8)      # NumPy, from recorded load
    physical_idx = placement.to_physical(topk_idx, rank)                    # JAX, before make_plan or ll_dispatch

The idea, greedy replication and then packing, hierarchical or global, is that of the expert parallelism load
balancer of DeepSeek-V3 (arXiv:2412.19437, section 3.4). Packing takes the largest load first (R. L. Graham, "Bounds
on multiprocessing timing anomalies", 1969).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_wideep._types import Int32, Num

# Selections that are compared pair by pair to number those of one expert. Measured with 32768 selections of 256
# experts on a CPU device: 64 was best of 16 to 256, ten times faster than sorting.
_BLOCK = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logical_of_physical", "replicas", "physical_of_logical"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where every logical expert lies; a pytree of arrays whose shapes do not depend on the load.

    Pass it as an argument of the compiled function: another placement of the same shapes compiles nothing again. The
    placements of several layers may be stacked along a leading axis; see `layer`.

    Attributes:
      logical_of_physical: logical expert of every physical one. Rank r hosts physical experts
        [r * P / R, (r + 1) * P / R).
      replicas: physical experts of every logical one, at least 1.
      physical_of_logical: a logical expert's physical ones, in rising order, then -1.
    """

    logical_of_physical: Int32[Any, "*layers physical"]
    replicas: Int32[Any, "*layers experts"]
    physical_of_logical: Int32[Any, "*layers experts max_replicas"]

    @property
    def num_physical(self) -> int:
        """Physical experts (P)."""
        return self.logical_of_physical.shape[-1]

    @property
    def num_experts(self) -> int:
        """Logical experts (E)."""
        return self.replicas.shape[-1]

    @property
    def max_replicas(self) -> int:
        """Most replicas that an expert of this placement, or of one that takes its place, can have."""
        return self.physical_of_logical.shape[-1]

    def layer(self, index: Any) -> Placement:
        """The placement of one layer of a stack."""
        return jax.tree.map(lambda array: array[index], self)

    def to_physical(
        self, topk_idx: Int32[jax.Array, "tokens k"], rank: Int32[jax.Array, ""] | int
    ) -> Int32[jax.Array, "tokens k"]:
        """The physical expert that each selection goes to; what make_plan and ll_dispatch take.

        Of an expert's selections on this rank, in order of token, then k, the c-th goes to its replica number
        (rank + c) mod replicas: from one rank, its replicas get numbers of selections that differ by one at most.

        Args:
          topk_idx: logical experts; -1 masks a selection and stays -1. An index that is out of range gives one that
            is out of range.
          rank: this rank's place in the group, `jax.lax.axis_index(group.axis)`.
        """
        known = (topk_idx >= 0) & (topk_idx < self.num_experts)
        expert = jnp.where(known, topk_idx, 0)
        physical_of_logical = jnp.asarray(self.physical_of_logical)
        if self.num_physical == self.num_experts:  # one replica each
            physical = physical_of_logical[expert, 0]
        else:
            earlier = _earlier_selections(jnp.where(known, topk_idx, -1).reshape(-1), self.num_experts)
            number = (earlier.reshape(expert.shape) + rank) % jnp.asarray(self.replicas)[expert]
            physical = physical_of_logical[expert, number]
        return jnp.where(known, physical, jnp.where(topk_idx < 0, topk_idx, self.num_physical))

    def to_logical_counts(self, counts: Num[jax.Array, " physical"]) -> Num[jax.Array, " experts"]:
        """Sums a number per physical expert, such as `plan.tokens_per_expert`, over each expert's replicas."""
        place = jnp.asarray(self.logical_of_physical)
        return jnp.zeros(self.num_experts, counts.dtype).at[place].add(counts)

    def rank_loads(self, load: np.ndarray, num_ranks: int) -> np.ndarray:
        """[*layers, ranks] what each rank gets of `load` [*layers, experts] if replicas share evenly; NumPy."""
        place = np.asarray(self.logical_of_physical)
        each = np.asarray(load, np.float64) / np.asarray(self.replicas)
        of_physical = np.take_along_axis(each, place, axis=-1)
        return of_physical.reshape(*place.shape[:-1], num_ranks, -1).sum(axis=-1)


def make_placement(
    logical_of_physical: np.ndarray, num_experts: int, *, max_replicas: int | None = None
) -> Placement:
    """A Placement from its table, NumPy arrays throughout.

    Args:
      logical_of_physical: [*layers, physical] logical experts.
      num_experts: logical experts.
      max_replicas: last axis of `physical_of_logical`, a static shape: placements that are to replace each other
        need the same. None: physical - experts + 1, which is enough for any.

    Raises:
      ValueError: an expert has no place, or more than max_replicas.
    """
    table = np.asarray(logical_of_physical, np.int32)
    num_physical = table.shape[-1]
    if max_replicas is None:
        max_replicas = num_physical - num_experts + 1
    flat = table.reshape(-1, num_physical)
    if flat.size and not (flat.min() >= 0 and flat.max() < num_experts):
        raise ValueError(
            f"make_placement: logical_of_physical: expected experts in [0, {num_experts}), got "
            f"{flat.min()} to {flat.max()}; every physical expert holds a logical one"
        )
    layers = np.arange(len(flat))[:, None]
    replicas = np.zeros((len(flat), num_experts), np.int32)
    np.add.at(replicas, (layers, flat), 1)
    if flat.size and not (replicas.min() >= 1 and replicas.max() <= max_replicas):
        raise ValueError(
            f"make_placement: logical_of_physical: expected 1 to max_replicas={max_replicas} places for every "
            f"expert, got {replicas.min()} to {replicas.max()}; change the table or max_replicas"
        )
    # A stable order by expert lists each one's physical experts one after the other.
    order = np.argsort(flat, axis=1, kind="stable")
    expert = np.take_along_axis(flat, order, axis=1)
    first = np.cumsum(replicas, axis=1) - replicas
    number = np.arange(num_physical) - np.take_along_axis(first, expert, axis=1)
    listed = np.full((len(flat), num_experts, max_replicas), -1, np.int32)
    listed[layers, expert, number] = order
    shape = table.shape[:-1]
    return Placement(
        table, replicas.reshape(*shape, num_experts), listed.reshape(*shape, num_experts, max_replicas)
    )


def compute_placement(
    load: np.ndarray,
    num_physical: int,
    num_ranks: int,
    *,
    num_nodes: int = 1,
    num_groups: int | None = None,
    max_replicas: int | None = None,
) -> Placement:
    """Replicas and places for a load: pure, deterministic, NumPy; all layers at once.

    Places that are spare go one by one to the expert with the most load per replica; then experts are packed, the
    heaviest first, each to the rank with the least load that has a place. With several nodes the same is done in
    steps (hierarchical): groups of experts are packed to nodes, replicas are made inside each node, and packed to its
    ranks. A router that confines a token to few groups (`RouterConfig.group_top_k`) then keeps it on few nodes.

    Args:
      load: [*layers, experts], at least 0: selections of each expert, or an average of them.
      num_physical: physical experts, a multiple of num_ranks; at least the number of experts.
      num_ranks: ranks of the ExpertGroup.
      num_nodes: nodes that the ranks are spread over evenly, in order; 1 packs globally.
      num_groups: runs of consecutive experts that stay on one node; a multiple of num_nodes. None: num_nodes.
      max_replicas: see make_placement.

    Raises:
      ValueError: sizes that do not divide, or a load that is negative or not finite.
    """
    load = np.asarray(load, np.float64)
    num_experts = load.shape[-1]
    num_groups = num_nodes if num_groups is None else num_groups
    if max_replicas is None:
        max_replicas = num_physical - num_experts + 1
    _check_sizes(num_experts, num_physical, num_ranks, num_nodes, num_groups, max_replicas)
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ValueError(
            "compute_placement: load: expected finite numbers of at least 0, got others; count selections"
        )
    flat = load.reshape(-1, num_experts)

    # [layers, nodes, experts of a node]: the experts that each node hosts.
    groups = flat.reshape(len(flat), num_groups, -1)
    node_groups = _pack(groups.sum(axis=2), num_nodes)
    size = groups.shape[2]
    of_node = (node_groups[..., None] * size + np.arange(size)).reshape(len(flat) * num_nodes, -1)
    layer_of_node = np.repeat(np.arange(len(flat)), num_nodes)[:, None]
    node_load = flat[layer_of_node, of_node]

    places, ranks = num_physical // num_nodes, num_ranks // num_nodes
    # A second replica on one rank would share nothing.
    useful = max(ranks, -(-places // node_load.shape[1]))
    replicas = _replicate(node_load, places, min(max_replicas, useful))
    index = np.arange(places)
    # [layers * nodes, places]: which of the node's experts, each as often as it has replicas.
    ends = np.cumsum(replicas, axis=1)
    member = (index[None, None, :] >= ends[:, :, None]).sum(axis=1)
    each = np.take_along_axis(node_load / replicas, member, axis=1)
    packed = _pack(each, ranks).reshape(len(flat) * num_nodes, -1)
    table = np.take_along_axis(of_node, np.take_along_axis(member, packed, axis=1), axis=1)
    return make_placement(
        table.reshape(*load.shape[:-1], num_physical), num_experts, max_replicas=max_replicas
    )


def _replicate(load: np.ndarray, num_places: int, max_replicas: int) -> np.ndarray:
    """[layers, experts] replicas that sum to num_places, from load [layers, experts]."""
    layers = np.arange(len(load))
    replicas = np.ones(load.shape, np.int64)
    # Where nothing was counted, the experts with the fewest replicas come first.
    weight = load + 1e-9 * (1 + load.sum(axis=1, keepdims=True))
    for _ in range(num_places - load.shape[1]):
        per_replica = np.where(replicas < max_replicas, weight / replicas, -1)
        replicas[layers, per_replica.argmax(axis=1)] += 1
    return replicas


def _pack(weights: np.ndarray, num_bins: int) -> np.ndarray:
    """Splits each layer's items evenly into bins of about the same weight.

    Args:
      weights: [layers, items], items a multiple of num_bins.

    Returns:
      [layers, num_bins, items / num_bins] items.
    """
    num_layers, num_items = weights.shape
    places = num_items // num_bins
    layers = np.arange(num_layers)
    packed = np.zeros((num_layers, num_bins, places), np.int64)
    filled = np.zeros((num_layers, num_bins), np.int64)
    total = np.zeros((num_layers, num_bins))
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        bin_ = np.where(filled < places, total, np.inf).argmin(axis=1)
        packed[layers, bin_, filled[layers, bin_]] = item
        filled[layers, bin_] += 1
        total[layers, bin_] += weights[layers, item]
    return packed


def _earlier_selections(expert: Int32[jax.Array, " selections"], num_experts: int) -> jax.Array:
    """For each selection, how many before it are of the same expert; of no meaning where it is -1."""
    blocks = -(-expert.size // _BLOCK)
    padded = jnp.pad(expert, (0, blocks * _BLOCK - expert.size), constant_values=-1).reshape(blocks, _BLOCK)
    before = jnp.tril(jnp.ones((_BLOCK, _BLOCK), bool), k=-1)
    same = padded[:, :, None] == padded[:, None, :]
    within = jnp.sum(same & before, axis=2, dtype=jnp.int32)
    counted = jnp.where(padded >= 0, padded, num_experts)  # out of bounds: dropped
    block = jnp.arange(blocks)[:, None]
    counts = jnp.zeros((blocks, num_experts), jnp.int32).at[block, counted].add(1, mode="drop")
    in_earlier_blocks = jnp.cumsum(counts, axis=0) - counts
    return (within + in_earlier_blocks[block, jnp.maximum(padded, 0)]).reshape(-1)[: expert.size]


def _check_sizes(num_experts, num_physical, num_ranks, num_nodes, num_groups, max_replicas):
    op = "compute_placement"
    for name, value, divisor, of in (
        ("num_physical", num_physical, num_ranks, "ranks"),
        ("num_ranks", num_ranks, num_nodes, "nodes"),
        ("experts of load", num_experts, num_groups, "groups"),
        ("num_groups", num_groups, num_nodes, "nodes"),
    ):
        if divisor < 1 or value < 1 or value % divisor:
            raise ValueError(f"{op}: {name}: expected a multiple of the {divisor} {of}, got {value}")
    if not num_experts <= num_physical <= num_experts * max_replicas:
        raise ValueError(
            f"{op}: num_physical: expected between {num_experts} experts and {max_replicas} replicas of each, got "
            f"{num_physical}; change it or max_replicas"
        )
