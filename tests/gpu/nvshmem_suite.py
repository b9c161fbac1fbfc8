"""Groups on NVSHMEM beside groups of mapped peers: the same bits, repeats, errors. One process for each rank.

    WIDEEP_NODE_SIZE=4 python tests/gpu/launch.py 8 tests/gpu/nvshmem_suite.py [check ..]

WIDEEP_NODE_SIZE: ranks of a (virtual) node; by default all are on one. The values themselves are checked by
low_latency_suite.py and exchange_suite.py under WIDEEP_GROUP, which nvshmem.sh runs too.
"""

from __future__ import annotations

import os
import sys
import time

import exchange_suite
import jax
import jax.numpy as jnp
import low_latency_suite as low_latency
import numpy as np
from world import World

import jax_wideep as wep

REPEATS = 200
MOST_DELAY_S = 0.003


def node_size(world: World) -> int:
    return int(os.environ.get("WIDEEP_NODE_SIZE", world.num_ranks))


def nvshmem_group(world, settings):
    return world.group(**settings, transport="nvshmem", node_size=node_size(world))


def bits(world, outputs):
    """Everything that the ranks of this process got, as bytes."""
    return {
        (name, rank): mine.tobytes()
        for name, array in outputs.items()
        for rank, mine in world.local(array).items()
    }


def assert_same_bits(got, want, what):
    assert got.keys() == want.keys()
    different = [key for key in want if got[key] != want[key]]
    assert not different, f"{what}: {different} differ"


def low_latency_outputs(world, group, wire, halves, seed, dtype=jnp.bfloat16):
    """Outputs of dispatch and combine, and gradients."""
    arrays = low_latency.draw(world, seed, dtype, low_latency.CHUNK, kind="zipf", masked=0.2)
    scale = np.full((world.num_ranks, 1), low_latency.SCALE, np.float32)
    call = low_latency.whole_call(world, group, wire, halves)
    return lambda: jax.block_until_ready(call(*(world.put(array) for array in (*arrays, scale))))


def check_same_bits(world):
    """Low latency on NVSHMEM, also between virtual nodes, gives what mapped peers give."""
    settings = low_latency.settings(world)
    with world.group(**settings) as peers, nvshmem_group(world, settings) as nvshmem:
        for seed, (wire, halves) in enumerate([("fp8", False), (None, False), ("fp8", True), (None, True)]):
            for dtype in low_latency.EPS:
                want, got = (
                    bits(world, low_latency_outputs(world, group, wire, halves, seed, dtype)())
                    for group in (peers, nvshmem)
                )
                assert_same_bits(got, want, f"wire {wire}, halves {halves}, {dtype.__name__}")


def check_repeats(world):
    """200 times with every rank delayed at random: the same bits."""
    delays = np.random.default_rng(world.process)
    with nvshmem_group(world, low_latency.settings(world)) as group:
        run = low_latency_outputs(world, group, "fp8", False, 17)
        first = bits(world, run())
        for repeat in range(REPEATS):
            time.sleep(delays.uniform(0, MOST_DELAY_S))
            assert_same_bits(bits(world, run()), first, f"repeat {repeat}")
        group.check()


def throughput(world, group, seed):
    x, weights, topk_idx = exchange_suite.draw(world, seed, 256, jnp.bfloat16)

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)

        def layer(x, weights):
            rows, row_weights = wep.dispatch(x, weights, plan)
            return wep.combine(rows * 2, row_weights, plan)

        out, backward = jax.vjp(layer, x, weights)
        dx, dweights = backward(out)
        return {"out": out, "dx": dx, "dweights": dweights}

    return world.on_ranks(body)(*(world.put(array) for array in (x, weights, topk_idx)))


def check_throughput(world):
    """On one node the throughput shape too has the same bits; over several nodes it says that it cannot."""
    settings = exchange_suite.settings(world)
    with world.group(**settings) as peers, nvshmem_group(world, settings) as nvshmem:
        if node_size(world) >= world.num_ranks:
            want, got = (bits(world, throughput(world, group, 3)) for group in (peers, nvshmem))
            assert_same_bits(got, want, "throughput")
            return
        try:
            jax.block_until_ready(throughput(world, nvshmem, 3))
        except jax.errors.JaxRuntimeError as error:
            assert "only low-latency exchanges run" in str(error), error
            return
        raise AssertionError("a plan over several nodes went through")


CHECKS = {"same_bits": check_same_bits, "repeats": check_repeats, "throughput": check_throughput}


def main() -> None:
    world = World()
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name](world)
        world.barrier()
        world.say(f"ok {name}, {world.num_ranks} ranks, {node_size(world)} a node")


if __name__ == "__main__":
    main()
