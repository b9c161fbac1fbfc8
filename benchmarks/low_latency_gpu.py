"""Times many MoE exchanges in one compiled step, on the GPU ranks of tests/gpu/world.py.

    python tests/gpu/launch.py --dump loop_of_exchanges 8 benchmarks/low_latency_gpu.py [--tokens 1 8 ..]
    WIDEEP_CPU_RANKS=4 python benchmarks/low_latency_gpu.py --hidden 256 --experts 16 --layers 3 --repeats 3

The step has --layers layers, unrolled under jax.jit. A layer is ll_dispatch, an expert, ll_combine; routing is drawn
anew for every layer. Without --ffn the expert is the identity, so a layer is two exchanges and nothing else; with it,
two grouped products and SwiGLU. Bfloat16, rows past the counts left alone (zero_tail=False). `dispatch` is a step
of the same dispatches with nothing else, so what a combine adds is the layer's time less that.

Steps follow one another as in a decoder: --in-flight of them are called in a row, each on the tokens that the last one
returned, which it may overwrite (donate_argnums), and the host waits at the end only. Without donation every call would
find its buffers elsewhere, and XLA would then write all launches of its command buffer anew, 4 to 8 us each. A time is
that from the first call until the last output is there, on the slowest rank, over steps and layers; the figure is the
median of --repeats of them. `returns` says after how long a call came back, in the mean: where that is well below
the step's time, nothing in the step waited on the host. With --kernels, the JSON lines of benchmarks/low_latency.cu,
which times the same kernels in a CUDA graph, the rest is the launch overhead of an exchange:
(layer - dispatch - combine) / 2.
Where XLA dumped its program (--dump), the commands of the step are counted by kind: of a captured step one command
buffer is left.

First comes a step of as many kernels that exchange nothing, each of which reads what the one before it wrote, over one
row of `hidden` values: what the machine takes to go from a kernel to the next one, with all ranks at it at once.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import pathlib
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from world import World

import jax_wideep as wep
from jax_wideep import _ffi


def make_step(world: World, group: wep.ExpertGroup, layers: int, quantize: str | None, ffn: int) -> Any:
    def loop_of_exchanges(x, weights, topk_idx, wi, wo):  # the compiled module is named after it
        for layer in range(layers):
            recv = wep.ll_dispatch(x, topk_idx[layer], group, quantize=quantize, zero_tail=False)
            y = recv.rows
            if ffn:
                gate, up = jnp.split(wep.grouped_matmul(y, wi, recv.counts, zero_tail=False), 2, axis=-1)
                y = wep.grouped_matmul(jax.nn.silu(gate) * up, wo, recv.counts, zero_tail=False)
            x = wep.ll_combine(y, weights, recv, zero_tail=False)
        return x

    return world.on_ranks(loop_of_exchanges, donate_argnums=0)


def make_dispatches(world: World, group: wep.ExpertGroup, layers: int, quantize: str | None) -> Any:
    """The dispatches of the step alone; the next one's tokens are there once this one's rows are."""

    def loop_of_dispatches(x, weights, topk_idx, wi, wo):
        for layer in range(layers):
            recv = wep.ll_dispatch(x, topk_idx[layer], group, quantize=quantize, zero_tail=False)
            x, _ = jax.lax.optimization_barrier((x, recv.rows))
        return x

    return world.on_ranks(loop_of_dispatches, donate_argnums=0)


def make_chain(world: World, kernels: int) -> Any:
    """As many kernels in a row as `kernels`, one after the other."""

    def chain_of_kernels(x):
        for _ in range(kernels):
            x = jax.lax.optimization_barrier(x * 1.0001)
        return x

    return world.on_ranks(chain_of_kernels, donate_argnums=0)


def make_arrays(world: World, arguments: argparse.Namespace, tokens: int) -> list[Any]:
    rng = np.random.default_rng(tokens)
    shape = (world.num_ranks, tokens)
    x = world.put(rng.standard_normal((*shape, arguments.hidden), np.float32).astype(jnp.bfloat16))
    weights = world.put(np.full((*shape, arguments.top_k), 1 / arguments.top_k, np.float32))
    routed = [  # an array for each layer, so that none has to be cut out
        world.put(oracle.random_topk(rng, world.num_ranks, tokens, arguments.experts, arguments.top_k))
        for _ in range(arguments.layers)
    ]
    ffn, local_experts = max(arguments.ffn, 1), arguments.experts // world.num_ranks

    def fill(weights):  # the values do not matter
        one = weights[:1, :1].astype(jnp.bfloat16)
        sizes = (arguments.hidden, 2 * ffn), (ffn, arguments.hidden)
        return [jnp.broadcast_to(one / size[0], (local_experts, *size)) for size in sizes]

    return [x, weights, routed, *world.on_ranks(fill)(weights)]


def read_kernels(path: str, world: World, arguments: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Microseconds of dispatch and combine together in a CUDA graph, by wire and tokens."""
    sizes = {name: getattr(arguments, name) for name in ("hidden", "top_k", "experts", "sms")}
    sizes |= {"ranks": world.num_ranks, "once_per_rank": True}
    wires = {"fp8 to bf16": "fp8", "bf16": "bf16"}
    kernels = {}
    for line in pathlib.Path(path).read_text().splitlines():
        record = json.loads(line)
        if record["wire"] in wires and all(record[name] == size for name, size in sizes.items()):
            kernels[wires[record["wire"]], record["tokens"]] = record["dispatch_us"] + record["combine_us"]
    return kernels


