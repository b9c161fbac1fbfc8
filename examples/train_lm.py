"""Trains a byte-level Mixture-of-Experts language model with wide expert parallelism.

    python examples/train_lm.py --steps 400 --run /tmp/lm
    python examples/train_lm.py --data ~/books --pattern "*.txt"
    python -m jax_wideep.launch --processes 4 --devices-per-process 2 examples/train_lm.py --run /tmp/lm

Attention is data parallel over all devices of all processes, experts are spread over the same devices. Without --data
it reads the running Python's standard library. Ctrl-C or SIGTERM saves a checkpoint; the same command goes on from
there, on the same number of processes or another. docs/training.md: clusters, and what happens when a process fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from flax import nnx
from lm import metrics, throughput, training
from lm.checkpoint import Checkpoints
from lm.progress import TrainingProgress
from lm.stopping import StopRequest
from lm.text import Corpus, read_corpus
from lm.training import ModelSizes
from rich.console import Console

import jax_wideep as wep
from jax_wideep import launch
from jax_wideep.flax import placing
from jax_wideep.flax.transformer import Transformer
from jax_wideep.group import Backend
from jax_wideep.load import layer_records

console = Console(soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a training run.

    Attributes:
      devices: CPU devices that each process makes, by default 8 or as launched; where JAX finds GPUs, those are used.
      backend: of the exchange.
      deadline_s: seconds after which an exchange reports ranks that have not come. Processes do not end compiling at
        the same moment, so leave time for that.
      steps: training steps in all, those before a restart included.
      batch: sequences a step, over all devices.
      microbatches: parts of a step's batch that are computed one after the other, to save memory.
      seq: bytes of a sequence.
      model: sizes of the model.
      replace_every: steps between two placements of the experts where their load says; needs --redundant-experts.
      learning_rate: the highest of the schedule.
      warmup: steps until then; by default a tenth of all, at most 20.
      final_learning_rate: at the end of the cosine, as a fraction of the highest.
      seed: of weights and batches.
      eval_every: steps between two measurements of the held-out loss.
      data: folder of text to learn; none is the standard library's sources.
      pattern: names of the files to read there.
      run: folder of the run, which all processes see: checkpoints, metrics.jsonl, events for TensorBoard. Without it
        nothing is kept.
      checkpoint_every: steps between two checkpoints; there is always one at the end and at Ctrl-C.
      fresh: remove earlier checkpoints in that folder and start anew.
      peak_flops: operations a second of one device at most, for the model-flops utilisation (MFU); by default NVIDIA's
        figure for dense bf16, where the device is known.
    """

    devices: int | None = None
    backend: Backend = "auto"
    deadline_s: float = 120.0
    steps: int = 200
    batch: int = 16
    microbatches: int = 1
    seq: int = 128
    model: tyro.conf.OmitArgPrefixes[ModelSizes] = dataclasses.field(default_factory=ModelSizes)
    replace_every: int = 0
    learning_rate: float = 3e-3
    warmup: int | None = None
    final_learning_rate: float = 0.0
    seed: int = 0
    eval_every: int = 25
    data: Path | None = None
    pattern: str = "*.py"
    run: Path | None = None
    checkpoint_every: int = 100
    fresh: bool = False
    peak_flops: float | None = None


class Run(NamedTuple):
    """A training run: what it made, and the number of the signal that ended it before its last step, or 0."""

    model: Transformer
    corpus: Corpus
    stopped_by: int


def start_processes(options: Options) -> None:
    """Joins the other processes, if there are some, and makes the CPU devices; before anything else of JAX."""
    launch.initialize()
    wep.use_cpu_devices(options.devices or int(os.environ.get("JAX_NUM_CPU_DEVICES", 8)))
    console.quiet = jax.process_index() != 0


