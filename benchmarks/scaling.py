"""Predicts exchanges over many nodes: checks the model against published figures, draws routing and finds the slowest
link, and writes the tables and the plot of docs/scaling.md.

    python benchmarks/scaling.py [--ranks 16 64 256 1024] [--draw-ranks 16 64] [--zipf 0.6] [--out docs/img/scaling.png]
        [--page docs/scaling.md]

Without --page the tables are printed. In a page, a table replaces what is between its marks, <!-- table NAME --> and
<!-- end -->. Drawing takes ten seconds for every 64 ranks of 4096 tokens and 256
experts, many minutes for 1024 ranks and experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from scaling_model import (
    H200,
    H800,
    Exchange,
    Links,
    Machine,
    count_links,
    crossover_tokens,
    draw_topk_idx,
    expected_links,
    expected_spread,
    layer_seconds,
    low_latency_bytes,
    low_latency_rows_bytes,
    plan_seconds,
    throughput_rows_bytes,
    time_of,
    two_hop_arena_bytes,
)

# DeepEP V1 on H800 with 400 Gb/s CX7 NICs (github.com/deepseek-ai/DeepEP, docs/legacy.md): pure-RDMA low latency, 128
# tokens a rank, hidden 7168, top-8, dispatch in FP8, combine in BF16. ranks -> microseconds (dispatch, combine).
PUBLISHED_LOW_LATENCY = {
    8: (77, 114),
    16: (118, 195),
    32: (155, 273),
    64: (173, 314),
    128: (192, 369),
    256: (194, 360),
}
# The same, two-hop kernels: 4096 tokens a rank, 4 of 8 groups; ranks -> GB/s (dispatch, combine) of tokens times
# nodes, the own node among them.
PUBLISHED_TWO_HOP = {16: (43, 43), 32: (58, 57), 64: (51, 50)}


def exchange(ranks: int, tokens: int, **changes: int) -> Exchange:
    """The reference sizes; more ranks than 256 get as many experts."""
    return Exchange(ranks, tokens, num_experts=max(256, ranks), **changes)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def markdown(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# ---- against published figures ----


def published_low_latency(ranks: int) -> tuple[float, float]:
    """Seconds of dispatch and combine by the model: a row for every selection, as those kernels send them."""
    e = exchange(ranks, 128)
    near = min(1.0, e.node_size / ranks)
    links = Links(*(e.tokens * e.top_k * part for part in (near, near, 1 - near, 1 - near)), rows=0)
    return tuple(link_seconds(e, H800, links, row, H800.fixed_ll) for row in (e.dispatch_row, e.combine_row))


def link_seconds(e: Exchange, machine: Machine, links: Links, row_bytes: int, fixed: float) -> float:
    wire = row_bytes + 16
    slowest = links.slowest()
    nvlink = max(slowest["nvlink_out"], slowest["nvlink_in"]) * wire / machine.nvlink
    return fixed + max(nvlink, max(slowest["nic_out"], slowest["nic_in"]) * wire / machine.nic)


def check_table() -> str:
    rows: list[list[object]] = []

    def add(kernels: str, ranks: int, op: str, model: float, published: float) -> None:
        rows.append([kernels, ranks, op, us(model), us(published), f"{model / published - 1:+.0%}"])

    for ranks, published in PUBLISHED_LOW_LATENCY.items():
        for op, model, microseconds in zip(
            ("dispatch", "combine"), published_low_latency(ranks), published, strict=True
        ):
            add("low latency", ranks, op, model, microseconds * 1e-6)
    for ranks, speeds in PUBLISHED_TWO_HOP.items():
        e = exchange(ranks, 4096, num_groups=8, top_groups=4)
        links = expected_links(e, two_hop=True)
        tokens = e.tokens * expected_spread(e, e.nodes)
        for op, row, speed in zip(
            ("dispatch", "combine"), (e.dispatch_row, e.combine_row), speeds, strict=True
        ):
            model = link_seconds(e, H800, links, row, H800.fixed_two_hop)
            add("two hops", ranks, op, model, tokens * row / (speed * 1e9))
    return markdown(["kernels", "ranks", "op", "model, us", "published, us", "model is"], rows)


# ---- predictions ----


def time_table(all_ranks: list[int]) -> str:
    rows: list[list[object]] = []
    for tokens in (128, 4096):
        for ranks in all_ranks:
            e = exchange(ranks, tokens)
            for two_hop in (True, False):
                if not two_hop and tokens > 128:
                    continue
                links = expected_links(e, two_hop=two_hop)
                ops = [
                    time_of(e, H200, links, two_hop=two_hop, row_bytes=row)
                    for row in (e.dispatch_row, e.combine_row)
                ]
                rows.append(
                    [tokens, ranks, "two hops" if two_hop else "low latency"]
                    + [us(plan_seconds(e, H200)) if two_hop else "–"]
                    + [f"{us(op.seconds)} ({op.limit})" for op in ops]
                    + [us(layer_seconds(e, H200, two_hop=two_hop, links=links))]
                )
    return markdown(
        ["tokens", "ranks", "shape", "plan", "dispatch FP8 (limit)", "combine BF16 (limit)", "layer, us"],
        rows,
    )


def memory_table(all_ranks: list[int]) -> str:
    def gb(num_bytes: int) -> str:
        return f"{num_bytes / 1e9:.2f}" if num_bytes < 100e9 else f"{num_bytes / 1e9:.0f}"

    rows: list[list[object]] = []
    for ranks in all_ranks:
        e = exchange(ranks, 4096)
        rows.append(
            [ranks, e.num_experts // ranks]
            + [
                gb(value)
                for value in (
                    two_hop_arena_bytes(e),
                    two_hop_arena_bytes(e, node_slots=4),
                    throughput_rows_bytes(e, 1.5),
                    throughput_rows_bytes(e, None),
                    low_latency_bytes(e),
                    low_latency_rows_bytes(e),
                )
            ]
        )
    return markdown(
        ["ranks", "experts a rank", "rings, mapped", "rings, not mapped", "rows, 1.5 × mean", "rows, no drops",
         "low-latency arena", "low-latency rows"],
        rows,
    )  # fmt: skip


def crossover_table(all_ranks: list[int]) -> str:
    rows: list[list[object]] = []
    for ranks in all_ranks:
        tokens = crossover_tokens(exchange(ranks, 1), H200)
        rows.append([ranks, "never" if tokens is None else tokens])
    return markdown(["ranks", "two hops take less time from .. tokens a rank"], rows)


def draw_table(all_ranks: list[int], zipf: float, seed: int) -> str:
    """Counts of a drawing beside the mean, 4096 tokens a rank."""
    rows: list[list[object]] = []
    for ranks in all_ranks:
        for exponent in (0.0, zipf):
            for two_hop in (True, False):
                rng = np.random.default_rng(seed)
                e = exchange(ranks, 4096)
                # What a rank draws is drawn again for the other shape: the same seed, the same choices.
                links = count_links(
                    e, lambda _, e=e, rng=rng, z=exponent: draw_topk_idx(rng, e, z), two_hop=two_hop
                )
                seconds = layer_seconds(e, H200, two_hop=two_hop, links=links)
                means = {f.name: float(np.mean(getattr(links, f.name))) for f in dataclasses.fields(links)}
                ratio = {name: most / max(means[name], 1e-9) for name, most in links.slowest().items()}
                combine = time_of(e, H200, links, two_hop=two_hop, row_bytes=e.combine_row)
                rows.append(
                    [
                        ranks,
                        f"zipf({exponent:g})" if exponent else "uniform",
                        "two hops" if two_hop else "low latency",
                    ]
                    + [
                        f"{ratio[name]:.2f}"
                        for name in ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "rows")
                    ]
                    + [combine.limit, us(seconds)]
                )
    return markdown(
        ["ranks", "routing", "shape", "NVLink out", "NVLink in", "NIC out", "NIC in", "rows", "limit of combine",
         "layer, us"],
        rows,
    )  # fmt: skip


def draw_plot(out: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_ranks = [16, 32, 64, 128, 256, 512, 1024]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for axis, tokens in zip(axes, (128, 4096), strict=False):
        for two_hop, colour in ((True, "#0072b2"), (False, "#e69f00")):
            seconds = [layer_seconds(exchange(ranks, tokens), H200, two_hop=two_hop) for ranks in all_ranks]
            label = "two hops, with plan" if two_hop else "low latency"
            axis.plot(all_ranks, [1e6 * s for s in seconds], "o-", color=colour, label=label, markersize=4)
        limited = [
            layer_seconds(exchange(ranks, tokens, num_groups=8, top_groups=4), H200, two_hop=True)
            for ranks in all_ranks
        ]
        axis.plot(
            all_ranks, [1e6 * s for s in limited], "--", color="#0072b2", label="two hops, 4 of 8 groups"
        )
        axis.set_title(f"{tokens} tokens a rank", fontsize=10)
        axis.set_ylabel("dispatch and combine of a layer, us")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    crossing = [crossover_tokens(exchange(ranks, 1), H200) for ranks in all_ranks]
    axes[2].plot(all_ranks, crossing, "o-", color="#009e73", markersize=4)
    axes[2].set_title("crossover: above, two hops take less time", fontsize=10)
    axes[2].set_ylabel("tokens a rank")
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(all_ranks, [str(r) for r in all_ranks])
        axis.set_xlabel("ranks, 8 a node")
        axis.grid(linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Model, not measured: H200, one 400 Gb/s NIC a rank, hidden 7168, top-8, FP8 dispatch", fontsize=10
    )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--draw-ranks", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--zipf", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="PNG; none draws nothing")
    parser.add_argument("--page", type=pathlib.Path)
    arguments = parser.parse_args()
    tables = {
        "published": check_table(),
        "time": time_table(arguments.ranks),
        "memory": memory_table(arguments.ranks),
        "crossover": crossover_table(arguments.ranks),
    }
    if arguments.draw_ranks:
        tables["drawn"] = draw_table(arguments.draw_ranks, arguments.zipf, arguments.seed)
    if arguments.out is not None:
        draw_plot(arguments.out)
    if arguments.page is None:
        for name, table in tables.items():
            print(f"{name}\n{table}\n")
        return
    page = arguments.page.read_text()
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{arguments.page}: no marks for table {name!r}")
        page = pattern.sub(lambda match, table=table: match[1] + table + "\n" + match[2], page)
    arguments.page.write_text(page)


if __name__ == "__main__":
    main()
