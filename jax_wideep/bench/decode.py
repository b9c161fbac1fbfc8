"""Benchmark `decode`: a Mixture-of-Experts transformer generates text, one jitted step over all layers a token.

Attention is data parallel with a key-value cache, experts are spread over all ranks. Prompts are read in the
throughput shape, tokens are decoded in the low-latency shape, greedily: each step's input is the last one's
output. A step is timed from its call until the tokens of every rank are ready. Parameters are random and so
is the routing that follows from them.

The split by part times, alone, what one layer does, repeated for all layers in one jitted loop: attention,
routing, dispatch, experts, combine. `other` is the rest of a step: embedding, norms, logits, choice, launch.

Ranks may be CPU devices, GPUs of this process, or one GPU for each of several processes. In a decoding step the
ranks meet in the library's exchange only: nothing else in it is a collective.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_wideep as wep
from jax_wideep.bench import measure, report
from jax_wideep.bench.layer import swiglu_experts
from jax_wideep.bench.measure import Candidate, on_ranks, stack, unstack
from jax_wideep.bench.settings import Dtype, Output, Processes
from jax_wideep.flax.transformer import Cache, Transformer, TransformerConfig, make_transformer
from jax_wideep.group import Backend
from jax_wideep.routing import route, router_logits

PARTS = ("attention", "routing", "dispatch", "experts", "combine")


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """Sizes of the model and of the run."""

    batch: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences per rank; one line of the table each."""
    prompt: int = 64
    """Tokens of each prompt."""
    steps: int = 64
    """Timed decoding steps."""
    layers: int = 4
    """Blocks of attention and experts."""
    hidden: int = 512
    """Hidden size."""
    heads: int = 8
    """Attention heads."""
    ffn: int = 256
    """Inner size of an expert (SwiGLU)."""
    experts: int = 64
    """Experts over all ranks."""
    top_k: int = 8
    """Experts per token."""
    capacity_factor: float | None = None
    """Rows that a rank can receive in prefill, as a multiple of the average; None drops nothing."""
    vocab: int = 1024
    """Token ids."""
    dtype: Dtype = "bfloat16"
    """Of parameters and computation."""
    quantize: Literal["fp8", "none"] = "fp8"
    """Wire format of dispatch."""
    backend: Backend = "auto"
    """Of the library."""
    devices: int | None = None
    """Ranks; default: 8 on CPU, otherwise all devices."""
    repeats: int = 5
    """Timed calls of prefill and of each part."""
    seed: int = 0
    """Of parameters and prompts."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    output: Output = dataclasses.field(default_factory=Output)

    def model_config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab=self.vocab,
            hidden=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            ffn=self.ffn,
            num_experts=self.experts,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            quantize="fp8" if self.quantize == "fp8" else None,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.dtype),
        )

    def record(self) -> dict[str, Any]:
        """The sizes, for a JSON line."""
        left_out = ("batch", "processes", "output", "backend", "devices")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }


def run(settings: DecodeSettings) -> list[report.Record]:
    """Measures, prints, and returns the records."""
    measure.start_processes(**dataclasses.asdict(settings.processes))
    mesh = measure.make_mesh(settings.devices, settings.backend)
    config = settings.model_config()
    records = []
    with config.make_group(mesh, backend=settings.backend, chunk=max(settings.batch)) as group:
        model = make_transformer(config, group, settings.seed)
        for batch in settings.batch:
            measured = _generate(settings, model, batch * mesh.size)
            parts = _split_by_part(settings, model, batch * mesh.size)
            other = max(0.0, measured["step_p50_ms"] - sum(parts.values()))
            records.append(
                {"benchmark": "decode", "backend": group.backend, "batch": batch}
                | settings.record()
                | measured
                | {f"{name}_ms": value for name, value in (parts | {"other": other}).items()}
                | measure.environment(mesh)
            )
    _show(settings, records)
    return records


# ---- the whole ----


def _generate(settings: DecodeSettings, model: Transformer, sequences: int) -> dict[str, float]:
    graph, state = nnx.split(model)
    mesh = model.group.mesh

    def choose(call: str) -> Callable[..., Any]:
        @functools.partial(jax.jit, donate_argnums=2)
        def step(state: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            logits, cache = getattr(nnx.merge(graph, state), call)(tokens, cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return functools.partial(step, state)

    prefill, decode = choose("prefill"), choose("decode_step")
    rng = np.random.default_rng(settings.seed)
    prefill_s, step_s = [], []
    for repeat in range(settings.repeats + 1):
        prompt = measure.put(mesh, rng.integers(0, settings.vocab, (sequences, settings.prompt), np.int32))
        cache = model.init_cache(sequences, settings.prompt + settings.steps + 1)
        jax.block_until_ready((prompt, cache))
        start = time.perf_counter()
        tokens, cache = jax.block_until_ready(prefill(prompt, cache))
        if repeat > 0:  # the first one compiles
            prefill_s.append(time.perf_counter() - start)
    for step in range(settings.steps + 1):
        start = time.perf_counter()
        tokens, cache = jax.block_until_ready(decode(tokens, cache))
        if step > 0:
            step_s.append(time.perf_counter() - start)
    return latencies(step_s, sequences) | {
        "prefill_ms": 1e3 * measure.median(prefill_s),
        "prefill_tokens_per_s": sequences * settings.prompt / measure.median(prefill_s),
    }


def latencies(step_s: list[float], sequences: int) -> dict[str, float]:
    """Tokens per second over all steps, and percentiles of a step's time."""
    percentiles = {f"step_p{p}_ms": 1e3 * measure.percentile(step_s, p) for p in (50, 90, 99)}
    return {"tokens_per_s": sequences * len(step_s) / sum(step_s)} | percentiles


# ---- the parts ----


