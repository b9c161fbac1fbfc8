"""Times moe_ffn with one and with two microbatches under way: training (forward, forward and backward) and decode.

    python benchmarks/microbatches.py                                                           # 8 CPU devices
    python tests/gpu/launch.py 8 benchmarks/microbatches.py --tokens 4096 --hidden 7168 ..      # 8 GPU ranks

Routing is uniform and given. Candidates take turns; a figure is the median of whole jitted calls of --layers layers
until all ranks' outputs are ready. Prints a table, and one JSON object per line to --json.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_wideep as wep
from jax_wideep.bench import draws, measure
from jax_wideep.bench.measure import Candidate
from jax_wideep.bench.settings import Dtype, Processes
from jax_wideep.group import Backend


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and what to run.

    Attributes:
      tokens: of each rank, in training.
      decode_tokens: of each rank, in decode.
      layers: in a call.
      hidden: hidden size, a multiple of 128.
      ffn: inner size of an expert (SwiGLU).
      experts: over all ranks.
      top_k: experts a token goes to.
      dtype: of everything.
      repeats: timed calls of each candidate.
      backend: of the library.
      devices: ranks; none is 8 on CPU, otherwise all devices.
      json: file for JSON lines; "" is none.
    """

    tokens: int = 512
    decode_tokens: int = 32
    layers: int = 4
    hidden: int = 512
    ffn: int = 256
    experts: int = 64
    top_k: int = 8
    dtype: Dtype = "bfloat16"
    repeats: int = 10
    backend: Backend = "auto"
    devices: int | None = None
    json: str = ""
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


def make_candidates(options: Options, group: wep.ExpertGroup) -> dict[Any, Candidate]:
    def layers(**settings: Any) -> Callable[..., jax.Array]:
        def run(x, idx, weights, wi, wo):
            for _ in range(options.layers):
                x = x + wep.moe_ffn(x, idx, weights, wi, wo, group, return_stats=False, **settings)[0]
            return x

        return run

    def with_gradients(run: Callable[..., jax.Array]) -> Callable[..., Any]:
        def both(x, idx, weights, wi, wo):
            out, backward = jax.vjp(lambda x, w, wi, wo: run(x, idx, w, wi, wo), x, weights, wi, wo)
            return out, backward(out)

        return both

    candidates: dict[Any, Candidate] = {}
    for number in (1, 2):
        # Twice the mean holds uniform routing.
        training = layers(microbatches=number, capacity=2 * options.tokens * options.top_k)
        decode = layers(microbatches=number, mode="low_latency")
        kinds = {"forward": training, "forward + backward": with_gradients(training), "decode": decode}
        for kind, run in kinds.items():
            pick = (lambda train, decode: decode) if kind == "decode" else (lambda train, decode: train)
            candidates[kind, number] = Candidate(measure.on_ranks(group.mesh, run), pick)
    return candidates


def main(options: Options) -> None:
    measure.start_processes(**dataclasses.asdict(options.processes))
    mesh = measure.make_mesh(options.devices, options.backend)
    rng, dtype = np.random.default_rng(0), jnp.dtype(options.dtype)

    def normal(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5
        return measure.put(mesh, values.astype(dtype))

    wi = normal(options.experts, options.hidden, 2 * options.ffn)
    wo = normal(options.experts, options.ffn, options.hidden)

    def make_inputs(repeat: int) -> tuple[Any, ...]:
        del repeat
        made = []
        for tokens in (options.tokens, options.decode_tokens):
            law = draws.Routing("uniform")
            idx = draws.draw_topk_idx(rng, law, mesh.size * tokens, options.experts, options.top_k)
            weights = draws.draw_weights(rng, *idx.shape)
            x = normal(mesh.size * tokens, options.hidden)
            made.append((x, measure.put(mesh, idx), measure.put(mesh, weights), wi, wo))
        return tuple(made)

    with measure.make_group(mesh, options, chunk=options.decode_tokens) as group:
        candidates = make_candidates(options, group)
        measured, failed = measure.time_interleaved(candidates, make_inputs, repeats=options.repeats)
    if jax.process_index() != 0:
        return
    for (kind, number), reason in failed.items():
        print(f"{kind}, {number}: {reason}")
    print("| | one, ms | two, ms | one / two | CPU ms of one and of two |\n|---|---|---|---|---|")
    records, gains = [], []
    for kind in ("forward", "forward + backward", "decode"):
        one, two = (measured[kind, number].record() for number in (1, 2))
        print(
            f"| {kind} | {one['median_ms']:.2f} | {two['median_ms']:.2f} | {one['median_ms'] / two['median_ms']:.2f} | "
            f"{one['cpu_ms']:.1f}, {two['cpu_ms']:.1f} |"
        )
        gains.append(f"{kind} {one['median_ms']:.2f} / {two['median_ms']:.2f} ms")
        for number, times in ((1, one), (2, two)):
            given = dataclasses.asdict(options)
            sizes = {key: value for key, value in given.items() if key not in ("processes", "json")}
            record = {"benchmark": "microbatches", "kind": kind, "microbatches": number, "ranks": mesh.size}
            records.append(record | {"device": mesh.devices.flat[0].device_kind} | sizes | times)
    print(f"{mesh.size} ranks, one / two: {', '.join(gains)}")
    if options.json:
        pathlib.Path(options.json).write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
