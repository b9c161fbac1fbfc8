"""Benchmark `exchange`: plan, dispatch and combine, each and together, forward and backward.

| op | what runs |
|---|---|
| plan, dispatch, combine | that op alone, on inputs made before |
| dispatch + combine | with a plan made before (library only) |
| plan + dispatch + combine | everything from topk_idx on; the baselines' index arithmetic is part of it |
| dispatch backward, combine backward | the VJP alone, with residuals made before (library only) |
| forward + backward | the whole, and the gradients of x and topk_weights |

Bytes: *logical* are the rows that arrive at their experts (or leave them), also those that stay on their
rank; *wire* those of them that cross from rank to rank, or whatever the baseline sends instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import jax_wideep as wep
from jax_wideep.bench import baselines, measure, report
from jax_wideep.bench.measure import Candidate, on_ranks, stack, unstack
from jax_wideep.bench.settings import Draws, ExchangeSettings

LIBRARY = "jax_wideep"
ALL = "plan + dispatch + combine"
Key = tuple[str, str]  # implementation, op


def job_bytes(settings: ExchangeSettings, num_ranks: int) -> int:
    """Bytes that dispatch plus combine must read and write at the least, over all ranks.

    Dispatch reads each token once and writes each row; combine reads each row and writes each token.
    """
    tokens = num_ranks * settings.tokens
    rows = tokens * settings.top_k
    return 2 * (tokens + rows) * settings.row_bytes


def wire_bytes(
    implementation: str, settings: ExchangeSettings, num_ranks: int, rows_that_cross: int, pad: int
) -> dict[str, int]:
    """Bytes that cross between ranks in dispatch and in combine, rows only."""
    pairs = num_ranks * (num_ranks - 1)
    if implementation.startswith("padded"):
        block = pairs * pad * settings.row_bytes
        return {"dispatch": block, "combine": block}
    if implementation == "ring":
        # Partial sums travel in float32.
        elements = pairs * settings.tokens * settings.hidden
        return {"dispatch": pairs * settings.tokens * settings.row_bytes, "combine": 4 * elements}
    crossing = rows_that_cross * settings.row_bytes
    return {"dispatch": crossing, "combine": crossing}


def run(settings: ExchangeSettings) -> list[report.Record]:
    """Measures, prints, and returns the records."""
    measure.start_processes(**dataclasses.asdict(settings.processes))
    mesh = measure.make_mesh(settings.devices, settings.backend)
    draws = Draws(settings, mesh)
    capacity = draws.capacity()
    group = measure.make_group(mesh, settings)
    with group:
        candidates = library_candidates(group, capacity)
        pads = {}
        if settings.baselines:
            for name, (baseline, sizes) in baseline_variants(settings, group, draws, capacity).items():
                pads[name] = sizes.pad
                candidates |= baseline_candidates(name, baseline, sizes, mesh)

        def make_inputs(repeat: int) -> tuple[jax.Array, ...]:
            return (draws.tokens(), *draws.routed(repeat), draws.tokens())

        measured, failed = measure.time_interleaved(candidates, make_inputs, repeats=settings.repeats)
        environment = measure.environment(mesh)
    copy_speed = measure.copy_bytes_per_s(mesh.local_devices[0])

    common = {"benchmark": "exchange", "backend": group.backend, "capacity": capacity} | settings.record()
    records = []
    for (implementation, op), times in measured.items():
        wire = wire_bytes(
            implementation, settings, mesh.size, draws.rows_that_cross, pads.get(implementation, 0)
        )
        halves = [half for half in ("dispatch", "combine") if half in op]
        scale = 2 if op == "forward + backward" else 1
        halves = ["dispatch", "combine"] if op == "forward + backward" else halves
        records.append(
            common
            | {
                "implementation": implementation,
                "op": op,
                "logical_bytes": scale * len(halves) * draws.rows * settings.row_bytes,
                "wire_bytes": scale * sum(wire[half] for half in halves),
            }
            | times.record()
            | environment
        )
    least = job_bytes(settings, mesh.size)
    records.append(
        common
        | {
            "implementation": "bare copy",
            "op": "dispatch + combine",
            "median_ms": 1e3 * least / copy_speed,
            "job_bytes": least,
            "copy_bytes_per_s": copy_speed,
        }
        | environment
    )
    _show(settings, records, baselines.missing_on(mesh) if settings.baselines else {}, failed)
    return records


def library_candidates(group: wep.ExpertGroup, capacity: int) -> dict[Key, Candidate]:
    """The ops of the library; tails are left unspecified, as moe_ffn does."""

    def make_plan(topk_idx):
        return wep.make_plan(topk_idx, group, capacity=capacity)

    def dispatch(x, weights, plan):
        return wep.dispatch(x, weights, plan, zero_tail=False)

    def combine(y, row_weights, plan):
        return wep.combine(y, row_weights, plan, zero_tail=False)

    def there_and_back(x, weights, plan):
        rows, row_weights = dispatch(x, weights, plan)
        return combine(rows, row_weights, plan)

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        """Plans, rows and VJPs pass from call to call with a leading axis of ranks."""
        return on_ranks(group.mesh, lambda *stacked: stack(function(*unstack(stacked))))

    planned = wrap(make_plan)
    dispatched = wrap(dispatch)
    pulls = {
        "dispatch": wrap(
            lambda x, weights, plan: jax.vjp(lambda x, weights: dispatch(x, weights, plan), x, weights)[1]
        ),
        "combine": wrap(
            lambda y, weights, plan: jax.vjp(lambda y, weights: combine(y, weights, plan), y, weights)[1]
        ),
    }
    pulled = wrap(lambda pull, cotangents: pull(cotangents))

    def plan_of(x, idx, weights, dout):
        return stack_rows(x, group), stack_rows(weights, group), planned(stack_rows(idx, group))

    def rows_of(x, idx, weights, dout):
        x, weights, plan = plan_of(x, idx, weights, dout)
        return *dispatched(x, weights, plan), plan

    def dispatch_pull_of(x, idx, weights, dout):
        x, weights, plan = plan_of(x, idx, weights, dout)
        return pulls["dispatch"](x, weights, plan), dispatched(x, weights, plan)

    def combine_pull_of(x, idx, weights, dout):
        return pulls["combine"](*rows_of(x, idx, weights, dout)), stack_rows(dout, group)

    def whole(x, idx, weights):
        return there_and_back(x, weights, make_plan(idx))

    return {
        (LIBRARY, "plan"): Candidate(planned, lambda x, idx, weights, dout: (stack_rows(idx, group),)),
        (LIBRARY, "dispatch"): Candidate(dispatched, plan_of),
        (LIBRARY, "combine"): Candidate(wrap(combine), rows_of),
        (LIBRARY, "dispatch + combine"): Candidate(wrap(there_and_back), plan_of),
        (LIBRARY, ALL): Candidate(on_ranks(group.mesh, whole), lambda *inputs: inputs[:3]),
        (LIBRARY, "dispatch backward"): Candidate(pulled, dispatch_pull_of),
        (LIBRARY, "combine backward"): Candidate(pulled, combine_pull_of),
        (LIBRARY, "forward + backward"): Candidate(forward_and_backward(group.mesh, whole)),
    }


def stack_rows(array: jax.Array, group: wep.ExpertGroup) -> jax.Array:
    """[ranks * n, ...] -> [ranks, n, ...], so that `unstack` finds a rank's shard."""
    return array.reshape(group.num_ranks, -1, *array.shape[1:])