def slowest(world: World, name: str, own: list[float]) -> list[float]:
    """The largest of all processes, for each time."""
    if world.num_processes == 1:
        return own
    store = _ffi.coordination_client()
    store.key_value_set(f"{name}/{world.process}", json.dumps(own))
    everyone = [
        json.loads(store.blocking_key_value_get(f"{name}/{process}", 60_000))
        for process in range(world.num_processes)
    ]
    return [max(times) for times in zip(*everyone, strict=True)]


def time_step(
    world: World, name: str, step: Any, arrays: list[Any], repeats: int, in_flight: int
) -> tuple[float, float]:
    """Seconds of a step, and until its call returns, over `in_flight` steps in a row; the first array goes along."""
    first, *rest = arrays
    copy = world.on_ranks(jnp.copy)
    done, returned = [], []
    for _ in range(repeats + 2):
        x = jax.block_until_ready(copy(first))
        world.barrier(timeout_s=100)
        began = time.perf_counter()
        for _ in range(in_flight):
            x = step(x, *rest)
        returned.append((time.perf_counter() - began) / in_flight)
        jax.block_until_ready(x)
        done.append((time.perf_counter() - began) / in_flight)
    return (
        statistics.median(slowest(world, f"done {name}", done[2:])),
        statistics.median(slowest(world, f"returned {name}", returned[2:])),
    )


