"""moe_ffn on the ranks of world.py, against every expert on every token: spilled rounds, microbatches, chunks, remat.

    python tests/gpu/launch.py 8 tests/gpu/moe_suite.py [check ..]
    WIDEEP_CPU_RANKS=4 python tests/gpu/moe_suite.py

Every process computes what all ranks should get, values and gradients, and compares its own ranks' part. No collective
of XLA's own takes part, so ranks may share a GPU.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from world import World

import jax_wideep as wep

TOP_K, LOCAL_EXPERTS, TOKENS, HIDDEN, FFN = 4, 4, 37, 128, 64
# Of the largest value: bfloat16's products run on the library's own kernels, float32's on ragged_dot.
TOLERANCE = {jnp.float32: 2e-3, jnp.bfloat16: 4e-2}
ROUTINGS = (
    {"kind": "zipf", "masked": 0.1},
    {"kind": "hot"},
    {"kind": "empty"},
    {"kind": "uniform"},
    {"distinct": False, "masked": 0.3},
)
NAMES = ("out", "dx", "dweights", "dwi", "dwo")


def draw(world: World, seed: int, dtype, *, tokens: int = TOKENS, empty_rank: int | None = None, **routing):
    """x, topk_weights, wi, wo, cotangent and topk_idx of all ranks, the same in every process."""
    rng = np.random.default_rng(seed)
    ranks, experts = world.num_ranks, LOCAL_EXPERTS * world.num_ranks

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(ranks, *shape)).astype(np.float32)

    floats = [
        normal(tokens, HIDDEN),
        normal(tokens, TOP_K),
        normal(LOCAL_EXPERTS, HIDDEN, 2 * FFN) / HIDDEN**0.5,
        normal(LOCAL_EXPERTS, FFN, HIDDEN) / FFN**0.5,
        normal(tokens, HIDDEN),
    ]
    floats = [array.astype(jnp.dtype(dtype)) if i != 1 else array for i, array in enumerate(floats)]
    topk_idx = oracle.random_topk(rng, ranks, tokens, experts, TOP_K, **routing)
    if empty_rank is not None:
        topk_idx[empty_rank] = -1
    return *floats, topk_idx


def make_step(world, group, **options):
    """Output and gradients of moe_ffn, and what its statistics say of this rank; compiled once."""

    def body(x, weights, wi, wo, cotangent, topk_idx):
        def forward(x, weights, wi, wo):
            out, stats = wep.moe_ffn(x, topk_idx, weights, wi, wo, group, **options)
            counts = () if stats is None else (stats.spilled[None], stats.overflow[None])
            return out, counts

        out, backward, counts = jax.vjp(forward, x, weights, wi, wo, has_aux=True)
        return out, *backward(cotangent), *counts

    return world.on_ranks(body)


@functools.cache
def dense_step():
    def swiglu(h):
        gate, up = jnp.split(h, 2, axis=-1)
        return jax.nn.silu(gate) * up

    def step(x, weights, wi, wo, cotangent, topk_idx):
        with jax.default_matmul_precision("highest"):
            forward = functools.partial(oracle.dense_moe, activate=swiglu)
            out, backward = jax.vjp(lambda x, w, wi, wo: forward(x, topk_idx, w, wi, wo), x, weights, wi, wo)
            return out, *backward(cotangent)

    return jax.jit(step)


def expected(world, arrays):
    """[ranks, ..] of the output and of each gradient, in float32."""
    flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
    wide = [np.asarray(array, np.float32) for array in flat[:-1]]
    want = dense_step()(*wide, flat[-1])
    return [np.asarray(a).reshape(world.num_ranks, -1, *a.shape[1:]) for a in want]


def check_step(world, step, arrays, dtype, what):
    """Runs the step and compares this process's ranks; returns their statistics."""
    got = step(*map(world.put, arrays))
    for name, array, want in zip(NAMES, got, expected(world, arrays), strict=False):
        scale = max(np.abs(want).max(), 1e-6)
        for rank, mine in world.local(array).items():
            np.testing.assert_allclose(
                np.asarray(mine, np.float32),
                want[rank],
                rtol=0,
                atol=TOLERANCE[dtype] * scale,
                err_msg=f"{what}: {name} of rank {rank}",
            )
    return [world.local(array) for array in got[len(NAMES) :]]


def rows_per_rank(world, topk_idx):
    hosts = topk_idx[topk_idx >= 0] // LOCAL_EXPERTS
    return np.bincount(hosts, minlength=world.num_ranks)


