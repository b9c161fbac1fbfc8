"""Placement of the experts of a whole nnx model: where its layers' load says, with its optimiser's state.

    placements = compute_placements(model)                      # from the layers' average load
    replace_experts(model, placements, optimizer)               # between two steps; compiles nothing again

    gradients = sum_replica_gradients(model, gradients)         # inside the compiled step, before the update
    norm = global_norm(model, gradients)                        # each expert once

Layers take part that were made with `redundant_experts`; see docs/placement.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_wideep import placement as _placement
from jax_wideep import replicas
from jax_wideep.flax import _layer
from jax_wideep.flax.nnx import MoE
from jax_wideep.placement import Placement

Path = tuple[Any, ...]


def placed_layers(model: nnx.Module) -> dict[Path, MoE]:
    """The layers that have a placement, by their path in the model."""
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MoE) and module.places is not None
    }


def compute_placements(
    model: nnx.Module, *, load: np.ndarray | None = None, num_nodes: int = 1, num_groups: int | None = None
) -> Placement:
    """Placements for all layers of `placed_layers`, stacked in its order.

    Args:
      model: its layers are of one size.
      load: [layers, experts] selections; None takes the layers' own averages, which `load_decay` gives them.
      num_nodes: see compute_placement.
      num_groups: see compute_placement.

    Raises:
      ValueError: no layer has a placement, or one has no average load.
    """
    layers = list(placed_layers(model).values())
    if not layers:
        raise ValueError(
            "compute_placements: model: expected layers with redundant_experts, got none; make MoE with it"
        )
    if load is None:
        averages = [layer.load for layer in layers]
        if any(average is None for average in averages):
            raise ValueError(
                "compute_placements: load: expected layers with an average load, got one without; make MoE with "
                "load_decay, or pass load"
            )
        load = np.stack([np.asarray(average[...]) for average in averages if average is not None])
    group = layers[0].config.group
    return _placement.compute_placement(
        load,
        group.num_experts,
        group.num_ranks,
        num_nodes=num_nodes,
        num_groups=num_groups,
        max_replicas=_max_replicas(layers[0]),
    )


def replace_experts(model: nnx.Module, placements: Placement, *others: nnx.Module) -> None:
    """Moves experts to other places, in place: parameters, everything that mirrors them, and the layers' placement.

    One collective call a layer, the same compiled program for all of them and for every placement; all processes
    call it. Buffers of the old parameters are given up.

    Args:
      model: the model.
      placements: for the layers of `placed_layers`, stacked in its order.
      *others: what else holds arrays of the experts under their path in the model, such as an nnx.Optimizer.

    Raises:
      ValueError: another number of placements than layers, or of other sizes.
    """
    layers = placed_layers(model)
    if placements.logical_of_physical.ndim != 2 or len(placements.logical_of_physical) != len(layers):
        raise ValueError(
            f"replace_experts: placements: expected a stack of {len(layers)}, one for each layer that has a "
            f"placement, got {list(placements.logical_of_physical.shape)}; see compute_placements"
        )
    modules = (model, *others)
    states = [nnx.state(module) for module in modules]
    of_layers = [_grouped(layers, list(nnx.to_flat_state(state))) for state in states]
    for number, (path, layer) in enumerate(layers.items()):
        assert layer.places is not None  # as placed_layers says
        new = placements.layer(number)
        mine = [variable for grouped in of_layers for variable in grouped[path].values()]
        moved = replicas.move_experts(
            [variable[...] for variable in mine], layer.places.get(), new, layer.config.group, donate=True
        )
        for variable, array in zip(mine, moved, strict=True):
            variable.set_value(array)
    for module, state in zip(modules, states, strict=True):
        nnx.update(module, state)
    for number, layer in enumerate(layers.values()):
        assert layer.places is not None
        layer.places.set(placements.layer(number))


def sum_replica_gradients(model: nnx.Module, gradients: nnx.State) -> nnx.State:
    """Gradients in which each replica has the sum over all replicas; `gradients` has the paths of the model.

    Without it replicas drift apart. See jax_wideep.sum_replica_gradients.
    """
    layers = placed_layers(model)
    flat = list(nnx.to_flat_state(gradients))
    summed: dict[Path, Any] = {}
    for owner, group in _grouped(layers, flat).items():
        layer = layers[owner]
        assert layer.places is not None
        total = replicas.sum_replica_gradients(
            {path: variable[...] for path, variable in group.items()}, layer.places.get(), layer.config.group
        )
        summed |= {path: group[path].replace(array) for path, array in total.items()}
    return nnx.from_flat_state([(path, summed.get(path, variable)) for path, variable in flat])


def global_norm(model: nnx.Module, gradients: nnx.State) -> jax.Array:
    """Euclidean norm over all gradients in float32, an expert with replicas counted once: what a model without
    replicas has. For gradients that `sum_replica_gradients` returned."""
    layers = placed_layers(model)
    flat = list(nnx.to_flat_state(gradients))
    owner_of = {path: owner for owner, group in _grouped(layers, flat).items() for path in group}
    total = jnp.float32(0)
    for path, variable in flat:
        squares = jnp.square(variable[...].astype(jnp.float32))
        if path in owner_of:
            places = layers[owner_of[path]].places
            assert places is not None
            weights = replicas.replica_weights(places.get())
            total += jnp.vdot(weights, jnp.sum(squares, axis=tuple(range(1, squares.ndim))))
        else:
            total += jnp.sum(squares)
    return jnp.sqrt(total)


def _max_replicas(layer: MoE) -> int:
    assert layer.places is not None
    return layer.places.physical_of_logical.shape[-1]


def _grouped(
    layers: dict[Path, MoE], flat: list[tuple[Path, nnx.Variable]]
) -> dict[Path, dict[Path, nnx.Variable]]:
    """The variables of experts, by the path of their layer: those whose path ends as an expert's parameter does."""
    ends = {
        (*path, name): path
        for path, layer in layers.items()
        for name, spec in _layer.param_specs(layer.config).items()
        if spec.partition[0] is not None
    }
    lengths = {len(end) for end in ends}
    grouped: dict[Path, dict[Path, nnx.Variable]] = {path: {} for path in layers}
    for path, variable in flat:
        for length in lengths:
            owner = ends.get(path[-length:])
            if owner is not None:
                grouped[owner][path] = variable
    return grouped
