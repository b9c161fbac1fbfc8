"""Times plan, dispatch, combine and their gradients on the GPU ranks of tests/gpu/world.py.

    python tests/gpu/launch.py --xla-flag=--xla_gpu_graph_min_graph_size=1 8 benchmarks/exchange_gpu.py
        [--tokens 4096 --hidden 7168 --top-k 8 --sms 16 --form chain loop ..]

Two forms, each one jitted function, timed on the slowest rank, from the barrier before it to its end:

  chain  the ops follow each other in the program, each after the one before (by optimization barriers); with the flag
         above XLA captures them in a command buffer. Time of an op: (T(2n) - T(n)) / n of chains of n = --calls ops, so
         that what a call of the function costs is not in it. Chains run in a fori_loop of as many rounds as make the
         difference 20 ms or more (at most 50).
  loop   a fori_loop of --calls rounds with one op each; the whole time, divided by the calls.

A figure is the mean over --repeats after one that is not counted. The function makes the plan once, before. Inputs are
bfloat16, rows past the plan's are left alone (zero_tail=False), capacities are the largest rank's rows and 5% more.
Several values of --tokens, --hidden, --top-k, --sms, --form and --routing run in all combinations.

Floors are the bytes that an op has to move over the speed of a copy, measured in the same run by all ranks at once:
dispatch reads x and writes the rows, combine the reverse, combine's gradient reads rows and writes rows; with ranks on
GPUs of their own that is each GPU's own memory. On the FP8 wire rows are wire rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from world import AXIS, World, group_settings

import jax_wideep as wep
from jax_wideep import _exchange_ops, _ffi, _kernels

NUM_EXPERTS = 256


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    top_k: int
    num_sms: int
    routing: str


@dataclasses.dataclass(frozen=True)
class Op:
    """`body(group, capacity, plan, arrays)` returns a small output of the op; `floor_bytes` of one rank."""

    name: str
    settings: dict[str, str]
    body: Callable[..., jax.Array]
    floor_bytes: Callable[[Case, float], float]


def rows_and_tokens(row_factor: int, token_factor: int) -> Callable[[Case, float], float]:
    return lambda case, rows: 2.0 * case.hidden * (row_factor * rows + token_factor * case.tokens)


def plan_only(group, capacity, plan, a):
    return wep.make_plan(a["topk_idx"], group, capacity=capacity).num_rows


def dispatch_only(group, capacity, plan, a, **options):
    return wep.dispatch(a["x"], a["weights"], plan, zero_tail=False, **options)[1]


def plan_and_dispatch(group, capacity, plan, a, **options):
    made = wep.make_plan(a["topk_idx"], group, capacity=capacity)
    return dispatch_only(group, capacity, made, a, **options)


def plan_and_fp8(group, capacity, plan, a):
    return plan_and_dispatch(group, capacity, plan, a, quantize="fp8", dequantize=False)


def combine_only(group, capacity, plan, a):
    return wep.combine(a["rows"], a["row_weights"], plan, zero_tail=False)


def dispatch_grad(group, capacity, plan, a):
    return _exchange_ops.dispatch_grad(a["rows"], a["row_weights"], plan)[1]


def combine_grad(group, capacity, plan, a):
    return _exchange_ops.combine_grad(a["x"], a["rows"], a["row_weights"], plan, False)[1]


PUSH, PULL = {"dispatch_form": "push"}, {"dispatch_form": "pull"}
HOME_PULL, HOME_PUSH = {"combine_form": "pull"}, {"combine_form": "push"}
REDUCE = {"combine_form": "reduce"}
RINGS = {"zero_copy": "off"}
ONE_WAY = rows_and_tokens(1, 1)

OPS = [
    Op("plan", {}, plan_only, lambda case, rows: 0.0),
    Op("plan + dispatch push", PUSH, plan_and_dispatch, ONE_WAY),
    Op("plan + dispatch pull", PULL, plan_and_dispatch, ONE_WAY),
    Op("plan + dispatch rings", RINGS | PUSH, plan_and_dispatch, ONE_WAY),
    Op(
        "plan + quantize + dispatch fp8 push", PUSH, plan_and_fp8,
        lambda case, rows: _kernels.wire_row_bytes(case.hidden) * rows + 2.0 * case.hidden * case.tokens,
    ),
    Op("dispatch push", PUSH, dispatch_only, ONE_WAY),
    Op("dispatch pull", PULL, dispatch_only, ONE_WAY),
    Op("combine pull", HOME_PULL, combine_only, ONE_WAY),
    Op("combine push", HOME_PUSH, combine_only, ONE_WAY),
    Op("combine reduce", REDUCE, combine_only, ONE_WAY),
    Op("combine rings", RINGS | HOME_PUSH, combine_only, ONE_WAY),
    Op("dispatch grad pull", HOME_PULL, dispatch_grad, ONE_WAY),
    Op("dispatch grad push", HOME_PUSH, dispatch_grad, ONE_WAY),
    Op("dispatch grad reduce", REDUCE, dispatch_grad, ONE_WAY),
    Op("combine grad", {}, combine_grad, rows_and_tokens(2, 1)),
]  # fmt: skip


class Clock:
    """Times a function on all ranks at once."""

    def __init__(self, world: World, repeats: int):
        self._world = world
        self._repeats = repeats
        self._records = 0

    def seconds(self, function: Callable[..., Any], *arguments: Any) -> list[float]:
        """Of the slowest rank, each time."""
        own = []
        for _ in range(self._repeats + 1):
            self._world.barrier(timeout_s=200)
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            own.append(time.perf_counter() - began)
        return [max(times) for times in zip(*self._everyone(own[1:]), strict=True)]

    def _everyone(self, own: list[float]) -> list[list[float]]:
        if self._world.num_processes == 1:
            return [own]
        self._records += 1
        store = _ffi.coordination_client()
        store.key_value_set(f"bench/{self._records}/{self._world.process}", json.dumps(own))
        return [
            json.loads(store.blocking_key_value_get(f"bench/{self._records}/{process}", 60_000))
            for process in range(self._world.num_processes)
        ]


def copy_bytes_per_second(world: World, clock: Clock, num_bytes: int, calls: int) -> float:
    """Bytes read plus written by all ranks together, while all of them copy."""
    array = world.put(np.zeros((world.num_ranks, num_bytes // 4), np.int32))
    copy = world.on_ranks(lambda a: jax.lax.fori_loop(0, calls, lambda _, b: b + 1, a))
    seconds = statistics.mean(clock.seconds(copy, array)) / calls
    return 2.0 * num_bytes * world.num_ranks / seconds


def draw(world: World, case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ranks = world.num_ranks
    topk_idx = oracle.random_topk(rng, ranks, case.tokens, NUM_EXPERTS, case.top_k, kind=case.routing)
    received = np.bincount(topk_idx[topk_idx >= 0] // (NUM_EXPERTS // ranks), minlength=ranks)
    capacity = int(received.max() * 1.05) // 128 * 128 + 128
    return {
        "topk_idx": topk_idx,
        "received": received,
        "capacity": capacity,
        "weights": rng.random((ranks, case.tokens, case.top_k), np.float32),
        "keys": rng.integers(0, 2**32, (ranks, 1, 2), np.uint32),
    }


def seconds_of(world, clock, op, group, capacity, arrays, *, rounds: int, chain: int) -> list[float]:
    """Of `rounds` times `chain` ops."""

    def run(a):
        plan = wep.make_plan(a["topk_idx"], group, capacity=capacity)

        def one_round(_, total):
            inputs, outputs = a, []
            for _ in range(chain):
                outputs.append(op.body(group, capacity, plan, inputs))
                # The next op's inputs are there once this one's output is.
                inputs, outputs[-1] = jax.lax.optimization_barrier((inputs, outputs[-1]))
            return total + sum(output.ravel()[0].astype(jnp.float32) for output in outputs)

        start = _ffi.vary([jnp.float32(0)], (AXIS,))[0]
        return jax.lax.fori_loop(0, rounds, one_round, start)[None]

    return clock.seconds(world.on_ranks(run), arrays)


def measure(
    world: World, clock: Clock, case: Case, ops: list[Op], forms: list[str], calls: int, copy_speed: float
):
    drawn = draw(world, case)
    capacity, mean_rows = drawn["capacity"], float(drawn["received"].mean())
    arrays = {name: world.put(drawn[name]) for name in ("topk_idx", "weights")}

    def fill(keys):  # large arrays are drawn on the devices
        keys = jax.random.split(jax.random.wrap_key_data(keys[0]), 3)
        shapes = (case.tokens, case.hidden), (capacity, case.hidden)
        x, rows = (
            jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=False)
        )
        return x, rows, jax.random.uniform(keys[2], (capacity,), jnp.float32)

    arrays["x"], arrays["rows"], arrays["row_weights"] = world.on_ranks(fill)(world.put(drawn["keys"]))
    for op in ops:
        settings = {
            "num_experts": NUM_EXPERTS,
            "top_k": case.top_k,
            "hidden": case.hidden,
            "deadline_s": 10.0,
        }
        with world.group(**settings, num_sms=case.num_sms, **op.settings) as group:
            timed = functools.partial(seconds_of, world, clock, op, group, capacity, arrays)
            seconds = {"loop": [t / calls for t in timed(rounds=calls, chain=1)]}
            if "chain" in forms:
                rounds = min(50, max(2, math.ceil(0.02 / calls / min(seconds["loop"]))))
                short, long = (timed(rounds=rounds, chain=chain) for chain in (calls, 2 * calls))
                base = statistics.mean(short)
                seconds["chain"] = [(t - base) / (rounds * calls) for t in long]
            group.check()
        floor = op.floor_bytes(case, mean_rows) * world.num_ranks / copy_speed
        for form in forms:
            yield {
                "kind": "exchange_jax",
                "op": op.name,
                "form": form,
                "ranks": world.num_ranks,
                **dataclasses.asdict(case),
                "us": round(statistics.mean(seconds[form]) * 1e6, 1),
                "us_each": [round(t * 1e6, 1) for t in seconds[form]],
                "floor_us": round(floor * 1e6, 1),
                "rows_per_rank": mean_rows,
                "rows_most": int(drawn["received"].max()),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="a rank")
    parser.add_argument("--hidden", type=int, nargs="+", default=[7168])
    parser.add_argument("--top-k", type=int, nargs="+", default=[8])
    parser.add_argument("--sms", type=int, nargs="+", default=[16], help="of each rank")
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf", "hot"])
    parser.add_argument("--ops", nargs="+", default=[""], help="parts of the ops' names")
    parser.add_argument("--form", nargs="+", default=["chain", "loop"], choices=["chain", "loop"])
    parser.add_argument("--calls", type=int, default=20, help="in a chain or loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file that gets a line per figure")
    parser.add_argument("--date", default="", help="for that file")
    arguments = parser.parse_args()

    world = World()
    clock = Clock(world, arguments.repeats)
    ops = [op for op in OPS if any(part in op.name for part in arguments.ops)]
    num_bytes = max(arguments.tokens) * max(arguments.hidden) * 8
    copy_speed = copy_bytes_per_second(world, clock, num_bytes, arguments.calls)
    kind = world.devices[0].device_kind
    world.say(
        f"{world.num_ranks} ranks on {kind}, copy {copy_speed / 1e9:.0f} GB/s over all ranks, jax {jax.__version__}"
    )
    world.say(
        f"{'op':36} {'form':5} {'tokens':>6} {'hidden':>6} {'top-k':>5} {'SMs':>4} {'routing':>8} {'us':>9} "
        f"{'floor':>8}   part"
    )
    for values in itertools.product(
        arguments.tokens, arguments.hidden, arguments.top_k, arguments.sms, arguments.routing
    ):
        case = Case(*values)
        for figure in measure(world, clock, case, ops, arguments.form, arguments.calls, copy_speed):
            part = f"{figure['floor_us'] / figure['us']:6.1%}" if figure["floor_us"] else ""
            world.say(
                f"{figure['op']:36} {figure['form']:5} {case.tokens:6} {case.hidden:6} {case.top_k:5} {case.num_sms:4} "
                f"{case.routing:>8} {figure['us']:9.1f} {figure['floor_us']:8.1f} {part:>6}"
            )
            if arguments.json and world.process == 0:
                with open(arguments.json, "a") as file:
                    machine = {"device": kind, "date": arguments.date, "copy_gb_s": round(copy_speed / 1e9)}
                    machine["group"] = group_settings()
                    file.write(json.dumps(figure | machine) + "\n")


if __name__ == "__main__":
    main()
