"""The whole library on one machine: train, decode, measure, draw. `make demo` runs it with what it needs.

    python examples/demo.py                          # 8 CPU devices, the standard library's sources
    python examples/demo.py --devices 4 --steps 150  # any option of train_lm.py, and some more

Trains a byte-level Mixture-of-Experts model (train_lm.py), decodes text in the low-latency shape, shows where
a training step's time goes and what the exchange costs beside XLA's collectives, and writes figures and a report.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tyro
from lm import figures, measure, training
from lm.generation import generate
from lm.metrics import FILE, read_history
from lm.text import as_text
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from train_lm import Options as TrainOptions
from train_lm import Run, console, start_processes, train

from jax_wideep.bench.measure import copy_bytes_per_s
from jax_wideep.report import write_report


@dataclasses.dataclass(frozen=True)
class Options(TrainOptions):
    """Settings of the demo; those of training first.

    Attributes:
      run: folder for figures, and for what train_lm.py keeps of a run.
      new_tokens: bytes to decode.
      temperature: of sampling.
    """

    steps: int = 300
    run: Path = Path("demo_out")
    new_tokens: int = 160
    temperature: float = 0.4


def main(options: Options) -> int:
    start_processes(options)
    if jax.process_count() > 1:
        raise SystemExit("demo.py: expected one process, got several; use train_lm.py and decode.py")
    console.rule("Training: attention data parallel, experts spread over the same devices")
    run = train(options)
    if run.stopped_by:
        return 128 + run.stopped_by
    console.rule("Decoding: low-latency shape, FP8 on the wire, one jit-compiled step a token")
    decode(run, options)
    console.rule("Where the time goes")
    routes, exchange = show_times(run, options)
    console.rule("Figures")
    history = read_history(options.run)
    for name, draw in {
        "loss.png": lambda path: figures.loss_curve(history, path),
        "expert_load.png": lambda path: figures.expert_load(history, path),
        "route.png": lambda path: figures.batch_route(routes, path),
    }.items():
        draw(options.run / name)
        console.print(options.run / name)
    with (options.run / FILE).open("a") as lines:
        lines.write(json.dumps({"exchange": exchange}) + "\n")
    console.print(write_report(options.run), "(open it in a browser)")
    return 0


def decode(run: Run, options: Options) -> None:
    """Continues one held-out prompt per device and shows the first."""
    batch = run.model.group.num_ranks
    prompts = run.corpus.held_out_batches(1, batch, options.seq)[0][:]
    result = generate(
        run.model, prompts, options.new_tokens, temperature=options.temperature, seed=options.seed
    )
    text = Text(as_text(prompts[0]), style="dim")
    console.print(
        Panel(text.append(as_text(result.tokens[0]), style="bold not dim"), title="prompt, continued"),
        soft_wrap=False,
    )
    console.print(result.summary(), highlight=False)


def show_times(run: Run, options: Options) -> tuple[list[np.ndarray], list[dict[str, str | float]]]:
    """Prints the tables; returns the routes of the batch they were measured on, and the exchange's times and floor as
    the report takes them."""
    model = run.model
    tokens = run.corpus.held_out_batches(1, options.batch, options.seq + 1)[0][:]
    layers = measure.layer_inputs(model, tokens[:, :-1])
    routes = [measure.routes(model, layer) for layer in layers]
    alternatives = measure.exchange_alternatives(model, layers[0])
    # Last: measuring training steps changes the model.
    optimizer = training.make_optimizer(model, 1e-5)
    parts = measure.step_parts(model, optimizer, tokens, training.LossWeights())

    table = Table(title=f"One training step, {options.batch * options.seq} tokens, {len(layers)} layers")
    for column in ("part", "ms", "of the step"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in parts.items():
        label = "rest (embedding, output layer, loss, gradient sums, optimiser)" if name == "rest" else name
        table.add_row(label, f"{seconds * 1e3:.1f}", f"{seconds / parts['step']:.0%}")
    console.print(table)
    console.print("Parts are run alone, forward and backward, on the layers' own inputs.", style="dim")

    group = model.group
    table = Table(
        title=f"Exchange of one layer, no drops: {layers[0].tokens.shape[0] // group.num_ranks} tokens a rank, "
        f"hidden {group.hidden}, top-{group.top_k} of {group.num_experts}, {group.num_ranks} "
        f"{jax.default_backend()} devices"
    )
    for column in ("method", "forward, ms", "slower", "forward and backward, ms", "slower"):
        table.add_column(column, justify="left" if column == "method" else "right")
    ours = alternatives["jax_wideep"]
    for name, (forward, both) in alternatives.items():
        ratios = [
            "" if name == "jax_wideep" else f"{a / b:.1f}x" for a, b in ((forward, ours[0]), (both, ours[1]))
        ]
        table.add_row(name, f"{forward * 1e3:.2f}", ratios[0], f"{both * 1e3:.2f}", ratios[1])
    console.print(table)
    # Dispatch reads each token and writes each row, combine the other way round.
    moved = 2 * layers[0].tokens.nbytes * (1 + group.top_k)
    floor_ms = 1e3 * moved / copy_bytes_per_s(group.mesh.local_devices[0])
    exchange: list[dict[str, str | float]] = [
        {"name": f"{name}: plan, dispatch, combine", "ms": 1e3 * forward, "floor_ms": floor_ms}
        for name, (forward, _) in alternatives.items()
    ]
    return routes, exchange


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