def forward_and_backward(mesh: jax.sharding.Mesh, whole: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(x, idx, weights, dout) -> output and the gradients of x and weights."""

    def both(x, idx, weights, dout):
        out, pull = jax.vjp(lambda x, weights: whole(x, idx, weights), x, weights)
        return out, pull(dout)

    return on_ranks(mesh, both)


def baseline_variants(
    settings: ExchangeSettings, group: wep.ExpertGroup, draws: Draws, capacity: int
) -> dict[str, tuple[baselines.Baseline, baselines.Setting]]:
    """The baselines that this platform has, with their sizes.

    The padded one comes twice: with blocks that can lose nothing whatever the routing is, and with blocks as
    large as this run's draws need, which only somebody who knows the routing beforehand could choose.
    """
    platform = group.mesh.devices.flat[0].platform
    sizes = baselines.no_drop_setting(
        tuple(group.axis),
        group.num_ranks,
        settings.experts,
        settings.tokens,
        settings.top_k,
        capacity=capacity,
    )
    variants = {}
    for name, baseline in baselines.BASELINES.items():
        if platform in baseline.missing_on:
            continue
        variants[name] = (baseline, sizes)
        if name == "padded all_to_all":
            known = dataclasses.replace(sizes, pad=draws.largest_pair)
            variants[f"{name}, pad known"] = (baseline, known)
    return variants


def baseline_candidates(
    name: str, baseline: baselines.Baseline, sizes: baselines.Setting, mesh: jax.sharding.Mesh
) -> dict[Key, Candidate]:
    def whole(x, idx, weights):
        return baselines.moe(baseline, x, idx, weights, lambda rows, _: rows, sizes)

    return {
        (name, ALL): Candidate(on_ranks(mesh, whole), lambda *inputs: inputs[:3]),
        (name, "forward + backward"): Candidate(forward_and_backward(mesh, whole)),
    }


def _show(
    settings: ExchangeSettings, records: list[report.Record], missing: dict[str, str], failed: dict[Key, str]
) -> None:
    if records[0]["process"] != 0:
        return
    library = {record["op"]: record["median_ms"] for record in records if record["implementation"] == LIBRARY}
    *timed, copy = records
    rows: list[list[Any]] = []
    for record in timed:
        op, time_ms = record["op"], record["median_ms"]
        logical, wire = record["logical_bytes"], record["wire_bytes"]
        rows.append(
            [
                f"{record['implementation']}: {op}",
                time_ms,
                record["min_ms"],
                record["cpu_ms"],
                logical / 1e6 if logical else None,
                wire / 1e6 if wire else None,
                logical / time_ms / 1e6 if logical else None,
                time_ms / library[op] if record["implementation"] != LIBRARY and op in library else None,
            ]
        )
    rows += [[text] + [None] * 7 for text in report.reasons(missing, failed)]
    best = [
        record["median_ms"] for record in timed if record["implementation"] != LIBRARY and record["op"] == ALL
    ]
    ours = library["dispatch + combine"]
    notes = [
        "Whole jitted call until every rank's outputs are ready; median and minimum over repeats with fresh data; "
        "CPU: median over all threads.",
        f"Floor: dispatch + combine read and write {copy['job_bytes'] / 1e6:,.0f} MB at the least, "
        f"{copy['median_ms']:.1f} ms at the {copy['copy_bytes_per_s'] / 1e9:.1f} GB/s (read + written) of one core's "
        f"memcpy; dispatch + combine took {ours / copy['median_ms']:.2f} times that."
        if copy["platform"] == "cpu"
        else f"Bare copy on one device: {copy['copy_bytes_per_s'] / 1e9:,.0f} GB/s, read + written.",
    ]
    if best:
        notes.append(
            f"Best baseline, index arithmetic included: {min(best) / library[ALL]:.1f} times {LIBRARY}'s {ALL}."
        )
    report.print_table(
        f"exchange: {report.sizes(copy)}",
        ["", "median ms", "min ms", "CPU ms", "logical MB", "wire MB", "logical GB/s", f"x {LIBRARY}"],
        rows,
        notes,
    )
    report.write_json_lines(records, settings.output.json)
    if settings.output.plot:
        bars = {f"{record['implementation']}: {record['op']}": record["median_ms"] for record in timed}
        report.plot_bars(settings.output.plot, report.sizes(copy), "median time, ms", bars)
