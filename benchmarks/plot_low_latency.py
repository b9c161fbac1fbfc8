"""Table and plot of the low-latency kernels' times, from the JSON lines of low_latency.cu.

    python benchmarks/plot_low_latency.py docs/data/low_latency_h200.jsonl [--out docs/img/low_latency_h200.png]

Prints a Markdown table: a line for each number of ranks and tokens, microseconds with the floor behind the slash.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

Figures = dict[tuple[int, bool, int, str], dict[str, Any]]  # by ranks, once per rank, tokens, wire

# Dispatch over each wire; combine is always in bfloat16 and taken from the last one.
WIRES = ("fp8 kept", "fp8 to bf16", "bf16")
# Colours that stay apart for the colour-blind.
COLOURS = {"fp8 kept": "#0072b2", "fp8 to bf16": "#56b4e9", "bf16": "#e69f00", "combine": "#009e73"}


def read(path: pathlib.Path) -> Figures:
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    sizes = {(r["hidden"], r["top_k"], r["experts"], r["sms"]) for r in records}
    if len(sizes) != 1:
        raise SystemExit(
            f"plot_low_latency: expected lines of one hidden, top_k, experts and sms, got {sizes}"
        )
    return {(r["ranks"], r["once_per_rank"], r["tokens"], r["wire"]): r for r in records}


def columns(figures: Figures, ranks: int, once: bool, tokens: int) -> dict[str, tuple[float, float]]:
    """Microseconds and floor of each op."""
    values = {}
    for wire in WIRES:
        record = figures.get((ranks, once, tokens, wire))
        if record is not None:
            values[wire] = (record["dispatch_us"], record["dispatch_floor_us"])
            values["combine"] = (record["combine_us"], record["combine_floor_us"])
    return values


def print_table(figures: Figures) -> None:
    names = [*WIRES, "combine"]
    print("| ranks | tokens | sent once | " + " | ".join(f"dispatch {n}" for n in WIRES) + " | combine |")
    print("|---|---|---" + "|---" * len(names) + "|")
    for ranks, once, tokens in dict.fromkeys(key[:3] for key in figures):
        values = columns(figures, ranks, once, tokens)
        cells = [f"{values[n][0]:.1f} / {values[n][1]:.1f}" if n in values else "" for n in names]
        print(f"| {ranks} | {tokens} | per {'rank' if once else 'expert'} | " + " | ".join(cells) + " |")


def draw(figures: Figures, title: str, out: pathlib.Path) -> None:
    """A panel for each number of ranks: times, floors dashed, the other form dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_ranks = sorted({key[0] for key in figures})
    figure, axes = pyplot.subplots(
        1, len(all_ranks), figsize=(4.5 * len(all_ranks), 4.5), sharey=True, squeeze=False
    )
    for axis, ranks in zip(axes[0], all_ranks, strict=True):
        for name, colour in COLOURS.items():
            for once, style in ((True, "o-"), (False, ":")):
                points = {
                    tokens: columns(figures, ranks, once, tokens)
                    for tokens in sorted({key[2] for key in figures if key[:2] == (ranks, once)})
                }
                points = {tokens: values[name] for tokens, values in points.items() if name in values}
                # Combine does the same in both forms.
                if not points or (name == "combine" and not once):
                    continue
                label = (name if name == "combine" else f"dispatch {name}") if once else None
                axis.plot(
                    list(points),
                    [us for us, _ in points.values()],
                    style,
                    color=colour,
                    label=label,
                    markersize=4,
                )
                if once:
                    axis.plot(
                        list(points),
                        [floor for _, floor in points.values()],
                        "--",
                        color=colour,
                        linewidth=0.8,
                    )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(bottom=4)
        axis.set_xlabel("tokens a rank")
        axis.set_title(f"{ranks} ranks", fontsize=10)
        axis.grid(which="both", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("microseconds a call")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{title}\ndashed: floor; dotted: sent once per expert", fontsize=10)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="PNG; none draws nothing")
    parser.add_argument("--title", default="Low-latency dispatch and combine, ranks share one GPU")
    arguments = parser.parse_args()
    read_figures = read(arguments.file)
    print_table(read_figures)
    if arguments.out is not None:
        draw(read_figures, arguments.title, arguments.out)
