"""One compiled call of grouped_matmul, many times over other rows, sizes and buffers. Prints the relative errors,
as JSON. test_grouped_matmul_gpu.py runs it with flags that have XLA capture and dump the program."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import jax_wideep as wep


@jax.jit
def captured_step(rows, w, group_sizes):
    return wep.grouped_matmul(rows, w, group_sizes, implementation="cuda")


random = np.random.default_rng(0)
w = jnp.asarray(random.normal(size=(4, 128, 256)), jnp.bfloat16)
wide_w = np.asarray(w, np.float64)
kept, errors = [], []
for sizes in (
    [700, 0, 0, 0],
    [1, 2, 3, 4],
    [0, 300, 300, 0],
    [0, 0, 0, 0],
    [175, 175, 175, 175],
    [0, 0, 0, 700],
):
    rows = np.full((700, 128), np.nan)
    filled = sum(sizes)
    rows[:filled] = random.normal(size=(filled, 128))
    rows = jnp.asarray(rows, jnp.bfloat16)
    out = captured_step(rows, w, jnp.asarray(sizes, jnp.int32))
    kept.append(out)  # so that the next call gets another buffer
    want = np.zeros((700, 256))
    owner = np.repeat(np.arange(4), sizes)
    want[:filled] = np.einsum("mk,mkn->mn", np.asarray(rows[:filled], np.float64), wide_w[owner])
    difference = np.linalg.norm(np.asarray(out, np.float64) - want)
    errors.append(float(difference / max(np.linalg.norm(want), 1e-30)) if filled else float(difference))
print(json.dumps(errors))