def _split_by_part(settings: DecodeSettings, model: Transformer, sequences: int) -> dict[str, float]:
    """Milliseconds of each part in all layers of a step."""
    candidates, make_inputs = _parts(settings, model, sequences)
    measured, failed = measure.time_interleaved(candidates, make_inputs, repeats=settings.repeats)
    if failed:
        raise RuntimeError(f"bench decode: {failed}")
    return {name: 1e3 * measure.median(times.wall) for name, times in measured.items()}


def _parts(
    settings: DecodeSettings, model: Transformer, sequences: int
) -> tuple[dict[str, Candidate], Callable[[int], tuple[Any, ...]]]:
    block, group, config = model.blocks[0], model.group, model.config
    mesh = group.mesh
    moe = block.moe
    gate, wi, wo = (
        param[...].astype(dtype)
        for param, dtype in (
            (moe.gate.kernel, jnp.float32), (moe.wi, config.dtype), (moe.wo, config.dtype),
        )
    )  # fmt: skip
    router = moe.config.router
    ranks = mesh.size
    repeated = functools.partial(_repeat, settings.layers)

    graph, state = nnx.split((block.attention_norm, block.attention))

    @jax.jit
    def attention(state, x, keys, values):
        norm, attend = nnx.merge(graph, state)

        def one(carry):
            x, cached = carry
            attended, cached = attend(norm(x), cached, settings.prompt)
            return x + attended, cached

        return repeated(one, (x, (keys, values)))

    def routing(x, gate):
        def one(x):
            logits = router_logits(x, gate[0], router)
            return _after(x, route(logits, router)[:2])

        return repeated(one, x)

    def route_once(x, gate):
        return stack(tuple(route(router_logits(x, gate[0], router), router)[:2]))

    def ll_dispatch(x, idx):
        return wep.ll_dispatch(x, idx, group, quantize=config.quantize, zero_tail=False)

    def dispatch(x, idx):
        return repeated(lambda x: _after(x, ll_dispatch(x, idx).rows), x)

    def experts(stacked, wi, wo):
        recv = unstack(stacked)

        return repeated(lambda rows: swiglu_experts(wi, wo, rows, recv.counts), recv.rows)

    def combine(stacked, weights):
        recv = unstack(stacked)

        def one(y):
            return _after(y, wep.ll_combine(y, weights, recv, zero_tail=False))

        return repeated(one, recv.rows)

    routed = on_ranks(mesh, lambda x, gate: unstack(route_once(x, gate)))
    received = on_ranks(mesh, lambda x, idx: stack(ll_dispatch(x, idx)))
    copies = jnp.broadcast_to(gate, (ranks, *gate.shape))  # one for each rank

    def make_inputs(repeat: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([settings.seed, repeat])
        x = measure.put(
            mesh, rng.standard_normal((sequences, config.hidden), np.float32).astype(config.dtype)
        )
        idx, weights = routed(x, copies)
        return (
            x,
            idx,
            weights,
            received(x, idx),
            model.init_cache(sequences, settings.prompt + settings.steps + 1),
        )

    return {
        "attention": Candidate(
            attention, lambda x, idx, w, recv, cache: (state, x[:, None], cache.keys[0], cache.values[0])
        ),
        "routing": Candidate(on_ranks(mesh, routing), lambda x, *_: (x, copies)),
        "dispatch": Candidate(on_ranks(mesh, dispatch), lambda x, idx, *_: (x, idx)),
        "experts": Candidate(on_ranks(mesh, experts), lambda x, idx, w, recv, cache: (recv, wi, wo)),
        "combine": Candidate(on_ranks(mesh, combine), lambda x, idx, w, recv, cache: (recv, w)),
    }, make_inputs


def _repeat(times: int, one: Callable[[Any], Any], carry: Any) -> Any:
    """one(one(... carry)), `times` times, one after the other."""
    return jax.lax.fori_loop(0, times, lambda _, carry: one(carry), carry)


def _after(x: jax.Array, results: Any) -> jax.Array:
    """x, but only once all of `results` are there."""
    first, *_ = jax.tree.leaves(jax.lax.optimization_barrier(results))
    # XLA may not drop a product with zero: it would be NaN if the other factor were.
    zero = 0 * first.reshape(-1)[0].astype(x.dtype)
    return x + zero


def _show(settings: DecodeSettings, records: list[report.Record]) -> None:
    first = records[0]
    if first["process"] != 0:
        return
    columns = {
        "batch a rank": "batch", "prefill ms": "prefill_ms", "prefill tokens/s": "prefill_tokens_per_s",
        "tokens/s": "tokens_per_s", "p50 ms": "step_p50_ms", "p90 ms": "step_p90_ms", "p99 ms": "step_p99_ms",
    } | {part: f"{part}_ms" for part in (*PARTS, "other")}  # fmt: skip
    title = (
        f"{first['ranks']} x {first['device_kind']}, {settings.layers} layers, hidden {settings.hidden}, top-"
        f"{settings.top_k} of {settings.experts}, ffn {settings.ffn}, {settings.dtype}, wire {settings.quantize}, "
        f"prompt {settings.prompt}, backend {first['backend']}"
    )
    report.print_table(
        f"decode: {title}",
        list(columns),
        [[record[field] for field in columns.values()] for record in records],
        [
            f"Latency of a step over {settings.steps} steps; parts: milliseconds in all layers, each timed alone; "
            "tokens/s over all ranks.",
        ],
    )
    report.write_json_lines(records, settings.output.json)
    if settings.output.plot:
        fields = ("step_p50_ms", "step_p99_ms", *(f"{part}_ms" for part in PARTS))
        lines = {field: {record["batch"]: record[field] for record in records} for field in fields}
        report.plot_lines(settings.output.plot, title, "sequences a rank", "ms a step", lines)