def group_of(world, **more):
    settings = {"num_experts": LOCAL_EXPERTS * world.num_ranks, "top_k": TOP_K, "hidden": HIDDEN, **more}
    return world.group(**settings)


# ---- checks ----


def check_spill(world):
    """Any skew and capacity, one compiled step for all skews; with mapped buffers and through the rings."""
    mean = TOKENS * TOP_K
    cases = [
        (jnp.bfloat16, mean + mean // 4, {}),
        (jnp.bfloat16, 40, {}),
        (jnp.float32, mean, {}),
        (jnp.float32, 9, {"zero_copy": "off"}),
        (jnp.bfloat16, world.num_ranks * mean, {}),  # nothing can spill
    ]
    for dtype, capacity, settings in cases:
        with group_of(world, **settings) as group:
            step = make_step(world, group, overflow="spill", capacity=capacity)
            for seed, routing in enumerate((*ROUTINGS, {"kind": "zipf", "empty_rank": 0})):
                arrays = draw(world, seed, dtype, **routing)
                what = f"capacity {capacity}, {routing}"
                spilled, overflow = check_step(world, step, arrays, dtype, what)
                rows = rows_per_rank(world, arrays[-1])
                for rank in world.local_ranks:
                    assert spilled[rank] == max(0, rows[rank] - capacity), (
                        what,
                        rank,
                        spilled[rank],
                        rows[rank],
                    )
                    assert overflow[rank] == 0
            assert step._cache_size() == 1
            group.check()


def check_repeats(world, repeats=30):
    """The same bits, while steps that spill and steps that do not take turns."""
    with group_of(world) as group:
        step = make_step(world, group, overflow="spill", capacity=TOKENS * TOP_K)
        inputs = [
            [world.put(array) for array in draw(world, seed, jnp.bfloat16, kind=kind)]
            for seed, kind in enumerate(("hot", "uniform"))
        ]
        first: dict[int, list[bytes]] = {}
        for number in range(2 * repeats):
            leaves = [world.local(leaf) for leaf in step(*inputs[number % 2])]
            got = [leaf[rank].tobytes() for leaf in leaves for rank in world.local_ranks]
            assert got == first.setdefault(number % 2, got)
        group.check()


def check_microbatches(world):
    cases = [
        {"microbatches": 2},
        {"microbatches": 3, "overflow": "spill", "capacity": TOKENS * TOP_K // 2},
        {"microbatches": 2, "mode": "low_latency", "quantize": None, "return_stats": False},
        {"microbatches": 2, "mode": "low_latency", "return_stats": False},
    ]
    for options in cases:
        dtype = jnp.bfloat16
        for tokens in (TOKENS, 1):
            with group_of(world, chunk=TOKENS // 4) as group:  # three calls of two each, or one alone
                step = make_step(world, group, **options)
                for seed, routing in enumerate(ROUTINGS[:4]):
                    arrays = draw(world, seed, dtype, tokens=tokens, **routing)
                    if options.get("mode") == "low_latency" and "quantize" not in options:
                        q, scales = oracle.quantize(np.asarray(arrays[0], np.float32))
                        # The wire carries x rounded to FP8, and gradients pass it straight through.
                        arrays = (oracle.dequantize(q, scales, arrays[0].dtype), *arrays[1:])
                    check_step(world, step, arrays, dtype, f"{options}, {routing}")
                group.check()


def check_memory_options(world):
    mean = TOKENS * TOP_K
    cases = [
        {"remat": "hidden"},
        {"remat": "all"},
        {"expert_chunk": 50},
        {"expert_chunk": 50, "remat": "all", "overflow": "spill", "capacity": mean // 2, "microbatches": 2},
    ]
    for dtype in (jnp.bfloat16, jnp.float32):
        for options in cases:
            with group_of(world) as group:
                step = make_step(world, group, **options)
                for seed, routing in enumerate(ROUTINGS[:3]):
                    check_step(
                        world, step, draw(world, seed, dtype, **routing), dtype, f"{options}, {routing}"
                    )
                group.check()


CHECKS = {
    "spill": check_spill,
    "repeats": check_repeats,
    "microbatches": check_microbatches,
    "memory_options": check_memory_options,
}


def main() -> None:
    World().run(CHECKS, sys.argv[1:] or CHECKS)


if __name__ == "__main__":
    main()
