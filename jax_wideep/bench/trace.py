"""Benchmark `trace`: records a few steps of a layer with JAX's profiler, and says what each phase took.

The layer is route, plan, dispatch, experts and combine, forward and backward, as jax_wideep.flax.MoE runs them. The
trace opens in XProf or Perfetto; see docs/profiling.md. The summary adds up the operations of each named scope, without
what they call; on a GPU run it with XLA_FLAGS=--xla_gpu_enable_command_buffer= so that every kernel names its
operation.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

import jax_wideep as wep
from jax_wideep.bench import measure, report
from jax_wideep.bench.layer import LayerSettings
from jax_wideep.bench.measure import on_ranks
from jax_wideep.bench.settings import Draws
from jax_wideep.moe import inner_size

_SCOPE = re.compile(r"wideep_\w+")
# In the text of a compiled program.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class TraceSettings(LayerSettings):
    """Sizes of a layer, and where its trace goes."""

    steps: int = 5
    """Steps recorded; one before them compiles."""
    trace: pathlib.Path | None = None
    """Folder for the trace; none keeps none."""
    longest: int = 12
    """Operations to list."""


def run(settings: TraceSettings) -> list[report.Record]:
    """Records, prints the summary, and returns its records."""
    measure.start_processes(**dataclasses.asdict(settings.processes))
    mesh = measure.make_mesh(settings.devices, settings.backend)
    draws = Draws(settings, mesh)
    router = wep.RouterConfig(settings.experts, settings.top_k)
    group = measure.make_group(mesh, settings)

    def layer(x: jax.Array, kernel: jax.Array, wi: jax.Array, wo: jax.Array) -> jax.Array:
        with jax.named_scope("wideep_route"):
            logits = wep.routing.router_logits(x, kernel, router)
            routing = wep.routing.route(logits, router)
        return wep.moe_ffn(x, routing.topk_idx, routing.topk_weights, wi, wo, group, return_stats=False)[0]

    def step(*arguments: jax.Array) -> Any:
        out, pull = jax.vjp(layer, *arguments)
        return out, pull(out)

    with group, tempfile.TemporaryDirectory() as scratch:
        scale = np.asarray(settings.hidden**-0.5, jax.numpy.dtype(settings.dtype))
        inner = inner_size(settings.ffn, "swiglu")
        arguments = (
            draws.tokens(),
            # A router's matrix for each rank, so that no gradient is summed over ranks.
            draws.activations(mesh.size * settings.hidden, settings.experts),
            draws.activations(settings.experts, settings.hidden, inner) * scale,
            draws.activations(settings.experts, settings.ffn, settings.hidden) * scale,
        )
        compiled = jax.jit(on_ranks(mesh, step)).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        folder = pathlib.Path(scratch) if settings.trace is None else settings.trace
        if jax.process_count() > 1:  # which would write files of one name
            folder = folder / f"process{jax.process_index()}"
        with jax.profiler.trace(str(folder)):
            for number in range(settings.steps):
                with jax.profiler.StepTraceAnnotation("step", step_num=number):
                    jax.block_until_ready(compiled(*arguments))
        times = operation_seconds(_newest(folder))
        scopes = scopes_of(compiled.as_text() or "")
        environment = measure.environment(mesh)

    calls = settings.steps * len(mesh.local_devices)
    common = {"benchmark": "trace", "backend": group.backend, "capacity": None} | settings.record()
    seconds: dict[str, float] = collections.defaultdict(float)
    for operation, total in times.items():
        seconds[scopes.get(operation, OTHER)] += total
    records = [
        common | {"phase": phase, "ms": 1e3 * total / calls} | environment
        for phase, total in sorted(seconds.items())
    ]
    if environment["process"] == 0 and records:
        whole = sum(record["ms"] for record in records)
        report.print_table(
            f"trace: {report.sizes(records[0])}, ffn {settings.ffn}",
            ["phase", "ms a step and rank", "share"],
            [[record["phase"], record["ms"], f"{record['ms'] / whole:.0%}"] for record in records],
            [f"Time in operations, over {settings.steps} steps. " + _kept(settings)],
        )
        longest = sorted(times.items(), key=lambda item: -item[1])[: settings.longest]
        report.print_table(
            "The longest operations",
            ["operation", "phase", "ms a step and rank"],
            [[name, scopes.get(name, OTHER), 1e3 * total / calls] for name, total in longest],
        )
        report.write_json_lines(records, settings.output.json)
    return records


def scopes_of(program: str) -> dict[str, str]:
    """Operation -> its phase, from a compiled program's text: the outermost scope of the library in its name.

    The compiler drops the names of some operations that it makes. Those belong to the phase of most operations that
    they call, or else, inside a loop, of most operations beside them.
    """
    scopes: dict[str, str] = {}
    nameless: list[tuple[str, str, list[str]]] = []  # operation, computation, computations that it calls
    inside: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    computation = ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = "" if header[1] else header[2]  # the entry has operations of all phases
            continue
        operation = _OPERATION.match(line)
        if not operation:
            continue
        name = _OP_NAME.search(line)
        found = _SCOPE.search(name[1]) if name else None
        if name and found:
            backward = "transpose(" in name[1][: found.start()]
            scopes[operation[1]] = f"{found[0]}, backward" if backward else found[0]
            inside[computation][scopes[operation[1]]] += 1
        else:
            nameless.append((operation[1], computation, _CALLED.findall(line)))
    for unnamed, computation, called in nameless:
        votes = sum((inside[callee] for callee in called), collections.Counter())
        if not votes and computation:
            votes = inside[computation]
        if votes:
            scopes[unnamed] = votes.most_common(1)[0][0]
    return scopes


def operation_seconds(trace: pathlib.Path) -> dict[str, float]:
    """Seconds by operation, over all devices of this process; what an operation calls counts for itself.

    On a GPU these are the kernels; one that names no operation counts under its own name.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    on_devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    seconds: dict[str, float] = collections.defaultdict(float)
    for plane in on_devices or planes:
        for line in plane.lines:
            # Other lines of a device repeat what its streams ran.
            if on_devices and not line.name.startswith("Stream"):
                continue
            for operation, duration in _own_times(_operations(line.events, named=not on_devices)):
                seconds[operation] += duration * 1e-9
    return dict(seconds)


def _operations(events: Iterable[Any], named: bool) -> list[tuple[float, float, str]]:
    """(start, duration, operation) in ns of the events that are operations of a compiled program; with `named`, only
    those that say which."""
    found = []
    for event in events:
        operation = next((value for name, value in event.stats if name == "hlo_op"), None)
        if operation is not None or not named:
            found.append((event.start_ns, event.duration_ns, str(operation or event.name)))
    return found


def _own_times(operations: list[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """Each operation's duration without those that lie within it."""
    times: list[tuple[str, float]] = []
    open_until: list[tuple[float, int]] = []
    for start, duration, operation in sorted(operations, key=lambda event: (event[0], -event[1])):
        while open_until and open_until[-1][0] <= start:
            open_until.pop()
        if open_until:
            parent, own = times[open_until[-1][1]]
            times[open_until[-1][1]] = (parent, own - duration)
        times.append((operation, duration))
        open_until.append((start + duration, len(times) - 1))
    return times


def _newest(folder: pathlib.Path) -> pathlib.Path:
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def _kept(settings: TraceSettings) -> str:
    return "The trace was not kept." if settings.trace is None else f"Trace in {settings.trace}."
