"""Exchanges under random delays, for as long as you like; the suite runs a few hundred of them.

    python tests/soak.py --exchanges 10000

    python -m jax_wideep.launch --processes 4 tests/soak.py --ranks 2

Two groups of ranks take turns on the same devices, several launches in flight; every step plans, dispatches and
combines, sends and combines in the low-latency shape, and sums over the ranks with XLA's own collective, with a
random amount of other work on each rank between. Every output is compared with what it must be.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import jax_wideep as wep
from jax_wideep import launch

EXCHANGES_PER_STEP = 5  # plan, dispatch, combine, ll_dispatch, ll_combine
STEPS_PER_LAUNCH = 10
LAUNCHES_IN_FLIGHT = 4
TOKENS = 6
MAX_DELAY = 20_000  # turns of a loop of scalar arithmetic; some tens of microseconds


def _delay(key: jax.Array, x: jax.Array) -> jax.Array:
    """x, after a random amount of work: mostly none, at times much."""
    length, rarely = jax.random.uniform(key, (2,))
    turns = jnp.where(rarely < 0.3, length * MAX_DELAY, 0).astype(jnp.int32)
    done = jax.lax.fori_loop(0, turns, lambda i, total: jnp.sin(total + i), length)
    return jnp.where(done > 2, 0, x)  # never: a sine


def make_launch(group: wep.ExpertGroup):
    """A jitted function: key -> the largest error that any rank saw in STEPS_PER_LAUNCH steps."""

    def step(worst, key):
        key = jax.random.fold_in(key, jax.lax.axis_index(group.axis))
        keys = jax.random.split(key, 8)
        x = jax.random.normal(keys[0], (TOKENS, group.hidden))
        noise = jax.random.gumbel(keys[1], (TOKENS, group.num_experts))
        topk_idx = jax.lax.top_k(noise, group.top_k)[1].astype(jnp.int32)
        topk_idx = jnp.where(jax.random.uniform(keys[2], topk_idx.shape) < 0.2, -1, topk_idx)
        weights = jax.random.normal(keys[3], topk_idx.shape)
        want = jnp.where(topk_idx >= 0, weights, 0).sum(axis=1, keepdims=True) * x

        plan = wep.make_plan(_delay(keys[4], topk_idx), group)
        rows, row_weights = wep.dispatch(_delay(keys[5], x), weights, plan)
        recv = wep.ll_dispatch(x, topk_idx, group, quantize=None)  # does not wait for the plan
        out = wep.combine(_delay(keys[6], rows), row_weights, plan)
        ll_out = wep.ll_combine(_delay(keys[7], recv.rows), weights, recv)

        selections = jax.lax.psum(jnp.sum(topk_idx >= 0), group.axis)
        counted = jnp.sum(plan.tokens_per_expert)
        errors = jnp.stack([
            jnp.max(jnp.abs(out - want)),
            jnp.max(jnp.abs(ll_out - want)),
            jnp.abs(selections - counted).astype(jnp.float32),
        ])  # fmt: skip
        return jnp.maximum(worst, jnp.max(errors)), None

    def body(keys):
        start = jax.lax.pcast(jnp.float32(0), group.axis, to="varying")
        return jax.lax.scan(step, start, keys)[0][None]

    spread = jax.shard_map(
        body, mesh=group.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(group.axis)
    )
    return jax.jit(lambda key: jnp.max(spread(jax.random.split(key, STEPS_PER_LAUNCH))))


def soak(
    groups: list[wep.ExpertGroup], exchanges: int, *, seed: int = 0, report=lambda done, error: None
) -> float:
    """Runs at least `exchanges` exchanges over `groups` in turn; returns the largest error.

    Calls `report(exchanges done, largest error so far)` as launches complete.
    """
    launches = [make_launch(group) for group in groups]
    each = STEPS_PER_LAUNCH * EXCHANGES_PER_STEP
    worst, done, in_flight = 0.0, 0, []
    for i in range(-(-exchanges // each)):
        in_flight.append(launches[i % len(launches)](jax.random.key(seed + i)))
        if len(in_flight) == LAUNCHES_IN_FLIGHT:
            worst, done = max(worst, float(in_flight.pop(0))), done + each
            report(done, worst)
    for error in in_flight:
        worst, done = max(worst, float(error)), done + each
        report(done, worst)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--exchanges", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=8, help="of each process, where the job has several")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wep.use_cpu_devices(args.ranks)
    launch.initialize()
    ranks = jax.device_count()
    mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    start = time.monotonic()

    def report(done: int, error: float) -> None:
        seconds = time.monotonic() - start
        print(
            f"\r{done} of {args.exchanges} exchanges, {seconds:.0f} s, error {error:.1e}", end="", flush=True
        )

    sizes = {"num_experts": 2 * ranks, "hidden": 32, "chunk": TOKENS}
    with wep.ExpertGroup(mesh, top_k=2, **sizes) as first, wep.ExpertGroup(mesh, top_k=1, **sizes) as second:
        error = soak([first, second], args.exchanges, seed=args.seed, report=report)
    print()
    if not error < 1e-5:
        sys.exit(f"soak: an output differs from what it must be by {error}")


if __name__ == "__main__":
    main()
