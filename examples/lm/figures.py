"""Figures of a run: loss curve, expert load over the steps, and the route of one batch."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm.metrics import History

_DPI = 130


def loss_curve(history: History, path: Path, *, vocab: int = 256) -> None:
    """Training loss of every step, a running mean of it, and the held-out loss."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.arange(1, history.steps + 1)
    axes.plot(steps, history.loss, color="tab:blue", alpha=0.3, linewidth=1, label="training batch")
    window = min(20, history.steps)
    mean = np.convolve(history.loss, np.ones(window) / window, mode="valid")
    axes.plot(
        steps[window - 1 :], mean, color="tab:blue", linewidth=2, label=f"training, mean of {window} steps"
    )
    held_out_steps, held_out = zip(*history.held_out, strict=True)
    axes.plot(held_out_steps, held_out, "o-", color="tab:orange", linewidth=2, label="held-out files")
    for (step, loss), ha, dx in ((history.held_out[0], "left", 6), (history.held_out[-1], "right", 0)):
        axes.annotate(
            f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(dx, 8), ha=ha, color="tab:orange"
        )
    uniform = math.log(vocab)
    axes.axhline(uniform, color="gray", linestyle=":", linewidth=1)
    axes.annotate(
        f"knows nothing: ln {vocab} = {uniform:.2f}",
        (1, uniform),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-4, -12),
        ha="right",
        color="gray",
    )
    axes.set(
        xlabel="step",
        ylabel="next-byte loss (nats per byte)",
        title="Loss of the byte-level MoE language model",
        xlim=(0, history.steps * 1.03),
    )
    axes.set_ylim(bottom=min(1.5, min(history.loss)), top=uniform * 1.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    _write(figure, path)


def expert_load(history: History, path: Path) -> None:
    """Every expert's share of its layer's selections over the steps; 1 is an even share."""
    counts = np.asarray(history.tokens_per_expert, float)  # [steps, layers, experts]
    _, layers, experts = counts.shape
    load = counts / np.mean(counts, axis=2, keepdims=True)
    figure, all_axes = plt.subplots(
        layers, 1, figsize=(9, 1.2 + 1.9 * layers), sharex=True, squeeze=False, layout="constrained"
    )
    for layer, axes in enumerate(all_axes[:, 0]):
        image = axes.imshow(
            np.log2(np.maximum(load[:, layer], 2.0**-4)).T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=-2,
            vmax=2,
            extent=(0.5, history.steps + 0.5, experts - 0.5, -0.5),
        )
        axes.set_ylabel(f"layer {layer}\nexpert")
        _few_ticks(axes, experts)
    all_axes[-1, 0].set_xlabel("step")
    bar = figure.colorbar(image, ax=all_axes[:, 0].tolist(), ticks=[-2, -1, 0, 1, 2], extend="both")
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("selections, as a multiple of an even share")
    figure.suptitle("Load of every expert during training")
    _write(figure, path)


def batch_route(routes: list[np.ndarray], path: Path) -> None:
    """Selections that each source rank sends to each expert in one batch; [ranks, experts] for every layer."""
    num_ranks, experts = routes[0].shape
    local_experts = experts // num_ranks
    columns = min(3, len(routes))
    rows = -(-len(routes) // columns)
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(1.5 + 4.6 * columns, 0.9 + 3.4 * rows), squeeze=False, layout="constrained"
    )
    most = max(int(route.max()) for route in routes)
    with_numbers = num_ranks * experts <= 200
    for layer, axes in enumerate(all_axes.flat):
        if layer >= len(routes):
            axes.set_visible(False)
            continue
        route = routes[layer]
        image = axes.imshow(route, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=most)
        for rank in range(1, num_ranks):  # where one rank's experts end
            axes.axvline(rank * local_experts - 0.5, color="white", linewidth=1)
        if with_numbers:
            for (source, expert), count in np.ndenumerate(route):
                color = "black" if count > 0.6 * most else "white"
                axes.text(expert, source, count, ha="center", va="center", fontsize=6, color=color)
        axes.set(
            title=f"layer {layer}: {route.sum()} selections",
            xlabel=f"expert ({local_experts} per rank, between the lines)",
            ylabel="source rank",
            yticks=range(num_ranks) if num_ranks <= 16 else range(0, num_ranks, 8),
        )
        axes.set_xticks(range(0, experts, max(1, experts // 16)))
    figure.colorbar(image, ax=all_axes.ravel().tolist(), label="selections sent")
    figure.suptitle("Route of one held-out batch: from the rank that holds a byte to the expert it goes to")
    _write(figure, path)


def _few_ticks(axes: Axes, experts: int) -> None:
    axes.set_yticks(range(0, experts, max(1, experts // 4)))


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
