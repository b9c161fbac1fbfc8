"""How the benchmarks report: a table, one JSON object per line, a plot."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def write_json_lines(records: Sequence[Record], path: str) -> None:
    """One object per line, to a file, or to stdout for "-"; nowhere for ""."""
    if not path:
        return
    text = "".join(
        json.dumps({name: _rounded(value) for name, value in record.items()}) + "\n" for record in records
    )
    if path == "-":
        sys.stdout.write(text)
    else:
        pathlib.Path(path).write_text(text)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()
) -> None:
    """The first column is text, the others are numbers or text; None is shown as a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*(format_value(value) for value in row))
    # A fixed width outside of a terminal: a log must not lose columns.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)


def format_value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def sizes(record: Record) -> str:
    """Where and on what a record was measured, for a title."""
    return (
        f"{record['ranks']} x {record['device_kind']}, {record['tokens']} tokens a rank, hidden {record['hidden']}, "
        f"top-{record['top_k']} of {record['experts']}, {record['dtype']}, {record['routing']}, capacity "
        f"{record['capacity']} rows, backend {record['backend']}"
    )


def reasons(missing: dict[str, str], failed: dict[tuple[str, str], str]) -> list[str]:
    """One line for each candidate without a time."""
    lines = [f"{name}: {reason}" for name, reason in missing.items()]
    return lines + [f"{name}, {op}: {reason}" for (name, op), reason in failed.items()]


def _axes(title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_bars(path: pathlib.Path, title: str, label: str, values: dict[str, float]) -> None:
    """A bar per name, on a logarithmic scale."""
    figure, axes = _axes(title)
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, [format_value(float(value)) for value in values.values()], padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel(label)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def plot_lines(
    path: pathlib.Path, title: str, x_label: str, y_label: str, lines: dict[str, dict[float, float]]
) -> None:
    """A line per name through its (x, y) points, on logarithmic scales."""
    figure, axes = _axes(title)
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