def train(options: Options) -> Run:
    """Trains, or goes on from the newest checkpoint, until the last step or a signal; after `start_processes`."""
    corpus = read_corpus(options.data, options.pattern)
    model = training.make_model(
        options.model.config(), options.seed, backend=options.backend, deadline_s=options.deadline_s
    )
    _check(options, model.group.num_ranks)
    schedule = training.make_schedule(
        options.learning_rate, options.steps, options.warmup, options.final_learning_rate
    )
    optimizer = training.make_optimizer(model, schedule)
    console.print(f"{corpus.description}\n{training.describe(model)}", highlight=False)
    record_of = StepRecords(options, model, schedule)

    with contextlib.ExitStack() as stack:
        # Around the checkpoints, whose end waits for the last save: that is not cut in two either.
        stop = stack.enter_context(StopRequest(model.group.mesh))
        step, checkpoints = 0, None
        settings = {"model": dataclasses.asdict(options.model), "seed": options.seed}
        if options.run is not None:
            checkpoints = stack.enter_context(Checkpoints(options.run / "checkpoint", fresh=options.fresh))
            step = _go_on(checkpoints, settings, model, optimizer)
        if step >= options.steps:
            console.print(f"All {options.steps} steps are done already; --fresh trains anew")
            return Run(model, corpus, stopped_by=0)

        log = stack.enter_context(metrics.MetricsLog(options.run, describe(options, model), step))
        batches = corpus.held_out_batches(4, options.batch, options.seq + 1)
        held_out = training.held_out_loss(model, batches)
        if step == 0:
            log.write({"step": 0, "held_out_loss": held_out})
        first = log.first_held_out or held_out

        def tokens_of(step: int) -> jax.Array:
            return training.put_batch(
                model, corpus.train_batch(step, options.seed, options.batch, options.seq + 1)
            )

        weights = training.LossWeights()
        progress = stack.enter_context(TrainingProgress(console, options.steps, step))
        stopped_by, tokens = 0, tokens_of(step)
        while step < options.steps and not stopped_by:
            started = time.perf_counter()
            report = training.train_step(model, optimizer, tokens, weights, options.microbatches)
            tokens = tokens_of(step + 1)  # read while the devices compute
            report = jax.device_get(report)
            step += 1
            record = record_of(step, report, time.perf_counter() - started)
            if step % options.eval_every == 0 or step == options.steps:
                held_out = record["held_out_loss"] = training.held_out_loss(model, batches)
            log.write(record)
            progress.step(record, held_out)
            # Here, between two steps, no exchange is under way: whatever changes the layers for the steps to come
            # belongs here, before the state is saved.
            if options.replace_every and step % options.replace_every == 0:
                placing.replace_experts(model, placing.compute_placements(model), optimizer)
                log.write({"step": step, "replaced": True})
            stopped_by = stop.agreed()
            last = step == options.steps or stopped_by
            if checkpoints and (last or step % options.checkpoint_every == 0):
                checkpoints.save(model, optimizer, step, settings)

    if step < options.steps:
        console.print(f"[yellow]Stopped by a signal after step {step} of {options.steps}.[/yellow]")
        if checkpoints:
            console.print(f"Checkpoint in {checkpoints.folder}; the same command goes on from there.")
        else:
            console.print("Nothing was saved: pass --run FOLDER to be able to go on.")
        return Run(model, corpus, stopped_by)
    console.print(
        f"Held-out loss {first:.2f} -> [bold]{held_out:.2f}[/bold] nats a byte, of files never trained on"
    )
    return Run(model, corpus, stopped_by=0)


def _go_on(
    checkpoints: Checkpoints, settings: dict[str, Any], model: Transformer, optimizer: nnx.Optimizer
) -> int:
    """Fills the model and the optimiser from the newest checkpoint; returns its steps, 0 if there is none."""
    step = checkpoints.step()
    if step is None:
        return 0
    checkpoints.check_settings(settings)
    checkpoints.restore(model, optimizer)
    console.print(f"Going on from step {step}, found in {checkpoints.folder}")
    return step


class StepRecords:
    """Makes a step's record, as metrics.py describes it."""

    def __init__(self, options: Options, model: Transformer, schedule: Any):
        self._schedule = schedule
        self._tokens = options.batch * options.seq
        self._flops = self._tokens * throughput.flops_per_token(model.config, options.seq)
        device = model.group.mesh.devices.flat[0]
        peak = options.peak_flops or throughput.peak_flops(device)
        self._peak = None if peak is None else peak * model.group.mesh.size

    def __call__(self, step: int, report: training.StepReport, seconds: float) -> dict[str, Any]:
        return {
            "step": step,
            "loss": float(report.loss),
            "learning_rate": float(self._schedule(step - 1)),
            "tokens_per_s": self._tokens / seconds,
            "step_s": seconds,
            "mfu": None if self._peak is None else self._flops / seconds / self._peak,
            "layers": layer_records(report.stats),
        }


def describe(options: Options, model: Transformer) -> dict[str, Any]:
    """The run's settings, for reports."""
    group, config = model.group, model.config
    device = group.mesh.devices.flat[0]
    return {
        "num_experts": config.num_experts,
        "redundant_experts": config.redundant_experts,
        "top_k": config.top_k,
        "hidden": config.hidden,
        "ffn": config.ffn,
        "layers": config.num_layers,
        "capacity_factor": config.capacity_factor,
        "dtype": options.model.dtype,
        "parameters": training.num_parameters(model),
        "flops_per_token": throughput.flops_per_token(config, options.seq),
        "batch": options.batch,
        "seq": options.seq,
        "microbatches": options.microbatches,
        "steps": options.steps,
        "seed": options.seed,
        "ranks": group.num_ranks,
        "processes": jax.process_count(),
        "backend": group.backend,
        "device": device.device_kind,
        "jax": jax.__version__,
        "jax_wideep": wep.__version__,
    }


def _check(options: Options, num_ranks: int) -> None:
    if options.replace_every and options.model.redundant_experts is None:
        raise ValueError(
            "replace_every: expected 0 without a placement of experts; pass --redundant-experts, 0 or more"
        )
    if options.batch % (options.microbatches * num_ranks) and options.microbatches > 1:
        raise ValueError(
            f"batch: expected a multiple of microbatches * devices = {options.microbatches} * {num_ranks}, got "
            f"{options.batch}; change one of them"
        )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    start_processes(chosen)
    stopped_by = train(chosen).stopped_by
    sys.exit(128 + stopped_by if stopped_by else 0)
