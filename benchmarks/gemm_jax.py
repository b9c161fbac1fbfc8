"""Times grouped_matmul under JAX on a GPU, in turns with one dense product of the same total and with XLA's
batched product of equal groups.

    python benchmarks/gemm_jax.py [--ragged-dot]      JSON lines, us per call
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jax_wideep as wep

SHAPES = [(8192, 7168, 4096, 32), (32768, 7168, 4096, 32), (32768, 2048, 7168, 32), (32768, 2048, 1536, 16)]


def microseconds(calls: dict[str, Callable[[], jax.Array]], repeats: int = 10) -> dict[str, float]:
    """Median time of each, taken in turns: the clock falls with the power that went before."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(8):
        for name, call in calls.items():
            call().block_until_ready()
            begin = time.perf_counter()
            for _ in range(repeats):
                out = call()
            out.block_until_ready()
            if round_ > 0:
                times[name].append((time.perf_counter() - begin) / repeats * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(m: int, k: int, n: int, groups: int, with_ragged_dot: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (groups, k, n), jnp.bfloat16)
    dout = jax.random.normal(keys[2], (m, n), jnp.bfloat16)
    w0 = w[0]
    sizes = jnp.asarray(np.random.default_rng(0).multinomial(m, np.ones(groups) / groups), jnp.int32)
    rows_3d, dout_3d = rows.reshape(groups, -1, k), dout.reshape(groups, -1, n)

    def bind(f, *operands):
        compiled = jax.jit(f)
        return lambda: compiled(*operands)

    def input_grad(dout, w):
        return jax.vjp(lambda rows: wep.grouped_matmul(rows, w, sizes), rows)[1](dout)[0]

    calls = {
        "forward": {
            "wideep, under JAX": bind(wep.grouped_matmul, rows, w, sizes),
            "cuBLAS dense, under JAX": bind(jnp.dot, rows, w0),
            "XLA batched": bind(lambda x, v: jnp.einsum("gmk,gkn->gmn", x, v), rows_3d, w),
        },
        "input grad": {
            "wideep, under JAX": bind(input_grad, dout, w),
            "cuBLAS dense, under JAX": bind(lambda x, v: x @ v.T, dout, w0),
            "XLA batched": bind(lambda x, v: jnp.einsum("gmn,gkn->gmk", x, v), dout_3d, w),
        },
        "weight grad": {
            "wideep, under JAX": bind(wep.grouped_matmul_weight_grad, rows, dout, sizes),
            "cuBLAS dense, under JAX": bind(lambda x, y: x.T @ y, rows, dout),
            "XLA batched": bind(lambda x, y: jnp.einsum("gmk,gmn->gkn", x, y), rows_3d, dout_3d),
        },
    }
    times = {product: microseconds(programs) for product, programs in calls.items()}
    if with_ragged_dot:
        times["forward"] |= microseconds({"ragged_dot": bind(jax.lax.ragged_dot, rows, w, sizes)}, repeats=1)
    for product, programs in times.items():
        for program, us in programs.items():
            shape = {"m": m, "k": k, "n": n, "groups": groups, "sizes": "uniform"}
            print(
                json.dumps({"program": program, "product": product, **shape, "us": round(us, 1)}), flush=True
            )


if __name__ == "__main__":
    for _shape in SHAPES:
        measure(*_shape, with_ragged_dot="--ragged-dot" in sys.argv)
