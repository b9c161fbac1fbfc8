"""Benchmark `layer`: moe_ffn forward, and forward and backward, against the baselines doing the same job.

All candidates apply the same experts with the same grouped matmul, so that they differ in the exchange only.
Routing is given: the router is not part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

import jax_wideep as wep
from jax_wideep._swiglu import swiglu_of_groups
from jax_wideep.bench import baselines, measure, report
from jax_wideep.bench.exchange import LIBRARY, Key, baseline_variants
from jax_wideep.bench.measure import Candidate, on_ranks
from jax_wideep.bench.settings import Draws, ExchangeSettings
from jax_wideep.moe import inner_size

FORWARD, BOTH = "forward", "forward + backward"


@dataclasses.dataclass(frozen=True)
class LayerSettings(ExchangeSettings):
    """Sizes and routing of a layer."""

    ffn: int = 256
    """Inner size of an expert (SwiGLU)."""

    def record(self) -> dict[str, Any]:
        return super().record() | {"ffn": self.ffn}


def layer_flops(settings: LayerSettings, rows: int) -> int:
    """Floating-point operations of the experts' products, forward, over all ranks: gate, up and down."""
    return 2 * rows * settings.hidden * settings.ffn * 3


def swiglu_experts(wi: jax.Array, wo: jax.Array, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """What moe_ffn does between dispatch and combine; rows past the groups' ends stay unspecified."""
    hidden = wep.grouped_matmul(rows, wi, group_sizes, zero_tail=False)
    inner = swiglu_of_groups(hidden, group_sizes, "auto")
    return wep.grouped_matmul(inner, wo, group_sizes, zero_tail=False)


def run(settings: LayerSettings) -> list[report.Record]:
    """Measures, prints, and returns the records."""
    measure.start_processes(**dataclasses.asdict(settings.processes))
    mesh = measure.make_mesh(settings.devices, settings.backend)
    draws = Draws(settings, mesh)
    capacity = draws.capacity()
    group = measure.make_group(mesh, settings)

    def ours(x, idx, weights, wi, wo):
        return wep.moe_ffn(x, idx, weights, wi, wo, group, capacity=capacity)[0]

    def theirs(baseline: baselines.Baseline, sizes: baselines.Setting) -> Callable[..., jax.Array]:
        def layer(x, idx, weights, wi, wo):
            experts = functools.partial(swiglu_experts, wi, wo)
            return baselines.moe(baseline, x, idx, weights, experts, sizes)

        return layer

    with group:
        layers = {LIBRARY: ours}
        if settings.baselines:
            variants = baseline_variants(settings, group, draws, capacity)
            layers |= {name: theirs(*variant) for name, variant in variants.items()}
        candidates: dict[Key, Candidate] = {}
        for name, layer in layers.items():
            candidates[name, FORWARD] = Candidate(on_ranks(mesh, layer), lambda *inputs: inputs[:5])
            candidates[name, BOTH] = Candidate(on_ranks(mesh, _with_gradients(layer)))

        def make_inputs(repeat: int) -> tuple[jax.Array, ...]:
            scale = jax.numpy.asarray(settings.hidden**-0.5, settings.dtype)
            inner = inner_size(settings.ffn, "swiglu")
            wi = draws.activations(settings.experts, settings.hidden, inner) * scale
            wo = draws.activations(settings.experts, settings.ffn, settings.hidden) * scale
            return draws.tokens(), *draws.routed(repeat), wi, wo, draws.tokens()

        measured, failed = measure.time_interleaved(candidates, make_inputs, repeats=settings.repeats)
        environment = measure.environment(mesh)

    common = {"benchmark": "layer", "backend": group.backend, "capacity": capacity} | settings.record()
    records = []
    for (implementation, op), times in measured.items():
        # Backward computes the gradients of both operands of each product.
        flops = layer_flops(settings, draws.rows) * (3 if op == BOTH else 1)
        records.append(
            common
            | {
                "implementation": implementation,
                "op": op,
                "tokens_per_s": mesh.size * settings.tokens / measure.median(times.wall),
                "expert_flops": flops,
            }
            | times.record()
            | environment
        )
    _show(settings, records, baselines.missing_on(mesh) if settings.baselines else {}, failed)
    return records


def _with_gradients(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(x, idx, weights, wi, wo, dout) -> output and the gradients of all but idx."""

    def both(x, idx, weights, wi, wo, dout):
        out, pull = jax.vjp(lambda x, weights, wi, wo: layer(x, idx, weights, wi, wo), x, weights, wi, wo)
        return out, pull(dout)

    return both


def _show(
    settings: LayerSettings, records: list[report.Record], missing: dict[str, str], failed: dict[Key, str]
) -> None:
    first = records[0]
    if first["process"] != 0:
        return
    library = {record["op"]: record["median_ms"] for record in records if record["implementation"] == LIBRARY}
    rows: list[list[Any]] = [
        [
            f"{record['implementation']}: {record['op']}",
            record["median_ms"],
            record["min_ms"],
            record["cpu_ms"],
            record["tokens_per_s"],
            record["expert_flops"] / record["median_ms"] / 1e9,
            record["median_ms"] / library[record["op"]] if record["implementation"] != LIBRARY else None,
        ]
        for record in records
    ]
    rows += [[text] + [None] * 6 for text in report.reasons(missing, failed)]
    report.print_table(
        f"layer: {report.sizes(first)}, ffn {settings.ffn}",
        ["", "median ms", "min ms", "CPU ms", "tokens/s", "TFLOP/s", f"x {LIBRARY}"],
        rows,
        [
            "Whole jitted call until every rank's outputs are ready; median and minimum over repeats with fresh data."
        ],
    )
    report.write_json_lines(records, settings.output.json)
    if settings.output.plot:
        bars = {f"{record['implementation']}: {record['op']}": record["median_ms"] for record in records}
        report.plot_bars(settings.output.plot, report.sizes(first), "median time, ms", bars)
