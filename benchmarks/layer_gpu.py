"""Times a whole MoE layer on one GPU: moe_ffn, the same layer over jax.lax.ragged_dot, and a PyTorch layer of sort,
torch._grouped_mm and index_add.

    python benchmarks/layer_gpu.py [--backends xla] [--rounds 7] [--tokens 4096] ..     JSON lines

4096 tokens, hidden 4096, ffn 1536, 128 experts, top-8, bfloat16, SwiGLU; routing given. JAX and PyTorch run in a
process each and take turns: in every round each implementation times its forward pass, and forward with
backward, over `repeats` calls that end in one wait for the GPU. Tokens, routing and cotangent are drawn anew
for every round, the same routing for all. A figure is the median over the rounds but the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PASSES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int


def draw_routing(shape: Shape, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """topk_idx [tokens, top_k], distinct experts, uniform; topk_weights."""
    random = np.random.default_rng(seed)
    topk_idx = np.argsort(random.random((shape.tokens, shape.experts)), axis=1)[:, : shape.top_k]
    topk_weights = random.random((shape.tokens, shape.top_k), dtype=np.float32)
    return topk_idx.astype(np.int32), topk_weights / topk_weights.sum(axis=1, keepdims=True)


# ---- one process each: draw(seed) gives the inputs, a layer takes them ----


class JaxLayers:
    def __init__(self, shape: Shape, backends: list[str]):
        import jax
        import jax.numpy as jnp

        import jax_wideep as wep

        self.shape, self.jax, self.jnp = shape, jax, jnp
        self.device = jax.devices()[0].device_kind
        axis_types = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((1,), ("expert",), axis_types=axis_types, devices=jax.devices()[:1])
        keys = jax.random.split(jax.random.key(0))
        sizes = (shape.experts, shape.hidden, 2 * shape.ffn), (shape.experts, shape.ffn, shape.hidden)
        self.weights = [
            jax.jit(lambda key, size=size: jax.random.normal(key, size, jnp.bfloat16) / size[1] ** 0.5)(key)
            for key, size in zip(keys, sizes, strict=True)
        ]
        settings = {"num_experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden}
        self.layers: dict[str, dict[str, Callable[..., Any]]] = {}
        for backend in backends:
            group = wep.ExpertGroup(self.mesh, backend=backend, **settings)
            self.layers[f"jax_wideep, backend {backend}"] = self._passes(wep, group, "cuda")
        group = wep.ExpertGroup(self.mesh, backend="xla", **settings)
        self.layers["ragged_dot"] = self._passes(wep, group, "xla")

    def _passes(self, wep: Any, group: Any, implementation: str) -> dict[str, Callable[..., Any]]:
        jax = self.jax

        def layer(x, topk_weights, wi, wo, topk_idx):
            return wep.moe_ffn(x, topk_idx, topk_weights, wi, wo, group, implementation=implementation)[0]

        spec = jax.sharding.PartitionSpec("expert")
        layer = jax.shard_map(layer, mesh=self.mesh, in_specs=(spec,) * 5, out_specs=spec)

        def with_gradients(x, topk_weights, wi, wo, topk_idx, dout):
            out, gradients = jax.vjp(lambda *a: layer(*a, topk_idx), x, topk_weights, wi, wo)
            return out, gradients(dout)

        return {
            "forward": jax.jit(lambda *a: layer(*a[:-1])),
            "forward+backward": jax.jit(with_gradients),
        }

    def draw(self, seed: int) -> tuple[Any, ...]:
        size = (self.shape.tokens, self.shape.hidden)
        x, dout = (
            self.jax.random.normal(key, size, self.jnp.bfloat16)
            for key in self.jax.random.split(self.jax.random.key(seed))
        )
        topk_idx, topk_weights = (self.jnp.asarray(a) for a in draw_routing(self.shape, seed))
        return x, topk_weights, *self.weights, topk_idx, dout

    def wait(self, result: Any) -> None:
        self.jax.block_until_ready(result)

    def error(self, inputs: tuple[Any, ...]) -> float:
        """Relative difference of the outputs of the first layer and of ragged_dot's."""
        first = next(iter(self.layers))
        ours, theirs = (
            self.layers[name]["forward"](*inputs).astype(self.jnp.float32) for name in (first, "ragged_dot")
        )
        return float(self.jnp.linalg.norm(ours - theirs) / self.jnp.linalg.norm(theirs))


