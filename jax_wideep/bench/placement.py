"""Benchmark `placement`: exchange and layer with experts where they happen to lie, and placed by their load.

The placement is computed from one draw of the routing, which is not among those that are timed. Both candidates get the
rows of capacity that they need, so that nothing is dropped: the fullest rank's load over all draws.

| op | what runs |
|---|---|
| exchange | plan, dispatch, combine; with a placement also the choice of replicas |
| layer | the same with the experts between them, forward |
| choosing replicas | Placement.to_physical alone |
| moving experts | move_experts of a layer's matrices from an even placement (--no-move leaves it out) |
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_wideep as wep
from jax_wideep.bench import measure, report
from jax_wideep.bench.layer import LayerSettings
from jax_wideep.bench.measure import Candidate, on_ranks
from jax_wideep.bench.settings import Draws
from jax_wideep.load import imbalance
from jax_wideep.moe import inner_size
from jax_wideep.placement import Placement, compute_placement

WITHOUT, WITH = "as they lie", "placed"


@dataclasses.dataclass(frozen=True)
class PlacementSettings(LayerSettings):
    """Sizes of a layer, and of its placement."""

    experts: int = 256
    """Experts over all ranks."""
    redundant: int | None = None
    """Places for replicas; default: a quarter of the experts, rounded up to a multiple of the ranks."""
    move: bool = True
    """Whether to time the moving of experts, which uses JAX's collectives."""


def run(settings: PlacementSettings) -> list[report.Record]:
    """Measures, prints, and returns the records."""
    measure.start_processes(**dataclasses.asdict(settings.processes))
    mesh = measure.make_mesh(settings.devices, settings.backend)
    ranks, experts = mesh.size, settings.experts
    redundant = -(-experts // (4 * ranks)) * ranks if settings.redundant is None else settings.redundant
    draws = Draws(settings, mesh)
    load = np.bincount(draws.topk_idx[0].reshape(-1), minlength=experts)
    started = time.perf_counter()
    placement = compute_placement(load, experts + redundant, ranks)
    computing_s = time.perf_counter() - started
    rows = {
        WITHOUT: np.stack([_rows(idx, ranks, experts) for idx in draws.topk_idx[1:]]),
        WITH: np.stack([_placed_rows(placement, idx, ranks) for idx in draws.topk_idx[1:]]),
    }
    capacity = {name: -(-int(of_draws.max()) // 256) * 256 for name, of_draws in rows.items()}

    candidates: dict[tuple[str, str], Candidate] = {}
    groups: dict[str, wep.ExpertGroup] = {}
    for name in (WITHOUT, WITH):
        group = groups[name] = measure.make_group(
            mesh, settings, num_experts=experts + (redundant if name == WITH else 0)
        )
        placed = placement if name == WITH else None
        exchange, layer = _functions(group, capacity[name], placed)
        matrices = slice(3, 5) if name == WITHOUT else slice(5, 7)
        candidates[name, "exchange"] = Candidate(on_ranks(mesh, exchange), lambda *inputs: inputs[:3])
        candidates[name, "layer"] = Candidate(
            on_ranks(mesh, layer), lambda *inputs, matrices=matrices: (*inputs[:3], *inputs[matrices])
        )
    candidates[WITH, "choosing replicas"] = Candidate(
        on_ranks(mesh, lambda idx: placement.to_physical(idx, jax.lax.axis_index(measure.AXIS))),
        lambda *inputs: inputs[1:2],
    )
    if settings.move:
        even = compute_placement(np.ones(experts), experts + redundant, ranks)
        candidates[WITH, "moving experts"] = Candidate(
            lambda *matrices: wep.move_experts(matrices, even, placement, groups[WITH]),
            lambda *inputs: inputs[5:7],
        )

    inner = inner_size(settings.ffn, "swiglu")
    scale = np.asarray(settings.hidden**-0.5, jnp.dtype(settings.dtype))
    weights = [
        draws.activations(number, *shape) * scale
        for number in (experts, experts + redundant)
        for shape in ((settings.hidden, inner), (settings.ffn, settings.hidden))
    ]

    def make_inputs(repeat: int) -> tuple[jax.Array, ...]:
        return draws.tokens(), *draws.routed(repeat), *weights

    try:
        measured, failed = measure.time_interleaved(candidates, make_inputs, repeats=settings.repeats)
    finally:
        for group in groups.values():
            group.close()

    common = {"benchmark": "placement", "backend": groups[WITH].backend} | settings.record()
    common |= {"redundant": redundant, "computing_ms": 1e3 * computing_s}
    environment = measure.environment(mesh)
    records = [
        common
        | {"implementation": name, "op": op, "capacity": capacity[name]}
        | {
            "imbalance": float(np.mean(imbalance(rows[name]))),
            "worst_imbalance": float(imbalance(rows[name]).max()),
        }
        | times.record()
        | environment
        for (name, op), times in measured.items()
    ]
    _show(settings, records, failed)
    return records


def _functions(group: wep.ExpertGroup, capacity: int, placement: Placement | None) -> tuple[Any, Any]:
    def exchange(x, idx, weights):
        if placement is not None:
            idx = placement.to_physical(idx, jax.lax.axis_index(group.axis))
        plan = wep.make_plan(idx, group, capacity=capacity)
        rows: Any
        rows, row_weights = wep.dispatch(x, weights, plan, zero_tail=False)
        return wep.combine(rows, row_weights, plan, zero_tail=False)

    def layer(x, idx, weights, wi, wo):
        return wep.moe_ffn(
            x, idx, weights, wi, wo, group, capacity=capacity, placement=placement, return_stats=False
        )[0]

    return exchange, layer


def _rows(idx: np.ndarray, ranks: int, experts: int) -> np.ndarray:
    """[ranks] rows that each rank receives."""
    return np.bincount(idx.reshape(-1), minlength=experts).reshape(ranks, -1).sum(axis=1)


def _placed_rows(placement: Placement, idx: np.ndarray, ranks: int) -> np.ndarray:
    parts = idx.reshape(ranks, -1, idx.shape[-1])
    physical = [np.asarray(placement.to_physical(jnp.asarray(part), rank)) for rank, part in enumerate(parts)]
    return _rows(np.stack(physical), ranks, placement.num_physical)


def _show(
    settings: PlacementSettings, records: list[report.Record], failed: dict[tuple[str, str], str]
) -> None:
    first = records[0]
    if first["process"] != 0:
        return
    rows: list[list[Any]] = [
        [
            f"{record['implementation']}: {record['op']}",
            record["median_ms"],
            record["min_ms"],
            record["cpu_ms"],
            record["capacity"],
            record["imbalance"],
            record["worst_imbalance"],
        ]
        for record in records
    ]
    rows += [[text] + [None] * 6 for text in report.reasons({}, failed)]
    report.print_table(
        f"placement: {report.sizes(first)}, ffn {settings.ffn}, {first['redundant']} redundant experts",
        ["experts", "median ms", "min ms", "CPU ms", "capacity", "max/mean rows", "worst draw"],
        rows,
        [
            "Whole jitted call until every rank's outputs are ready; median and minimum over repeats with fresh data; "
            "rows per rank as a multiple of their mean, mean over the draws.",
            f"Computing the placement of this layer: {first['computing_ms']:.1f} ms.",
        ],
    )
    report.write_json_lines(records, settings.output.json)
    if settings.output.plot:
        bars = {f"{record['implementation']}: {record['op']}": record["median_ms"] for record in records}
        report.plot_bars(settings.output.plot, report.sizes(first), "median time, ms", bars)
