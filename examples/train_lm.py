"""Trains a byte-level Mixture-of-Experts language model with wide expert parallelism.

    python examples/train_lm.py --steps 400 --checkpoint /tmp/lm
    python examples/train_lm.py --data ~/books --pattern "*.txt"

Attention is data parallel over all devices, experts are spread over the same devices. Without --data it reads
the running Python's standard library. Ctrl-C saves a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from lm import training
from lm.checkpoint import Checkpoints, History
from lm.progress import TrainingProgress
from lm.text import Corpus, read_corpus
from lm.training import ModelSizes
from rich.console import Console

import jax_wideep as wep
from jax_wideep.flax.transformer import Transformer

console = Console(soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a training run.

    Attributes:
      devices: CPU devices to make; where JAX finds GPUs, all of those are used.
      steps: training steps in all, those before a restart included.
      batch: sequences a step, over all devices.
      seq: bytes of a sequence.
      model: sizes of the model.
      learning_rate: the highest of the schedule.
      seed: of weights and batches.
      eval_every: steps between two measurements of the held-out loss.
      data: folder of text to learn; none is the standard library's sources.
      pattern: names of the files to read there.
      checkpoint: folder of checkpoints; none keeps no checkpoint.
      checkpoint_every: steps between two checkpoints; there is always one at the end and at Ctrl-C.
      fresh: remove earlier checkpoints in that folder and start anew.
    """

    devices: int = 8
    steps: int = 200
    batch: int = 16
    seq: int = 128
    model: tyro.conf.OmitArgPrefixes[ModelSizes] = dataclasses.field(default_factory=ModelSizes)
    learning_rate: float = 3e-3
    seed: int = 0
    eval_every: int = 25
    data: Path | None = None
    pattern: str = "*.py"
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    fresh: bool = False


class Run(NamedTuple):
    """A training run: what it made, and whether Ctrl-C ended it before its last step."""

    model: Transformer
    corpus: Corpus
    history: History
    interrupted: bool


def train(options: Options) -> Run:
    """Trains, or goes on from the newest checkpoint, until the last step or Ctrl-C.

    Call `jax_wideep.use_cpu_devices` before it.
    """
    corpus = read_corpus(options.data, options.pattern)
    model = training.make_model(options.model.config(), options.seed)
    optimizer = training.make_optimizer(model, options.learning_rate, options.steps)
    console.print(f"{corpus.description}\n{training.describe(model)}", highlight=False)

    checkpoints, history = None, History()
    settings = {"model": dataclasses.asdict(options.model), "seed": options.seed}
    if options.checkpoint is not None:
        checkpoints = Checkpoints(options.checkpoint, fresh=options.fresh)
        if checkpoints.step() is not None:
            checkpoints.check_settings(settings)
            history = checkpoints.restore(model, optimizer)
            console.print(f"Going on from step {history.steps}, found in {checkpoints.folder}")
    if history.steps >= options.steps:
        console.print(f"All {options.steps} steps are done already; --fresh trains anew")
        return Run(model, corpus, history, interrupted=False)

    batches = corpus.held_out_batches(4, options.batch, options.seq + 1)
    if not history.held_out:
        history.held_out.append((0, training.held_out_loss(model, batches)))
    weights = training.LossWeights()
    with stop_on_interrupt() as stop, TrainingProgress(console, options.steps, history) as progress:
        while history.steps < options.steps and not stop:
            started = time.perf_counter()
            tokens = corpus.train_batch(history.steps, options.seed, options.batch, options.seq + 1)
            report = training.train_step(model, optimizer, training.put_batch(model, tokens), weights)
            report = jax.device_get(report)
            history.loss.append(float(report.loss))
            history.dropped.append(int(report.dropped))
            history.tokens_per_expert.append(report.tokens_per_expert.tolist())
            seconds = time.perf_counter() - started
            if history.steps % options.eval_every == 0 or history.steps == options.steps:
                history.held_out.append((history.steps, training.held_out_loss(model, batches)))
            progress.step(options.batch * options.seq / seconds)
            if checkpoints and history.steps % options.checkpoint_every == 0 and not stop:
                checkpoints.save(model, optimizer, history, settings)
        if checkpoints:
            checkpoints.save(model, optimizer, history, settings)

    if history.steps < options.steps:
        console.print(f"[yellow]Stopped by Ctrl-C after step {history.steps} of {options.steps}.[/yellow]")
        if checkpoints:
            console.print(f"Checkpoint in {checkpoints.folder}; the same command goes on from there.")
        else:
            console.print("Nothing was saved: pass --checkpoint FOLDER to be able to go on.")
        return Run(model, corpus, history, interrupted=True)
    (_, first), (_, last) = history.held_out[0], history.held_out[-1]
    console.print(
        f"Held-out loss {first:.2f} -> [bold]{last:.2f}[/bold] nats a byte, of files never trained on"
    )
    return Run(model, corpus, history, interrupted=False)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[list[int]]:
    """Ctrl-C fills the list, so that a step and a save are never cut in two; a second Ctrl-C ends at once."""
    stop: list[int] = []

    def on_interrupt(number: int, _: object) -> None:
        stop.append(number)
        # Not through the console, which may be in the middle of printing.
        os.write(2, b"\nStopping after this step; Ctrl-C again to end without saving.\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    wep.use_cpu_devices(chosen.devices)
    sys.exit(130 if train(chosen).interrupted else 0)
