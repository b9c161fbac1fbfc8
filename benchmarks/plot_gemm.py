"""Draws TFLOP/s of the grouped products beside those of others, from the JSON lines of gemm.cu, gemm_peers.py and
gemm_jax.py.

    python benchmarks/plot_gemm.py docs/data/gemm_h200.jsonl .. --out docs/img/gemm_h200.png [--title ..]
"""

from __future__ import annotations

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRODUCTS = ("forward", "input grad", "weight grad")
# Colours that stay apart for the colour-blind.
PROGRAMS = {
    "wideep": "#0072b2",
    "cuBLAS dense": "#999999",
    "torch._grouped_mm": "#e69f00",
    "ragged_dot": "#d55e00",
}


def read(paths: list[pathlib.Path]) -> dict[tuple[str, str, str], float]:
    """TFLOP/s by (shape, product, program); other lines than timings are skipped."""
    tflops = {}
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line) if line.startswith("{") else {}
            if "us" not in record or record.get("sizes") not in ("uniform", "zipf"):
                continue
            m, k, n, groups = (record[key] for key in ("m", "k", "n", "groups"))
            shape = f"{m}, {k},\n{n}, {groups}" + (", zipf" if record["sizes"] == "zipf" else "")
            tflops[shape, record["product"], record["program"]] = 2e-6 * m * k * n / record["us"]
    return tflops


def draw(tflops: dict[tuple[str, str, str], float], title: str, out: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, len(PRODUCTS), figsize=(15, 4.5), sharey=True, width_ratios=(7, 4, 4))
    for axis, product in zip(axes, PRODUCTS, strict=True):
        shapes = list(dict.fromkeys(shape for shape, product_, _ in tflops if product_ == product))
        for number, (program, colour) in enumerate(PROGRAMS.items()):
            places = [i + (number - 1.5) * 0.2 for i in range(len(shapes))]
            values = [tflops.get((shape, product, program), 0.0) for shape in shapes]
            bars = axis.bar(places, values, 0.2, label=program, color=colour)
            axis.bar_label(bars, [f"{value:.0f}" if value else "" for value in values], fontsize=6)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=6)
        axis.set_title(product, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("TFLOP/s of 2·m·k·n")
    axes[0].legend(fontsize=8, loc="upper right")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--title", default="Grouped GEMM, bf16; m, k, n, groups below")
    arguments = parser.parse_args()
    draw(read(arguments.files), arguments.title, arguments.out)
