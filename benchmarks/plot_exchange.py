"""Draws the exchange's times against tokens, hidden, top-k, ranks, SMs and routing, and writes the tables of
docs/performance_exchange.md, from the JSON lines of exchange.cu (--sweep) and exchange_gpu.py.

    python benchmarks/plot_exchange.py docs/data/exchange_h200.jsonl .. [--out docs/img/exchange_h200.png]
        [--page docs/performance_exchange.md]

Without --page the tables are printed. In a page, a table replaces what is between its marks, <!-- table NAME --> and
<!-- end -->, and a link to --out what is between <!-- plot --> and <!-- end -->. Of lines for the same point the last
one counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Colours that stay apart for the colour-blind.
OPS = {
    "plan": "#999999",
    "plan + dispatch push": "#0072b2",
    "plan + dispatch pull": "#e69f00",
    "combine pull": "#009e73",
    "combine grad": "#cc79a7",
}
FLOORS = {
    "plan + dispatch push": ("floor of dispatch, combine", "--"),
    "combine grad": ("floor of combine grad", ":"),
}
AXES = {
    "tokens": "tokens a rank",
    "hidden": "hidden",
    "top_k": "top-k",
    "ranks": "ranks (hollow: with more SMs each)",
    "sms": "SMs a rank",
}
ROUTINGS = ("uniform", "zipf", "hot")


@dataclasses.dataclass(frozen=True)
class Point:
    ranks: int = 8
    sms: int = 16
    tokens: int = 4096
    hidden: int = 7168
    top_k: int = 8
    routing: str = "uniform"

    def but(self, **changes: int | str) -> Point:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


BASE = Point()
WHOLE_GPU = BASE.but(ranks=1, sms=132)
MORE_SMS = (BASE.but(ranks=4, sms=24), WHOLE_GPU)


class Figures:
    """What was measured, by (op, point)."""

    def __init__(self, paths: list[pathlib.Path]):
        self.kernels: dict[tuple[str, Point], dict] = {}
        self.jax: dict[str, dict[tuple[str, Point], dict]] = {"chain": {}, "loop": {}}
        for path in paths:
            for line in path.read_text().splitlines():
                record = json.loads(line) if line.startswith("{") else {}
                if record.get("kind") == "exchange_kernels":
                    self.kernels[_key(record, record["sms"])] = record
                elif record.get("kind") == "exchange_jax":
                    self.jax[record["form"]][_key(record, record["num_sms"])] = record

    def us(self, op: str, point: Point = BASE) -> float | None:
        record = self.kernels.get((op, point))
        return record and record["us"]

    def jax_us(self, form: str, op: str, point: Point = BASE) -> float | None:
        record = self.jax[form].get((op, point))
        return record and record["us"]

    def values(self, axis: str, start: Point = BASE) -> list:
        """Of `axis`, where everything else is as in `start`."""
        return sorted(
            {getattr(p, axis) for _, p in self.kernels if p.but(**{axis: getattr(start, axis)}) == start}
        )


def _key(record: dict, sms: int) -> tuple[str, Point]:
    point = Point(
        sms=sms, **{name: record[name] for name in ("ranks", "tokens", "hidden", "top_k", "routing")}
    )
    return record["op"], point


def number(us: float | None) -> str:
    return "–" if us is None else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not measured."
    lines = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


# ---- tables ----


def base_table(figures: Figures) -> str:
    rows = []
    for (op, point), record in figures.kernels.items():
        if point != BASE:
            continue
        floor = record["floor_us"]
        part = f"{floor / record['us']:.0%}" if floor else "–"
        speeds = [
            f"{record[f'{kind}_gb_s']:.0f}" if record["logical_gb_s"] else "–" for kind in ("logical", "wire")
        ]
        rows.append([op, number(record["us"]), number(floor) if floor else "–", part, *speeds])
    header = ["op", "us", "floor", "of it", "logical GB/s", "wire GB/s"]
    return table(header, rows)


def overhead_table(figures: Figures) -> str:
    def cell(us: float | None, kernels: float) -> str:
        return "–" if us is None else f"{us:.1f} ({us - kernels:+.1f})"

    rows = []
    for (op, point), record in figures.kernels.items():
        jax = [figures.jax_us(form, op) for form in ("chain", "loop")]
        if point == BASE and jax != [None, None]:
            rows.append([op, f"{record['us']:.1f}", *(cell(us, record["us"]) for us in jax)])
    return table(["us", "kernels", "JAX, chain", "JAX, loop"], rows)


def sweep_table(figures: Figures, points: list[tuple[str, Point]], first: str) -> str:
    def cell(op: str, point: Point) -> str:
        record = figures.kernels.get((op, point))
        if record is None:
            return "–"
        if not record["floor_us"]:
            return number(record["us"])
        part = record["floor_us"] / record["us"]
        return f"{number(record['us'])} ({part:.0%}; {record['logical_gb_s']:.0f}, {record['wire_gb_s']:.0f})"

    rows = []
    for label, point in points:
        floors = [figures.kernels.get((op, point), {}).get("floor_us") for op in FLOORS]
        rows.append([label, *(number(floor) for floor in floors), *(cell(op, point) for op in OPS)])
    return table([first, "floor", "floor, grad", *OPS], rows)


def axis_table(figures: Figures, axis: str) -> str:
    values = ROUTINGS if axis == "routing" else figures.values(axis)
    points = [(str(value), BASE.but(**{axis: value})) for value in values]
    if axis == "ranks":
        points += [(f"{p.ranks}, of {p.sms} SMs", p) for p in MORE_SMS]
    measured = {point for _, point in figures.kernels}
    points = [(label, point) for label, point in points if point in measured]
    if len(points) < 2:
        return "Not measured."
    return sweep_table(figures, points, {"sms": "SMs", "top_k": "top-k"}.get(axis, axis))


def aims_table(figures: Figures) -> str:
    """The aims at 8 ranks, 16 SMs each, 4096 tokens, hidden 7168, top-8 of 256, and what came out."""
    rows = []

    def row(what: str, op: str, aim: float | None, aim_text: str, point: Point = BASE) -> None:
        chain, loop = (figures.jax_us(form, op, point) for form in ("chain", "loop"))
        measured = [figures.us(op, point), chain if chain is not None else loop]
        if aim is None or measured == [None, None]:
            return
        rows.append(
            [
                what,
                aim_text,
                *(number(us) if us is None or us <= aim else f"**{number(us)}**" for us in measured),
            ]
        )

    def beside(what: str, op: str, factor: float, other: str, point: Point = BASE) -> None:
        us = figures.us(other)
        row(what, op, us and factor * us, f"{factor} × {number(us)}", point)

    for op, aim in {
        "plan": 40,
        "plan + dispatch push": 1300,
        "plan + dispatch pull": 1550,
        "plan + dispatch rings": 2400,
        "plan + quantize + dispatch fp8 push": 800,
        "combine pull": 1150,
        "combine push": 2300,
    }.items():
        row(op, op, aim, str(aim))
    beside("dispatch grad pull, beside dispatch push", "dispatch grad pull", 1.15, "dispatch push")
    beside("combine grad, beside combine pull", "combine grad", 1.15, "combine pull")
    row("plan + dispatch push, 4 SMs a rank", "plan + dispatch push", 2300, "2300", BASE.but(sms=4))
    for routing in ROUTINGS[1:]:
        for op in list(OPS)[1:]:
            beside(f"{op}, {routing}, beside uniform", op, 1.3, op, BASE.but(routing=routing))
    for op in ("dispatch push", "combine pull"):
        floor = figures.kernels.get((op, WHOLE_GPU), {}).get("floor_us")
        row(f"{op}, one rank of 132 SMs", op, floor and floor / 0.85, f"{number(floor)} / 0.85", WHOLE_GPU)
    return table(["", "aim, us", "kernels", "8 JAX processes"], rows)


TABLES: dict[str, Callable[[Figures], str]] = {
    "aims": aims_table,
    "base": base_table,
    "overhead": overhead_table,
    **{axis: lambda figures, axis=axis: axis_table(figures, axis) for axis in (*AXES, "routing")},
}


def write_page(page: pathlib.Path, blocks: dict[str, str]) -> None:
    text = page.read_text()
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.S)
        if found != 1:
            raise SystemExit(f"{page}: expected the mark <!-- {name} --> once, got it {found} times")
    page.write_text(text)


# ---- plot ----


def draw_axis(plot: plt.Axes, figures: Figures, axis: str) -> None:
    values = figures.values(axis)
    points = [BASE.but(**{axis: value}) for value in values]
    for op, colour in OPS.items():
        plot.plot(values, [figures.us(op, p) for p in points], "o-", ms=3.5, lw=1.4, color=colour, label=op)
        if axis == "ranks":
            more = [p for p in MORE_SMS if figures.us(op, p)]
            style = {"ms": 6, "mfc": "none", "color": colour}
            plot.plot([p.ranks for p in more], [figures.us(op, p) for p in more], "o", **style)
    for op, (label, style) in FLOORS.items():
        floors = [figures.kernels.get((op, p), {}).get("floor_us") for p in points]
        plot.plot(values, floors, style, color="#444444", lw=1, label=label)
    if axis == "tokens":
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_ylim(bottom=4)
    else:
        plot.set_ylim(bottom=0)
    plot.set_xticks(values, [str(value) for value in values], fontsize=8)
    plot.set_xlabel(AXES[axis])


def draw_routing(plot: plt.Axes, figures: Figures) -> None:
    for number_, (op, colour) in enumerate(OPS.items()):
        places = [i + (number_ - 2) * 0.16 for i in range(len(ROUTINGS))]
        plot.bar(places, [figures.us(op, BASE.but(routing=r)) or 0 for r in ROUTINGS], 0.16, color=colour)
    plot.set_xticks(range(len(ROUTINGS)), ["uniform", "zipf(1.2)", "one hot expert"])
    plot.set_xlabel("routing")


def draw(figures: Figures, title: str, out: pathlib.Path) -> None:
    figure, plots = plt.subplots(2, 3, figsize=(14, 7.5))
    for plot, axis in zip(plots.flat, AXES, strict=False):
        draw_axis(plot, figures, axis)
    draw_routing(plots.flat[-1], figures)
    for plot in plots.flat:
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(axis="y", lw=0.3)
    for row in plots:
        row[0].set_ylabel("us")
    figure.suptitle(title, fontsize=11)
    handles, labels = plots.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument(
        "--title",
        default="Exchange kernels, virtual ranks on one H200; around 8 ranks of 16 SMs, 4096 tokens a rank, "
        "hidden 7168, bf16, top-8 of 256",
    )
    arguments = parser.parse_args()
    read = Figures(arguments.files)
    blocks = {f"table {name}": make(read) for name, make in TABLES.items()}
    if arguments.out:
        draw(read, arguments.title, arguments.out)
    if not arguments.page:
        print("\n\n".join(f"{name}\n\n{block}" for name, block in blocks.items()))
    else:
        if arguments.out:
            link = pathlib.PurePath(os.path.relpath(arguments.out, arguments.page.parent)).as_posix()
            blocks["plot"] = f"![Times against tokens, hidden, top-k, ranks, SMs and routing]({link})"
        write_page(arguments.page, blocks)