class TorchLayers:
    def __init__(self, shape: Shape, backends: list[str]):
        import torch

        self.shape, self.torch = shape, torch
        self.device = torch.cuda.get_device_name()
        sizes = (shape.experts, shape.hidden, 2 * shape.ffn), (shape.experts, shape.ffn, shape.hidden)
        self.weights = [
            (torch.randn(size, device="cuda", dtype=torch.bfloat16) / size[1] ** 0.5).requires_grad_()
            for size in sizes
        ]
        self.all_experts = torch.arange(shape.experts, device="cuda", dtype=torch.int32)

        class GroupedMatmul(torch.autograd.Function):
            @staticmethod
            def forward(ctx, rows, w, ends):
                ctx.save_for_backward(rows, w, ends)
                return torch._grouped_mm(rows, w, offs=ends)

            @staticmethod
            def backward(ctx, dout):
                rows, w, ends = ctx.saved_tensors
                drows = torch._grouped_mm(dout, w.transpose(1, 2), offs=ends)
                return drows, torch._grouped_mm(rows.t(), dout, offs=ends), None

        self.multiply = GroupedMatmul.apply
        self.layers = {"PyTorch": {"forward": self._forward, "forward+backward": self._with_gradients}}

    def _layer(self, x, topk_weights, wi, wo, topk_idx):
        torch = self.torch
        expert, order = torch.sort(topk_idx.flatten())
        token = order // self.shape.top_k
        ends = torch.searchsorted(expert, self.all_experts, right=True).to(torch.int32)
        hidden = self.multiply(x.index_select(0, token), wi, ends)
        gate, up = hidden.chunk(2, dim=-1)
        y = self.multiply(torch.nn.functional.silu(gate) * up, wo, ends)
        weights = topk_weights.flatten().index_select(0, order)
        return torch.zeros_like(x).index_add_(0, token, y * weights[:, None].to(y.dtype))

    def _forward(self, *inputs):
        with self.torch.no_grad():
            return self._layer(*inputs[:-1])

    def _with_gradients(self, *inputs):
        out = self._layer(*inputs[:-1])
        return out, self.torch.autograd.grad(out, inputs[:4], inputs[-1])

    def draw(self, seed: int) -> tuple[Any, ...]:
        torch = self.torch
        size = (self.shape.tokens, self.shape.hidden)
        x, dout = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        topk_idx, topk_weights = (torch.from_numpy(a).cuda() for a in draw_routing(self.shape, seed))
        return x.requires_grad_(), topk_weights.requires_grad_(), *self.weights, topk_idx, dout

    def wait(self, result: Any) -> None:
        self.torch.cuda.synchronize()


def work(kind: str, shape: Shape, backends: list[str]) -> None:
    """Answers requests on stdin, one JSON line each, until it ends."""
    layers = {"jax": JaxLayers, "torch": TorchLayers}[kind](shape, backends)
    answer({"device": layers.device, "implementations": list(layers.layers)})
    seed, inputs = -1, None
    for line in sys.stdin:
        request = json.loads(line)
        if request["seed"] != seed:
            seed, inputs = request["seed"], None
            inputs = layers.draw(seed)
        try:
            if request["pass"] == "error":
                answer({"error": layers.error(inputs)})
                continue
            call = layers.layers[request["implementation"]][request["pass"]]
            layers.wait(call(*inputs))
            begin = time.perf_counter()
            for _ in range(request["repeats"]):
                result = call(*inputs)
            layers.wait(result)
            answer({"us": (time.perf_counter() - begin) / request["repeats"] * 1e6})
            del result
        except Exception as error:  # out of memory, most likely: the others go on
            answer({"failed": f"{type(error).__name__}: {str(error)[:200]}"})


