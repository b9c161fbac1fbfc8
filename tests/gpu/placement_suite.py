"""Placed experts on the ranks of world.py: which replica a selection goes to, and moe_ffn with values and gradients.

    python tests/gpu/launch.py 8 tests/gpu/placement_suite.py [check ..]
    WIDEEP_CPU_RANKS=4 python tests/gpu/placement_suite.py

No collective of XLA's own takes part, so ranks may share a GPU; `move` does use them, and runs where it is asked for.
"""

from __future__ import annotations

import collections
import sys

import jax
import jax.numpy as jnp
import moe_suite
import numpy as np
import oracle
from world import AXIS, World

import jax_wideep as wep


def logical_experts(world: World) -> int:
    """A quarter of the places is for replicas, where there are enough."""
    return max(moe_suite.TOP_K, 3 * moe_suite.LOCAL_EXPERTS * world.num_ranks // 4)


def draw_topk_idx(world: World, seed: int, tokens: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    experts = logical_experts(world)
    return oracle.random_topk(rng, world.num_ranks, tokens, experts, moe_suite.TOP_K, kind=kind, masked=0.1)


def place(world: World, topk_idx: np.ndarray) -> wep.Placement:
    load = np.bincount(topk_idx[topk_idx >= 0], minlength=logical_experts(world))
    return wep.compute_placement(load, moe_suite.LOCAL_EXPERTS * world.num_ranks, world.num_ranks)


def expected_physical(placement: wep.Placement, topk_idx: np.ndarray) -> np.ndarray:
    """[ranks, tokens, k] by counting one selection after the other."""
    places = [np.flatnonzero(placement.logical_of_physical == e) for e in range(placement.num_experts)]
    physical = np.full_like(topk_idx, -1)
    for rank, of_rank in enumerate(topk_idx):
        seen: collections.Counter[int] = collections.Counter()
        for at in np.ndindex(of_rank.shape):
            expert = int(of_rank[at])
            if expert >= 0:
                physical[rank][at] = places[expert][(rank + seen[expert]) % len(places[expert])]
                seen[expert] += 1
    return physical


def check_replicas(world: World) -> None:
    """Small batches and one of 4096 tokens; one compiled function for all placements of a size."""
    for tokens in (0, 1, 128, 4096):
        choose = None
        for seed, kind in enumerate(("zipf", "hot", "uniform")):
            topk_idx = draw_topk_idx(world, seed, tokens, kind)
            placement = place(world, topk_idx)
            if choose is None:

                def on_one_rank(idx, *arrays):
                    one = wep.Placement(*(array[0] for array in arrays))
                    return one.to_physical(idx, jax.lax.axis_index(AXIS))

                choose = world.on_ranks(on_one_rank)
            arrays = (placement.logical_of_physical, placement.replicas, placement.physical_of_logical)
            copies = [world.put(np.broadcast_to(a, (world.num_ranks, 1, *a.shape))) for a in arrays]
            got = world.local(choose(world.put(topk_idx), *copies))
            want = expected_physical(placement, topk_idx)
            for rank, mine in got.items():
                np.testing.assert_array_equal(
                    mine, want[rank], err_msg=f"{tokens} tokens, {kind}, rank {rank}"
                )
        assert choose is not None and choose._cache_size() == 1


def check_moe(world: World) -> None:
    """The outputs and gradients of a layer whose experts are the physical ones."""
    cases = [
        (jnp.bfloat16, {}),
        (jnp.float32, {"overflow": "spill", "capacity": moe_suite.TOKENS * moe_suite.TOP_K}),
        (jnp.bfloat16, {"mode": "low_latency", "quantize": None, "return_stats": False}),
    ]
    for dtype, options in cases:
        for seed, kind in enumerate(("zipf", "hot")):
            topk_idx = draw_topk_idx(world, seed, moe_suite.TOKENS, kind)
            placement = place(world, topk_idx)
            x, weights, wi, wo, cotangent, _ = moe_suite.draw(world, seed, dtype)
            table = placement.logical_of_physical.reshape(world.num_ranks, -1)
            wi, wo = (w.reshape(-1, *w.shape[2:])[table] for w in (wi, wo))
            physical = expected_physical(placement, topk_idx)
            with moe_suite.group_of(world) as group:
                step = moe_suite.make_step(world, group, placement=placement, **options)

                def with_logical(*arguments, step=step, topk_idx=topk_idx):
                    return step(*arguments[:-1], world.put(topk_idx))

                arrays = (x, weights, wi, wo, cotangent, physical)
                moe_suite.check_step(world, with_logical, arrays, dtype, f"{options}, {kind}")
                group.check()


def check_move(world: World) -> None:
    """There and back, bit by bit; uses XLA's collectives."""
    rng = np.random.default_rng(0)
    first, second = (place(world, draw_topk_idx(world, seed, 64, "zipf")) for seed in (0, 1))
    values = rng.normal(size=(logical_experts(world), 33, 5)).astype(np.float32)
    with moe_suite.group_of(world) as group:

        def lay(placement: wep.Placement) -> np.ndarray:
            return values[placement.logical_of_physical].reshape(world.num_ranks, -1, 33, 5)

        moved = wep.move_experts(world.put(lay(first)), first, second, group)
        back = wep.move_experts(moved, second, first, group)
        for array, placement in ((moved, second), (back, first)):
            for rank, mine in world.local(array).items():
                np.testing.assert_array_equal(mine, lay(placement)[rank])


CHECKS = {"replicas": check_replicas, "moe": check_moe, "move": check_move}
DEFAULT = ("replicas", "moe")


def main() -> None:
    World().run(CHECKS, sys.argv[1:] or DEFAULT)


if __name__ == "__main__":
    main()
