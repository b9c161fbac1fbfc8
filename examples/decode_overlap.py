"""A decode step in two microbatches: while the rows of one travel, the other one computes.

    python examples/decode_overlap.py                                       # 8 CPU devices
    python tests/gpu/launch.py 8 examples/decode_overlap.py --tokens 64     # 8 processes, on one GPU or more

A layer is a dense part, a router, and experts. The plain step sends all tokens of a rank, waits, applies the experts,
sends the outputs home, and waits. The other step has two halves of the tokens in flight, in this order:

    half 0  dense, route, send                      receive, experts, send home                             receive
    half 1                      dense, route, send                             receive, experts, send home  receive

Between a half's `send` and its `receive` there is always work of the other half. Prints the times of both, and of the
plain step on one half after the other, whose outputs must be those of the overlapped step (in bfloat16 only under
XLA_FLAGS=--xla_allow_excess_precision=false, as XLA otherwise rounds where it likes, and a token near a tie then goes
to other experts). A gain needs a wire that is slow beside the computation: on CPU devices rows move in the second half
of an op, so there is none, and ranks that share a GPU share its memory too.
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
import tyro
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep.bench import measure
from jax_wideep.bench.layer import swiglu_experts
from jax_wideep.bench.settings import Dtype, Processes
from jax_wideep.group import Backend
from jax_wideep.routing import RouterConfig, route, router_logits

EVERYWHERE, BY_TOKEN, BY_EXPERT = (
    PartitionSpec(),
    PartitionSpec(measure.AXIS),
    PartitionSpec(None, measure.AXIS),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and how to run.

    Attributes:
      tokens: of each rank, even.
      layers: in a step, which is one jitted call.
      hidden: hidden size, a multiple of 128.
      ffn: inner size of an expert.
      experts: over all ranks.
      top_k: experts a token goes to.
      dtype: of everything but the router.
      quantize: format of rows on the wire.
      backend: of the library.
      devices: ranks; none is 8 on CPU, otherwise all devices.
      steps: timed steps of each kind.
      seed: of weights and tokens.
    """

    tokens: int = 16
    layers: int = 4
    hidden: int = 256
    ffn: int = 128
    experts: int = 32
    top_k: int = 4
    dtype: Dtype = "float32"
    quantize: Literal["fp8", "none"] = "fp8"
    backend: Backend = "auto"
    devices: int | None = None
    steps: int = 20
    seed: int = 0
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)

    def __post_init__(self) -> None:
        if self.tokens % 2:
            raise ValueError(f"decode_overlap: tokens: expected an even number, got {self.tokens}")


