"""Replicas of experts kept in step: moving parameters to another placement, and summing replicas' gradients.

Both take any pytree of global arrays [physical experts, ...] that are split over the group's ranks by their first
axis: parameters, gradients, an optimiser's moments. Placements are arguments, not constants, so another placement
compiles nothing again. They use JAX's collectives, on every backend.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_wideep import _check, _ffi
from jax_wideep.group import ExpertGroup
from jax_wideep.placement import Placement


def move_experts(
    tree: Any, old: Placement, new: Placement, group: ExpertGroup, *, donate: bool = False
) -> Any:
    """What every physical expert holds, moved to where a new placement has it. Bits are copied, never computed with.

    One jitted call, by all processes. Every rank's experts go round all ranks once, and each rank keeps what it
    hosts under the new placement: num_physical experts cross each link, and beside input and output a rank holds one
    more copy of its own part of a leaf at a time. An expert that stays on a rank is taken from there.

    Args:
      tree: arrays [num_physical, ...], split by their first axis over `group.axis`.
      old: the placement that `tree` is in; replicas of one expert hold the same values.
      new: the one to move it to, with the same sizes.
      group: the ExpertGroup.
      donate: whether the buffers of `tree` may be reused; it is then invalid afterwards.

    Returns:
      The tree in the new placement, laid out alike.

    Raises:
      ValueError: arrays or placements of other sizes than the group's.
    """
    op = "move_experts"
    _check_tree(op, tree, group)
    for name, placement in (("old", old), ("new", new)):
        _check_placement(op, name, placement, group)
    if old.num_experts != new.num_experts:
        raise ValueError(
            f"{op}: new: expected one of old's {old.num_experts} experts, got one of {new.num_experts}"
        )
    return (_move_donated if donate else _move)(tree, old, new, group)


def sum_replica_gradients(tree: Any, placement: Placement, group: ExpertGroup) -> Any:
    """Gives each replica the sum of all replicas' gradients: that of the expert they are copies of.

    Replicas that start equal and are updated alike then stay equal, bit by bit, and train as one expert would. Only
    experts that have replicas cross between ranks: at most num_physical - num_experts of them, summed over all ranks
    in float32, as many at a time as a rank hosts. May be called under `jax.jit`, outside of shard_map.

    Args:
      tree: arrays [num_physical, ...], split by their first axis over `group.axis`.
      placement: the placement they are in.
      group: the ExpertGroup.

    Returns:
      The sums, laid out and of dtypes alike.

    Raises:
      ValueError: arrays or a placement of other sizes than the group's.
    """
    op = "sum_replica_gradients"
    _check_tree(op, tree, group)
    _check_placement(op, "placement", placement, group)
    if placement.num_physical == placement.num_experts:
        return tree
    return _sum(tree, placement, group)


def replica_weights(placement: Placement) -> jax.Array:
    """[num_physical] 1 / replicas of each physical expert: in a sum weighted with it, each logical expert counts once.

    A norm over all gradients needs it: replicas carry the same gradient.
    """
    return 1 / jnp.asarray(placement.replicas, jnp.float32)[placement.logical_of_physical]


def _on_ranks(function, group, *trees):
    spec = PartitionSpec(group.axis)
    in_specs = (spec, *[PartitionSpec()] * (len(trees) - 1))
    return jax.shard_map(function, mesh=group.mesh, in_specs=in_specs, out_specs=spec)(*trees)


def _move_impl(tree, old, new, group):
    def on_one_rank(tree, old, new):
        ranks, local = group.num_ranks, group.local_experts
        rank = jax.lax.axis_index(group.axis)
        place = rank * local + jnp.arange(local)
        expert = jnp.asarray(new.logical_of_physical)[place]
        held_by = jnp.asarray(old.physical_of_logical)[expert]
        here = (held_by >= 0) & (held_by // local == rank)
        number = jnp.where(here.any(axis=1), here.argmax(axis=1), place % jnp.asarray(old.replicas)[expert])
        source = jnp.take_along_axis(held_by, number[:, None], axis=1)[:, 0]
        ring = [(r, (r + 1) % ranks) for r in range(ranks)]

        def move(leaf):
            def take(step, moved, passing):
                """Experts of rank `rank - step` pass by: keeps those that are wanted here."""
                wanted = source // local == (rank - step) % ranks
                return jnp.where(_along(wanted, leaf), passing[source % local], moved)

            def pass_on(step, carry):
                moved, passing = carry
                passing = jax.lax.ppermute(passing, group.axis, ring)
                return take(step, moved, passing), passing

            return jax.lax.fori_loop(1, ranks, pass_on, (take(0, leaf, leaf), leaf))[0]

        return jax.tree.map(move, tree)

    return _on_ranks(on_one_rank, group, tree, old, new)


_move = jax.jit(_move_impl, static_argnums=3)
_move_donated = jax.jit(_move_impl, static_argnums=3, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=2)
def _sum(tree, placement, group):
    def on_one_rank(tree, placement):
        local, num_experts = group.local_experts, placement.num_experts
        most = placement.num_physical - num_experts  # experts that can have replicas
        at_once = min(most, local)
        replicas = jnp.asarray(placement.replicas)
        hot = jnp.nonzero(replicas > 1, size=most, fill_value=num_experts)[0]
        # Place of each expert in the list of hot ones; of others, one that no round looks at.
        listed = (
            jnp.full(num_experts, -1, jnp.int32).at[hot].set(jnp.arange(most, dtype=jnp.int32), mode="drop")
        )
        rank = jax.lax.axis_index(group.axis)
        own = jax.lax.dynamic_slice_in_dim(jnp.asarray(placement.logical_of_physical), rank * local, local)
        number = listed[own]

        def add(leaf):
            accumulate = jnp.promote_types(leaf.dtype, jnp.float32)

            def one_round(step, summed):
                at = number - step * at_once
                taking_part = (number >= 0) & (at >= 0) & (at < at_once)
                at = jnp.where(taking_part, at, at_once)
                (total,) = _ffi.vary([jnp.zeros((at_once, *leaf.shape[1:]), accumulate)], group.axis)
                total = total.at[at].add(leaf.astype(accumulate), mode="drop")
                total = jax.lax.psum(total, group.axis)
                mine = total.at[at].get(mode="clip").astype(leaf.dtype)
                return jnp.where(_along(taking_part, leaf), mine, summed)

            return jax.lax.fori_loop(0, -(-most // at_once), one_round, leaf)

        return jax.tree.map(add, tree)

    return _on_ranks(on_one_rank, group, tree, placement)


def _along(of_expert: jax.Array, leaf: jax.Array) -> jax.Array:
    """[experts] with as many axes as leaf."""
    return of_expert.reshape(-1, *[1] * (leaf.ndim - 1))


def _check_tree(op: str, tree: Any, group: ExpertGroup) -> None:
    _check.instance(op, "group", group, ExpertGroup, "make one with jax_wideep.ExpertGroup(mesh, ...)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim == 0 or leaf.shape[0] != group.num_experts:
            raise ValueError(
                f"{op}: tree{jax.tree_util.keystr(path)}: expected [{group.num_experts}, ...], the group's physical "
                f"experts first, got {list(leaf.shape)}; pass experts' arrays only"
            )


def _check_placement(op: str, name: str, placement: Any, group: ExpertGroup) -> None:
    _check.instance(op, name, placement, Placement, "make one with compute_placement")
    if placement.logical_of_physical.ndim != 1 or placement.num_physical != group.num_experts:
        raise ValueError(
            f"{op}: {name}: expected a placement of one layer with the group's {group.num_experts} physical experts, "
            f"got one of {list(placement.logical_of_physical.shape)}; see Placement.layer"
        )
