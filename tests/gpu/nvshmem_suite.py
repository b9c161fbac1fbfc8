"""Groups on NVSHMEM beside groups of mapped peers: the same bits, repeats, what crosses. One process for each rank.

    WIDEEP_NODE_SIZE=4 python tests/gpu/launch.py 8 tests/gpu/nvshmem_suite.py [check ..]

WIDEEP_NODE_SIZE: ranks of a (virtual) node; by default all are on one. The values themselves are checked by
low_latency_suite.py and exchange_suite.py under WIDEEP_GROUP, which nvshmem.sh runs too.
"""

from __future__ import annotations

import os
import sys
import time

import exchange_suite as exchange
import jax
import jax.numpy as jnp
import low_latency_suite as low_latency
import numpy as np
import oracle
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


def throughput(world, group):
    """Everything of one layer, forward and backward, for rows that travel as they are; and on the FP8 wire."""
    capacity = world.num_ranks * exchange.TOKENS * exchange.TOP_K
    step = exchange.whole_step(world, group, capacity)

    def fp8(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group, capacity=capacity)
        (q, scales), row_weights = wep.dispatch(x, weights, plan, quantize="fp8", dequantize=False)
        return {"q": q, "scales": scales, "row_weights": row_weights}

    fp8 = world.on_ranks(fp8)

    def run(seed):
        inputs = exchange.draw(world, seed, 256, jnp.bfloat16, kind="zipf", masked=0.1)
        cotangent = np.random.default_rng(seed).normal(size=inputs[0].shape).astype(inputs[0].dtype)
        arrays = [world.put(array) for array in inputs]
        outputs = step(*arrays, world.put(cotangent))
        flat = {name: array for name, array in outputs.items() if name != "plan"}
        flat |= {f"plan.{name}": array for name, array in outputs["plan"].items()}
        flat |= {f"fp8.{name}": array for name, array in fp8(*arrays).items()}
        return jax.block_until_ready(flat)

    return run


def check_throughput(world):
    """Plan and dispatch on NVSHMEM give what mapped peers give; on one node so do combine and the gradients.

    Over nodes the order of combine's sum is another one.
    """
    settings = exchange.settings(world)
    summed = () if node_size(world) >= world.num_ranks else ("out", "dx", "dweights")
    with world.group(**settings) as peers, nvshmem_group(world, settings) as nvshmem:
        runs = [throughput(world, group) for group in (peers, nvshmem)]
        for seed in range(4):
            want, got = (
                bits(world, {name: array for name, array in run(seed).items() if name not in summed})
                for run in runs
            )
            assert_same_bits(got, want, f"seed {seed}")


def check_throughput_repeats(world):
    """200 times with every rank delayed at random: the same bits."""
    delays = np.random.default_rng(world.process)
    with nvshmem_group(world, exchange.settings(world)) as group:
        run = throughput(world, group)
        first = bits(world, run(5))
        for repeat in range(REPEATS):
            time.sleep(delays.uniform(0, MOST_DELAY_S))
            assert_same_bits(bits(world, run(5)), first, f"repeat {repeat}")
        group.check()


def tokens_across(world, dest_rank, masked):
    """[ranks] tokens that each sends to other nodes, and sums that it sends back, once each way.

    A token crosses once to each other node that has a row of it, to the rank of the same index there or, where that
    node is smaller, of the index modulo its size; which sends one sum back.
    """
    nodes = {}
    for rank in range(world.num_ranks):
        if rank not in masked:
            nodes.setdefault(rank // node_size(world), []).append(rank)
    out, back = (np.zeros(world.num_ranks, np.int64) for _ in range(2))
    for node, hosts in nodes.items():
        for home_node, homes in nodes.items():
            for index, home in enumerate(homes if home_node != node else ()):
                crossing = np.isin(dest_rank[home], hosts).any(axis=1).sum()
                out[home] += crossing
                back[hosts[index % len(hosts)]] += crossing
    return out, back


def check_crossed(world):
    """What the kernels count is each (token, node) pair once for dispatch and once for combine, with and without drops
    and masks, and as often for the gradients."""
    if world.backend != "cuda":
        return
    experts = exchange.LOCAL_EXPERTS * world.num_ranks
    last = world.num_ranks - 1
    for capacity in (
        world.num_ranks * exchange.TOKENS * exchange.TOP_K,
        exchange.TOKENS * exchange.TOP_K // 2,
    ):
        with nvshmem_group(world, exchange.settings(world)) as group:
            step = exchange.whole_step(world, group, capacity)
            for seed, masked in enumerate([[], [], [last], [0, last] if last > 1 else [0], []]):
                if list(group.masked_ranks) != masked:
                    group.mask_ranks(masked)
                inputs = exchange.draw(world, seed, 256, jnp.bfloat16, kind="zipf", masked=0.2)
                before = group._transport.crossed()
                exchange.run_and_check(world, step, inputs, capacity, jnp.bfloat16, seed, masked)
                after = group._transport.crossed()
                got = {name: after[name] - before[name] for name in after}
                plan = oracle.make_masked_plan(inputs[2], experts, capacity, masked)
                out, back = tokens_across(world, plan.dest_rank, masked)
                for rank in world.local_ranks:
                    # Dispatch and combine's gradient go out, combine and dispatch's gradient come back.
                    assert got["tokens_out"] == 2 * out[rank], (rank, got, out)
                    assert got["tokens_back"] == 2 * back[rank], (rank, got, back)
                    # A slot: a header of 16 bytes, 16 for each selection, in lines of 128; and the row.
                    slot_bytes = -(-(16 + 16 * exchange.TOP_K) // 128) * 128 + 256 * 2
                    assert got["bytes_back"] == got["tokens_back"] * slot_bytes, got
                    # Beside rows: the plan's entries, and that a channel has ended.
                    assert got["bytes_out"] >= got["tokens_out"] * slot_bytes, got
                world.barrier()  # results of all ranks are ready


CHECKS = {
    "same_bits": check_same_bits,
    "repeats": check_repeats,
    "throughput": check_throughput,
    "throughput_repeats": check_throughput_repeats,
    "crossed": check_crossed,
}


def main() -> None:
    world = World()
    world.say(f"{world.num_ranks} ranks, {node_size(world)} a node")
    world.run(CHECKS, sys.argv[1:] or CHECKS)


if __name__ == "__main__":
    main()