class Model:
    """Layers on one rank's shards; `params` are those of all layers, with a leading axis of layers."""

    def __init__(self, options: Options, group: wep.ExpertGroup):
        self.options, self.group = options, group
        self.router = RouterConfig(num_experts=options.experts, top_k=options.top_k)
        wire = None if options.quantize == "none" else options.quantize
        self.wire: dict[str, Any] = {"quantize": wire, "zero_tail": False}

    def plain(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for layer in range(self.options.layers):
            weights = {name: param[layer] for name, param in params.items()}
            x, normed, topk_idx, gates = self._before(weights, x)
            recv = wep.ll_dispatch(normed, topk_idx, self.group, **self.wire)
            x = x + wep.ll_combine(self._experts(weights, recv), gates, recv, zero_tail=False)
        return x

    def in_halves(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.plain(params, half) for half in jnp.split(x, 2)])

    def overlapped(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        halves = list(jnp.split(x, 2))
        for layer in range(self.options.layers):
            weights = {name: param[layer] for name, param in params.items()}
            sent, gates, home = [], [], []
            for i in (0, 1):
                halves[i], normed, topk_idx, gate = self._before(weights, halves[i])
                sent.append(wep.ll_dispatch_send(normed, topk_idx, self.group, **self.wire))
                gates.append(gate)
                # The other half's dense part comes after this send.
                sent[i], halves = jax.lax.optimization_barrier((sent[i], halves))
            sent = jax.lax.optimization_barrier(sent)  # nobody receives before both have sent
            for i in (0, 1):
                recv = wep.ll_dispatch_recv(sent[i])
                y = self._experts(weights, recv)
                home.append(wep.ll_combine_send(y, gates[i], recv, zero_tail=False))
                home[i], sent = jax.lax.optimization_barrier((home[i], sent))
            halves = [half + wep.ll_combine_recv(rows) for half, rows in zip(halves, home, strict=True)]
        return jnp.concatenate(halves)

    def _before(self, weights: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, ...]:
        """What needs no other rank: tokens with the dense part's output, normalised tokens, and their routing."""
        x = x + normalise(x) @ weights["dense"]
        normed = normalise(x)
        routing = route(router_logits(normed, weights["gate"], self.router), self.router)
        return x, normed, routing.topk_idx, routing.topk_weights

    @staticmethod
    def _experts(weights: dict[str, jax.Array], recv: wep.Received) -> jax.Array:
        return swiglu_experts(weights["wi"], weights["wo"], recv.rows, recv.counts)


def normalise(x: jax.Array) -> jax.Array:
    """RMS normalisation (arXiv:1910.07467) without a scale."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def make_params(options: Options, mesh: jax.sharding.Mesh) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Random weights, each made where it lies, and how they are laid out."""
    layers, hidden, ffn, experts = options.layers, options.hidden, options.ffn, options.experts
    dtype = jnp.dtype(options.dtype)
    described = {
        "dense": ((layers, hidden, hidden), dtype, EVERYWHERE),
        "gate": ((layers, hidden, experts), jnp.float32, EVERYWHERE),
        "wi": ((layers, experts, hidden, 2 * ffn), dtype, BY_EXPERT),
        "wo": ((layers, experts, ffn, hidden), dtype, BY_EXPERT),
    }
    specs = {name: spec for name, (_, _, spec) in described.items()}

    def make() -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(options.seed), len(described))
        return {
            name: jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5
            for key, (name, (shape, dtype, _)) in zip(keys, described.items(), strict=True)
        }

    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return jax.jit(make, out_shardings=shardings)(), specs


def time_steps(step: Callable[..., jax.Array], params: Any, x: jax.Array, steps: int) -> list[float]:
    """Seconds of each step but the first."""
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        jax.block_until_ready(step(params, x))
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's part of a global array, as float32."""
    return np.concatenate([np.asarray(shard.data, np.float32) for shard in array.addressable_shards])


def main(options: Options) -> None:
    measure.start_processes(**dataclasses.asdict(options.processes))
    mesh = measure.make_mesh(options.devices, options.backend)
    say = print if jax.process_index() == 0 else lambda *_: None
    params, specs = make_params(options, mesh)
    rng = np.random.default_rng(options.seed)
    tokens = rng.standard_normal((mesh.size * options.tokens, options.hidden), np.float32)
    x = measure.put(mesh, tokens.astype(jnp.dtype(options.dtype)))
    with measure.make_group(mesh, options, chunk=options.tokens) as group:
        model = Model(options, group)
        jitted = functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, BY_TOKEN), out_specs=BY_TOKEN)
        steps = {name: jax.jit(jitted(getattr(model, name))) for name in ("plain", "in_halves", "overlapped")}
        say(
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}, backend {group.backend}: {options.tokens} tokens "
            f"a rank, {options.layers} layers, hidden {options.hidden}, top-{options.top_k} of {options.experts}"
        )
        medians = {}
        for name, step in steps.items():
            times = time_steps(step, params, x, options.steps)
            medians[name] = measure.median(times)
            say(f"{name:10}  {1e3 * medians[name]:8.3f} ms a step (median of {options.steps})")
        say(f"gain        {medians['plain'] / medians['overlapped']:8.2f} x")
        # Not the plain step on all tokens, which rounds otherwise and may choose other experts.
        want, got = (local_rows(steps[name](params, x)) for name in ("in_halves", "overlapped"))
    apart = np.abs(want - got).max() / np.abs(want).max()
    say(f"outputs     differ by at most {apart:.1e} of the largest value")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
