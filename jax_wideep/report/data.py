"""What the page shows, from the lines of metrics.jsonl.

The first line is `{"run": {..}}`, the settings. Then one object a step; everything but `step` may be missing:

    {"step": 1, "loss": 5.5, "held_out_loss": 5.4, "tokens_per_s": 9100.0, "exchange_ms": 3.1, "exchange_floor_ms": 2.0,
     "replaced": true, "layers": [{"tokens_per_expert": [..], "rows_per_rank": [..], "dropped": 0, "spilled": 0}, ..]}

A line `{"exchange": [{"name": "dispatch + combine", "ms": 3.1, "floor_ms": 2.0}, ..]}` holds measurements of one
exchange, outside of the steps; the floor is the time that moving the bytes alone would take.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from jax_wideep.load import imbalance

FILE = "metrics.jsonl"

# Cells of all heatmaps together, one byte each: steps are averaged in bins until they fit.
_MOST_CELLS = 6_000_000
_MOST_BINS = 1024

Record = dict[str, Any]


def read_records(run: Path) -> list[Record]:
    """The lines of RUN/metrics.jsonl; the last one may be half written.

    Raises:
      ValueError: there is no such file, or no step in it.
    """
    path = run / FILE
    if not path.exists():
        raise ValueError(
            f"report: run: expected a folder with {FILE}, got {run}; write one with examples/train_lm.py --run"
        )
    records: list[Record] = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not any("loss" in record for record in records):
        raise ValueError(
            f"report: run: expected steps with a loss in {path}, found none; let it run for a step"
        )
    return records


def page_data(records: list[Record]) -> Record:
    """What the page's script draws, as JSON takes it.

    Lists of a chart have one number for each entry of `steps`, or null. `heat` holds, for each layer, bytes
    [bins, experts] in base64: 255 * sqrt(ratio / `heat_top`), where ratio is the mean over the bin of an expert's load
    as a multiple of the layer's mean load; the root tells loads around the mean apart beside hot experts. `rank_heat`
    is the same for ranks.
    """
    by_step = {record["step"]: record for record in records if "loss" in record}
    steps = [by_step[step] for step in sorted(by_step)]
    layers = [record["layers"] for record in steps if record.get("layers")]
    data: Record = {
        "run": next((record["run"] for record in records if "run" in record), {}),
        "steps": [record["step"] for record in steps],
        "loss": [record["loss"] for record in steps],
        "held_out": [[r["step"], r["held_out_loss"]] for r in records if "held_out_loss" in r],
        "replaced": [record["step"] for record in records if record.get("replaced")],
        "exchange": next((record["exchange"] for record in reversed(records) if "exchange" in record), []),
    }
    for name in ("tokens_per_s", "exchange_ms", "exchange_floor_ms"):
        if any(name in record for record in steps):
            data[name] = [record.get(name) for record in steps]
    if len(layers) != len(steps):
        return data  # a run that did not look at its layers

    for name in ("dropped", "spilled"):
        if any(name in layer for record in layers for layer in record):
            data[name] = [sum(layer.get(name, 0) for layer in record) for record in layers]
    data |= _heat("heat", [[layer["tokens_per_expert"] for layer in record] for record in layers])
    if all("rows_per_rank" in layer for record in layers for layer in record):
        rows = [[layer["rows_per_rank"] for layer in record] for record in layers]
        by_layer = imbalance(rows)
        data["imbalance"] = {
            "worst layer": _rounded(by_layer.max(axis=1)),
            "mean of layers": _rounded(by_layer.mean(axis=1)),
        }
        data |= _heat("rank_heat", rows)
    return data


def _heat(name: str, counts: list[list[list[int]]]) -> Record:
    """From counts [steps, layers, members]."""
    loads = np.asarray(counts, np.float64)
    num_steps, num_layers, members = loads.shape
    mean = loads.mean(axis=2, keepdims=True)
    ratio = np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
    bins = max(1, min(num_steps, _MOST_BINS, _MOST_CELLS // (num_layers * members)))
    edges = np.arange(bins) * num_steps // bins
    sizes = np.diff([*edges, num_steps])
    binned = np.add.reduceat(ratio, edges, axis=0) / sizes[:, None, None]
    top = float(max(2.0, np.quantile(binned, 0.999)))
    cells = np.rint(np.sqrt(np.clip(binned / top, 0, 1)) * 255).astype(np.uint8)
    return {
        name: [base64.b64encode(cells[:, layer].tobytes()).decode() for layer in range(num_layers)],
        f"{name}_top": top,
        f"{name}_members": members,
        f"{name}_edges": [*edges.tolist(), num_steps],
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
