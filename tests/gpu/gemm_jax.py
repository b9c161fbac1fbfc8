"""The grouped GEMM's handlers under JAX on a GPU: values and gradients under jit, scan and remat, and speed
beside `jax.lax.ragged_dot`.

    XLA_FLAGS=--xla_gpu_graph_min_graph_size=1 \\
        python tests/gpu/gemm_jax.py FOLDER_OF_WIDEEP_CUDA [--time [--ragged-dot]]

The flag has XLA put even a single call into a command buffer.

It calls the handlers directly, so that it needs the CUDA module and nothing else of the package.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, sys.argv[1])
import _wideep_cuda

for _target, _handler in _wideep_cuda.handlers().items():
    if "grouped_matmul" in _target:
        jax.ffi.register_ffi_target(_target, _handler, platform="CUDA")


def _call(
    target: str, out: jax.ShapeDtypeStruct, groups: int, *operands: jax.Array, **attrs: object
) -> jax.Array:
    workspace = jax.ShapeDtypeStruct((_wideep_cuda.grouped_matmul_workspace_bytes(groups),), jnp.uint8)
    return jax.ffi.ffi_call(target, (out, workspace))(*operands, **attrs)[0]


def multiply(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose_w: bool = False) -> jax.Array:
    out = jax.ShapeDtypeStruct((*rows.shape[:-1], w.shape[1 if transpose_w else 2]), rows.dtype)
    attrs = dict(transpose_w=transpose_w, zero_tail=True)
    return _call("wideep_grouped_matmul", out, w.shape[0], rows, w, group_sizes, **attrs)


def weight_grad(rows: jax.Array, dout: jax.Array, group_sizes: jax.Array, dtype: object) -> jax.Array:
    out = jax.ShapeDtypeStruct((group_sizes.shape[0], rows.shape[-1], dout.shape[-1]), dtype)
    return _call("wideep_grouped_matmul_weight_grad", out, group_sizes.shape[0], rows, dout, group_sizes)


@jax.custom_vjp
def grouped_matmul(rows: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return multiply(rows, w, group_sizes)


def _forward(rows, w, group_sizes):
    return multiply(rows, w, group_sizes), (rows, w, group_sizes)


def _backward(residuals, dout):
    rows, w, group_sizes = residuals
    drows = multiply(dout, w, group_sizes, transpose_w=True)
    return drows, weight_grad(rows, dout, group_sizes, w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def reference(rows: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    out = np.zeros((*rows.shape[:-1], w.shape[2]))
    begin = 0
    for group, size in enumerate(sizes):
        if rows.ndim == 3:
            out[group, :size] = rows[group, :size] @ w[group]
        else:
            out[begin : begin + size] = rows[begin : begin + size] @ w[group]
            begin += size
    return out


def wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def check(name: str, got: np.ndarray, expected: np.ndarray, bound: float = 6e-3) -> None:
    norm = np.linalg.norm(expected)
    error = np.linalg.norm(got - expected) / norm if norm else np.abs(got).max(initial=0)
    print(f"{'ok    ' if error <= bound else 'FAILED'} {name}: {error:.1e}", flush=True)
    if not error <= bound:
        sys.exit(1)


def check_values(dtype: object, padded: bool) -> None:
    random = np.random.default_rng(0)
    groups, cap, k, n = 6, 160, 192, 328
    name = f"{jnp.dtype(dtype).name} {'padded' if padded else 'packed'}"
    shape = (groups, cap, k) if padded else (500, k)
    rows, w = (jnp.asarray(random.standard_normal(s), dtype) for s in (shape, (groups, k, n)))
    loss_weights = jnp.asarray(random.standard_normal((*shape[:-1], n)), dtype)

    def loss(f, rows, w, sizes):
        return jnp.sum((f(rows, w, sizes) * loss_weights).astype(jnp.float32))

    for sizes in ([60, 0, 1, 130, 77, 100], [0] * 6, [0, 0, 160, 0, 0, 0]):
        group_sizes = jnp.asarray(sizes, jnp.int32)
        expected = reference(wide(rows), wide(w), np.asarray(sizes))
        check(f"{name} {sizes} jit", wide(jax.jit(grouped_matmul)(rows, w, group_sizes)), expected)
        for kind, f in {"grad": grouped_matmul, "remat grad": jax.checkpoint(grouped_matmul)}.items():
            drows, dw = jax.jit(jax.grad(partial(loss, f), (0, 1)))(rows, w, group_sizes)
            swapped = reference(wide(loss_weights), wide(w).transpose(0, 2, 1), np.asarray(sizes))
            check(f"{name} {sizes} {kind} rows", wide(drows), swapped)
            expected_dw, begin = np.zeros((groups, k, n)), 0
            for group, size in enumerate(sizes):
                pick = (group, slice(0, size)) if padded else slice(begin, begin + size)
                expected_dw[group] = wide(rows)[pick].T @ wide(loss_weights)[pick]
                begin += size
            check(f"{name} {sizes} {kind} w", wide(dw), expected_dw)

    # Sizes that change from step to step of one loop: nothing about them may be fixed in a captured graph.
    all_sizes = random.multinomial(150 if padded else 450, np.ones(groups) / groups, size=8).astype(np.int32)
    outs = jax.jit(lambda s: jax.lax.scan(lambda c, x: (c, grouped_matmul(rows, w, x)), 0, s)[1])(all_sizes)
    for step, sizes in enumerate(all_sizes):
        check(f"{name} scan step {step}", wide(outs[step]), reference(wide(rows), wide(w), sizes))


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
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def measure(m: int, k: int, n: int, groups: int, with_ragged_dot: bool) -> None:
    """Each product beside one cuBLAS product of the same total, and XLA's batched product of equal groups."""
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

    def report(product, times):
        tflops = {name: 2e-6 * m * k * n / us for name, us in times.items()}
        line = ", ".join(f"{name} {times[name]:.0f} us {tflops[name]:.0f} TFLOP/s" for name in times)
        share = f"{tflops['wideep'] / tflops['dense']:.2f} x dense" if "dense" in times else ""
        print(f"{m} {k} {n} {groups} {product}: {line}; {share}", flush=True)

    wideep = {
        "forward": bind(multiply, rows, w, sizes),
        "input grad": bind(partial(multiply, transpose_w=True), dout, w, sizes),
        "weight grad": bind(partial(weight_grad, dtype=jnp.bfloat16), rows, dout, sizes),
    }
    dense = {
        "forward": bind(jnp.dot, rows, w0),
        "input grad": bind(lambda x, v: x @ v.T, dout, w0),
        "weight grad": bind(lambda x, y: x.T @ y, rows, dout),
    }
    batched = {
        "forward": bind(partial(jnp.einsum, "gmk,gkn->gmn"), rows_3d, w),
        "input grad": bind(partial(jnp.einsum, "gmn,gkn->gmk"), dout_3d, w),
        "weight grad": bind(partial(jnp.einsum, "gmk,gmn->gkn"), rows_3d, dout_3d),
    }
    for product in wideep:
        calls = {"wideep": wideep[product], "dense": dense[product], "batched": batched[product]}
        report(product, microseconds(calls))
    if with_ragged_dot:
        report("forward", microseconds({"ragged_dot": bind(jax.lax.ragged_dot, rows, w, sizes)}, repeats=1))


if __name__ == "__main__":
    for _dtype in (jnp.bfloat16, jnp.float16):
        for _padded in (False, True):
            check_values(_dtype, _padded)
    if "--time" in sys.argv:
        for _shape in (
            (8192, 7168, 4096, 32),
            (32768, 7168, 4096, 32),
            (32768, 2048, 7168, 32),
            (32768, 2048, 1536, 16),
        ):
            measure(*_shape, with_ragged_dot="--ragged-dot" in sys.argv)
