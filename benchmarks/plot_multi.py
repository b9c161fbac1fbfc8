"""Tables and plot of what tests/gpu/run_multi.sh measured on several GPUs, from the JSON lines of its folder.

    python benchmarks/plot_multi.py FOLDER [--out docs/img/NAME.png] [--merge]

Prints Markdown tables. Bytes on the wire are those that a rank sends on average, rows only, under uniform routing:
*rows* that go to other ranks, for forms that move every row, or one row for each token and other rank that hosts some
of its experts, for forms that move it *once*.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]

# What crosses the link in an op, by a part of its name; the first that fits counts.
ROWS = ("dispatch push", "fp8 push", "combine pull", "dispatch grad pull")
# Colours that stay apart for the colour-blind.
COLOURS = {
    "plan + dispatch push": "#0072b2",
    "plan + dispatch pull": "#e69f00",
    "combine pull": "#009e73",
    "combine reduce": "#d55e00",
    "combine grad": "#cc79a7",
}
EXPERTS = 256  # of exchange_gpu.py


def read(folder: pathlib.Path) -> list[Record]:
    files = sorted(folder.glob("*.jsonl"))
    records = [
        {"file": file.stem, "group": {}} | json.loads(line)
        for file in files
        for line in file.read_text().splitlines()
        if line.strip()
    ]
    if not records:
        raise SystemExit(
            f"plot_multi: expected JSON lines in {folder}, got none; run tests/gpu/run_multi.sh first"
        )
    return records


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if kind in (record.get("kind"), record.get("benchmark"))]


def reached(ranks: int, experts: int, top_k: int) -> float:
    """How likely a token has at least one of its `top_k` distinct experts on a given rank."""
    return 1 - math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k)


def wire_bytes(record: Record) -> float | None:
    """Mean bytes that a rank sends in an op; None where routing is not uniform."""
    if record["routing"] != "uniform" or record["op"] == "plan":
        return None
    ranks, tokens, top_k, hidden = (record[name] for name in ("ranks", "tokens", "top_k", "hidden"))
    row_bytes = hidden + 4 * (hidden // 128) if "fp8" in record["op"] else 2 * hidden
    if any(name in record["op"] for name in ROWS):
        return tokens * top_k * (ranks - 1) / ranks * row_bytes
    return tokens * (ranks - 1) * reached(ranks, EXPERTS, top_k) * row_bytes


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def link_table(records: list[Record]) -> str:
    return table(
        ["pattern", "way", "SMs", "GB/s that a GPU sends"],
        ([r["pattern"], r["way"], r["sms"] or "", r["gb_per_s"]] for r in records),
    )


def exchange_table(records: list[Record]) -> str:
    def row(r: Record) -> list[Any]:
        sent = wire_bytes(r)
        return [
            r["op"],
            r["routing"],
            r["num_sms"],
            f"{r['us']:.0f}",
            None if sent is None else f"{sent / 1e6:.0f}",
            None if sent is None else f"{sent / r['us'] / 1e3:.0f}",
            f"{r['floor_us'] / r['us']:.0%}" if r["floor_us"] else None,
        ]

    header = ["op", "routing", "SMs", "us", "a rank sends, MB", "GB/s of that", "of copy speed"]
    return table(header, map(row, records))


def latency_table(records: list[Record]) -> str:
    return table(
        ["wire", "tokens a rank", "dispatch, us", "combine, us", "layer, us"],
        (
            [
                r["wire"],
                r["tokens"],
                f"{r['dispatch_us']:.1f}",
                f"{r['layer_us'] - r['dispatch_us']:.1f}",
                f"{r['layer_us']:.1f}",
            ]
            for r in records
        ),
    )


def whole_table(records: list[Record]) -> str:
    library = {(r["file"], r["op"]): r["median_ms"] for r in records if r["implementation"] == "jax_wideep"}
    return table(
        ["run", "implementation", "op", "median ms", "min ms", "of jax_wideep's"],
        (
            [
                r["file"],
                r["implementation"],
                r["op"],
                f"{r['median_ms']:.2f}",
                f"{r['min_ms']:.2f}" if "min_ms" in r else None,
                f"{r['median_ms'] / library[r['file'], r['op']]:.2f}"
                if (r["file"], r["op"]) in library
                else None,
            ]
            for r in records
        ),
    )


def draw(records: list[Record], out: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4.2), layout="constrained", width_ratios=(1, 1, 1, 0.9))
    link, exchange, latency, whole = axes
    for way in dict.fromkeys(r["way"] for r in of_kind(records, "peer_copy")):
        points = [r for r in of_kind(records, "peer_copy") if r["way"] == way and r["pattern"] == "next"]
        if way == "copy engine":
            link.axhline(points[0]["gb_per_s"], color="0.5", linestyle="--", label=way)
        else:
            link.plot(
                [r["sms"] for r in points], [r["gb_per_s"] for r in points], "o-", label=way, markersize=4
            )
    link.set(title="plain copies between neighbours", xlabel="SMs", ylabel="GB/s that a GPU sends", ylim=0)
    ops = [r for r in of_kind(records, "exchange_jax") if r["routing"] == "uniform" and not r["group"]]
    for op, colour in COLOURS.items():
        points = sorted((r for r in ops if r["op"] == op), key=lambda r: r["num_sms"])
        exchange.plot(
            [r["num_sms"] for r in points],
            [r["us"] for r in points],
            "o-",
            color=colour,
            label=op,
            markersize=4,
        )
    exchange.set(title="an op, captured", xlabel="SMs a rank", ylabel="microseconds", ylim=0)
    for wire, style in (("fp8", "o-"), ("bf16", "s--")):
        points = [r for r in of_kind(records, "loop of exchanges") if r["wire"] == wire]
        tokens = [r["tokens"] for r in points]
        latency.plot(
            tokens, [r["dispatch_us"] for r in points], style, color="#0072b2", label=f"dispatch {wire}"
        )
        if wire == "bf16":
            combine = [r["layer_us"] - r["dispatch_us"] for r in points]
            latency.plot(tokens, combine, style, color="#009e73", label="combine")
    latency.set(title="low latency, captured", xlabel="tokens a rank", ylabel="microseconds")
    if of_kind(records, "loop of exchanges"):
        latency.set_xscale("log", base=2)
        latency.set_yscale("log", base=2)
        for axis in (latency.xaxis, latency.yaxis):
            axis.set_major_formatter("{x:.0f}")
    calls = [r for r in of_kind(records, "exchange") if r["op"] == "plan + dispatch + combine"]
    bars = {r["implementation"]: r["median_ms"] for r in calls if not r["file"].endswith("_false")}
    whole.barh(list(bars), list(bars.values()), color="#56b4e9")
    whole.invert_yaxis()
    whole.set(title="plan + dispatch + combine,\nwhole calls", xlabel="milliseconds")
    if bars:
        whole.set_xscale("log")
    for axis in axes[:3]:
        if axis.lines:  # what was measured in this run
            axis.legend(fontsize=7, frameon=False)
        axis.grid(linewidth=0.3)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="PNG; none draws nothing")
    parser.add_argument(
        "--merge", action="store_true", help="leave one file of records, multi.jsonl, in place of the others"
    )
    arguments = parser.parse_args()
    records = read(arguments.folder)
    for kind, make in (
        ("peer_copy", link_table),
        ("exchange_jax", exchange_table),
        ("loop of exchanges", latency_table),
        ("exchange", whole_table),
        ("layer", whole_table),
    ):
        chosen = of_kind(records, kind)
        # Settings of the group other than the defaults.
        for group in dict.fromkeys(json.dumps(record["group"]) for record in chosen):
            part = [record for record in chosen if json.dumps(record["group"]) == group]
            print(f"### {kind}{'' if group == '{}' else f', {group}'}\n{make(part)}")
    if arguments.out is not None:
        draw(records, arguments.out)
    if arguments.merge:
        for file in arguments.folder.glob("*.jsonl"):
            file.unlink()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (arguments.folder / "multi.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
