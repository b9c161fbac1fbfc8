"""Decodes with a Mixture-of-Experts language model: prefill in the throughput shape, decode in the latency shape.

    python examples/decode.py --checkpoint demo_out/checkpoint      # what train_lm.py or demo.py saved
    python examples/decode.py --batch 64 --hidden 512 --experts 64  # random weights: times only
    python tests/gpu/launch.py 8 examples/decode.py --batch 64      # 8 processes, on one GPU or more

Prints the text, tokens a second, and the latency of a token.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx
from lm import training
from lm.checkpoint import Checkpoints
from lm.generation import generate
from lm.text import as_text, read_corpus
from lm.training import ModelSizes
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

import jax_wideep as wep
from jax_wideep.bench import measure
from jax_wideep.bench.settings import Processes
from jax_wideep.flax import placing
from jax_wideep.flax.transformer import Transformer
from jax_wideep.load import imbalance

console = Console()


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of decoding.

    Attributes:
      devices: CPU devices to make; where JAX finds GPUs, all of those are used.
      checkpoint: folder of checkpoints; none decodes with random weights.
      model: sizes of the model with random weights; a checkpoint has its own.
      place: place experts where the prompts' load says before decoding; for models with --redundant-experts.
      batch: sequences decoded at once, over all devices.
      prompt: bytes of a prompt, taken from the held-out files.
      new_tokens: bytes to add to each.
      temperature: of sampling; 0 takes the likeliest byte.
      quantize: format of rows on the wire while decoding.
      show: sequences to print.
      seed: of random weights and of sampling.
      data: folder of text to take prompts from; none is the standard library's sources.
      pattern: names of the files to read there.
    """

    devices: int = 8
    checkpoint: Path | None = None
    model: tyro.conf.OmitArgPrefixes[ModelSizes] = dataclasses.field(default_factory=ModelSizes)
    place: bool = False
    batch: int = 8
    prompt: int = 128
    new_tokens: int = 128
    temperature: float = 0.5
    quantize: Literal["fp8", "none"] = "fp8"
    show: int = 2
    seed: int = 0
    data: Path | None = None
    pattern: str = "*.py"
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


def main(options: Options) -> None:
    measure.start_processes(**dataclasses.asdict(options.processes))
    wep.use_cpu_devices(options.devices)
    console.quiet = jax.process_index() != 0
    checkpoints = None if options.checkpoint is None else Checkpoints(options.checkpoint)
    sizes = options.model if checkpoints is None else ModelSizes(**checkpoints.settings()["model"])
    config = sizes.config(quantize=None if options.quantize == "none" else options.quantize)
    model = training.make_model(config, options.seed)
    if checkpoints is not None:
        checkpoints.restore(model)
    console.print(training.describe(model), highlight=False, soft_wrap=True)

    corpus = read_corpus(options.data, options.pattern)
    prompts = corpus.held_out_batches(1, options.batch, options.prompt)[0][:]
    if options.place:
        place_experts(model, prompts)
    result = generate(model, prompts, options.new_tokens, temperature=options.temperature, seed=options.seed)
    for prompt, tokens in zip(prompts[: options.show], result.tokens, strict=False):
        text = Text(as_text(prompt), style="dim")
        console.print(Panel(text.append(as_text(tokens), style="bold not dim"), title="prompt, continued"))
    console.print(result.summary(), highlight=False, soft_wrap=True)


def place_experts(model: Transformer, prompts: np.ndarray) -> None:
    """Replicates the prompts' hot experts, and spreads experts so that all ranks have about the same work."""

    @nnx.jit
    def count(model: Transformer, tokens: jax.Array) -> wep.MoEStats:
        return model(tokens, return_stats=True)[1]

    tokens = training.put_batch(model, prompts.astype(np.int32))
    before = count(model, tokens)
    load = np.asarray(before.tokens_per_expert)
    placing.replace_experts(model, placing.compute_placements(model, load=load))
    after = count(model, tokens)
    console.print(
        f"Most rows of a rank over the mean, worst layer: {imbalance(before.rows_per_rank).max():.2f} before, "
        f"{imbalance(after.rows_per_rank).max():.2f} after placing experts by the prompts' load"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
