"""Two runs of examples/train_lm.py side by side, from their metrics.jsonl: losses, and speed after the first steps.

    python benchmarks/compare_runs.py RUN RUN [--json FILE]

The runs have the same settings on the same devices, held by other numbers of processes. Fails if a loss of the first
--steps differs by more than --tolerance, relative: later ones of bfloat16 models drift apart by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any

MAY_DIFFER = ("processes",)
WARMUP = 5  # steps that compile, or wait for others that do


def read(run: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings, and the records of the steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return records[0]["run"], [record for record in records if "loss" in record]


def summary(settings: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    timed = steps[WARMUP:] or steps
    mfu = [step["mfu"] for step in timed if step.get("mfu") is not None]
    names = ("device", "ranks", "processes", "backend", "parameters", "batch", "seq", "dtype")
    return {
        "benchmark": "train_lm",
        **{name: settings[name] for name in names},
        "steps": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "step_ms": 1e3 * statistics.median(step["step_s"] for step in timed),
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in timed),
        "mfu": statistics.median(mfu) if mfu else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path, nargs=2)
    parser.add_argument("--steps", type=int, default=10, help="whose losses are compared")
    parser.add_argument("--tolerance", type=float, default=0.02, help="relative")
    parser.add_argument("--json", type=pathlib.Path, help="a line for each run goes there")
    options = parser.parse_args()
    (first, steps), (second, others) = map(read, options.runs)
    for name in first.keys() | second.keys():
        if name not in MAY_DIFFER and first.get(name) != second.get(name):
            raise SystemExit(
                f"compare_runs: {name}: expected the same in both runs, got {first.get(name)!r} and "
                f"{second.get(name)!r}; run both with the same options on the same devices"
            )
    if len(steps) != len(others) or not steps:
        raise SystemExit(f"compare_runs: expected runs of as many steps, got {len(steps)} and {len(others)}")
    records = [summary(first, steps), summary(second, others)]
    for record in records:
        mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
        print(
            f"train_lm: {record['ranks']} ranks in {record['processes']} processes, {record['parameters'] / 1e6:.0f} M "
            f"parameters, {record['dtype']}: loss {record['first_loss']:.3f} -> {record['last_loss']:.3f}, "
            f"{record['step_ms']:.1f} ms a step, {record['tokens_per_s']:,.0f} tokens/s{mfu}"
        )
    apart = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, others, strict=True)]
    worst = max(apart[: options.steps])
    print(
        f"train_lm: losses differ by {worst:.1e} in the first {options.steps} steps, {max(apart):.1e} in all"
    )
    if options.json is not None:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    if worst > options.tolerance:
        print(f"train_lm: expected a difference of at most {options.tolerance}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