def commands_of_step(world: World) -> dict[str, int]:
    """How often each kind of command stands in the last dumped program of the step; {} without a dump."""
    folder = pathlib.Path(os.environ.get("WIDEEP_SCRATCH", "/nonexistent")) / f"dump{world.process}"
    dumped = [path for path in folder.rglob("*thunk_sequence*") if "loop_of_exchanges" in path.name]
    if not dumped:
        return {}
    newest = max(dumped, key=lambda path: path.stat().st_mtime)
    # One command a line; those inside a command buffer are indented.
    kinds = re.findall(r"^(?:\d+:\s*)?(k\w+)", newest.read_text(errors="replace"), re.MULTILINE)
    return dict(collections.Counter(kinds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="a rank")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=0, help="inner size of an expert; 0: no expert at all")
    parser.add_argument("--wires", nargs="+", default=["fp8", "bf16"], choices=["fp8", "bf16"])
    parser.add_argument("--sms", type=int, default=16, help="of each rank")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--in-flight", type=int, default=8, help="steps between two waits of the host")
    parser.add_argument("--chunk", type=int, default=128, help="of the group; as in the file of --kernels")
    parser.add_argument("--kernels", help="JSON lines of benchmarks/low_latency.cu")
    parser.add_argument("--json", help="file that gets a line per figure")
    arguments = parser.parse_args()

    world = World()
    kernels = read_kernels(arguments.kernels, world, arguments) if arguments.kernels else {}
    world.say(
        f"{world.num_ranks} ranks on {world.devices[0].device_kind}, {arguments.layers} layers, hidden "
        f"{arguments.hidden}, top-{arguments.top_k} of {arguments.experts}, ffn {arguments.ffn}, jax {jax.__version__}"
    )
    chain = make_chain(world, 2 * arguments.layers)
    row = world.put(np.ones((world.num_ranks, 1, arguments.hidden), np.float32))
    done, returned = time_step(world, "chain", chain, [row], arguments.repeats, arguments.in_flight)
    us_kernel = done / (2 * arguments.layers) * 1e6
    world.say(f"{2 * arguments.layers} kernels without exchange: {us_kernel:.2f} us each")
    if arguments.json and world.process == 0:
        record = {
            "benchmark": "chain of kernels",
            "ranks": world.num_ranks,
            "processes": world.num_processes,
            "device": world.devices[0].device_kind,
            "kernels": 2 * arguments.layers,
            "in_flight": arguments.in_flight,
            "hidden": arguments.hidden,
            "kernel_us": round(us_kernel, 3),
            "call_returns_us": round(returned * 1e6, 1),
        }
        with open(arguments.json, "a") as file:
            file.write(json.dumps(record) + "\n")
    world.say(
        f"{'wire':5} {'tokens':>6} {'us a layer':>10} {'dispatch':>8} {'us returns':>10} {'us overhead a call':>20}"
    )
    settings = {
        "num_experts": arguments.experts,
        "top_k": arguments.top_k,
        "hidden": arguments.hidden,
        "deadline_s": 20.0,
        "num_sms": arguments.sms,
        "chunk": max(arguments.chunk, *arguments.tokens),
    }
    with world.group(**settings) as group:
        for wire, tokens in itertools.product(arguments.wires, arguments.tokens):
            step = make_step(world, group, arguments.layers, "fp8" if wire == "fp8" else None, arguments.ffn)
            arrays = make_arrays(world, arguments, tokens)
            done, returned = time_step(
                world, f"{wire} {tokens}", step, arrays, arguments.repeats, arguments.in_flight
            )
            alone_done, _ = time_step(
                world,
                f"dispatch {wire} {tokens}",
                make_dispatches(world, group, arguments.layers, "fp8" if wire == "fp8" else None),
                arrays,
                arguments.repeats,
                arguments.in_flight,
            )
            us_dispatch = alone_done / arguments.layers * 1e6
            group.check()
            us_layer = done / arguments.layers * 1e6
            alone = kernels.get((wire, tokens))
            overhead = None if alone is None else (us_layer - alone) / 2
            commands = commands_of_step(world)
            shown = "" if overhead is None else f"{overhead:.2f}"
            world.say(
                f"{wire:5} {tokens:6} {us_layer:10.1f} {us_dispatch:8.1f} {returned * 1e6:10.1f} {shown:>20}"
                + (f"   {commands}" if commands else "")
            )
            if arguments.json and world.process == 0:
                record = {
                    "benchmark": "loop of exchanges",
                    "ranks": world.num_ranks,
                    "processes": world.num_processes,
                    "device": world.devices[0].device_kind,
                    "wire": wire,
                    "tokens": tokens,
                    "layers": arguments.layers,
                    "in_flight": arguments.in_flight,
                    "hidden": arguments.hidden,
                    "top_k": arguments.top_k,
                    "experts": arguments.experts,
                    "ffn": arguments.ffn,
                    "layer_us": round(us_layer, 2),
                    "dispatch_us": round(us_dispatch, 2),
                    "call_returns_us": round(returned * 1e6, 1),
                    "step_us": round(done * 1e6, 1),
                    "overhead_us": None if overhead is None else round(overhead, 2),
                    "commands": commands,
                }
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