def answer(message: dict[str, Any]) -> None:
    print("> " + json.dumps(message), flush=True)


class Worker:
    """A process that runs work()."""

    def __init__(self, kind: str, arguments: list[str]):
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        hello = self._answer()
        self.device, self.implementations = hello["device"], hello["implementations"]

    def ask(self, **request: Any) -> dict[str, Any]:
        if self.process.poll() is not None:
            return {"failed": f"its process ended with status {self.process.returncode}"}
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return self._answer()
        except (RuntimeError, BrokenPipeError) as error:
            return {"failed": str(error)}

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("> "):
                return json.loads(line[2:])
        raise RuntimeError(f"a worker ended with status {self.process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field, default in (("tokens", 4096), ("hidden", 4096), ("ffn", 1536), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--backends", default="xla", help="of jax_wideep's exchange, with commas between")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=2, help="of ragged_dot")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peers", default="jax,torch", help="which of the two processes to run")
    parser.add_argument("--worker", choices=["jax", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = Shape(args.tokens, args.hidden, args.ffn, args.experts, args.top_k)
    backends = args.backends.split(",")
    if args.worker:
        work(args.worker, shape, backends)
        return

    workers = [Worker(kind, sys.argv[1:]) for kind in args.peers.split(",")]
    common = {
        "benchmark": "layer",
        **dataclasses.asdict(shape),
        "dtype": "bfloat16",
        "device": workers[0].device,
    }
    medians: dict[tuple[str, str], float] = {}
    # ragged_dot comes last: it may take long, or more memory than there is.
    for is_slow, rounds, repeats in ((False, args.rounds, args.repeats), (True, args.slow_rounds, 1)):
        times, failures = take_turns(workers, is_slow, rounds, repeats)
        for (implementation, pass_), values in times.items():
            us = medians[implementation, pass_] = statistics.median(values)
            line = {"implementation": implementation, "pass": pass_, "us": round(us, 1)}
            line |= {"fastest": round(min(values), 1), "slowest": round(max(values), 1), "rounds": rounds}
            print(json.dumps(line | common), flush=True)
        for (implementation, pass_), reason in failures.items():
            print(
                json.dumps({"implementation": implementation, "pass": pass_, "failed": reason} | common),
                flush=True,
            )
    if "jax" in args.peers:
        difference = workers[0].ask(implementation="", seed=0, repeats=0, **{"pass": "error"})
        print(json.dumps({"relative difference of the outputs to ragged_dot's": difference}), flush=True)
    for worker in workers:
        worker.process.stdin.close()
    ours = workers[0].implementations[0]
    for (implementation, pass_), us in medians.items():
        if (ours, pass_) in medians:
            print(f"# {pass_:17} {implementation:24} {us / 1e3:9.3f} ms {us / medians[ours, pass_]:7.2f} x")


def take_turns(
    workers: list[Worker], is_slow: bool, rounds: int, repeats: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], str]]:
    """us per call of every round, and what failed, by implementation and pass."""
    times: dict[tuple[str, str], list[float]] = {}
    failures: dict[tuple[str, str], str] = {}
    for round_ in range(rounds + 1):
        for worker in workers:
            for implementation in worker.implementations:
                if is_slow != (implementation == "ragged_dot"):
                    continue
                for pass_ in PASSES:
                    key = (implementation, pass_)
                    if key in failures:
                        continue
                    request = {
                        "implementation": implementation,
                        "pass": pass_,
                        "seed": round_,
                        "repeats": repeats,
                    }
                    result = worker.ask(**request)
                    if "failed" in result:
                        failures[key] = result["failed"]
                    elif round_ > 0:  # the first one compiles and warms up
                        times.setdefault(key, []).append(result["us"])
    return times, failures


if __name__ == "__main__":
    main()
