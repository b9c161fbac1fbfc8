"""A bias per expert, added to rows in groups."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_wideep import _ffi
from jax_wideep._types import Float, Int32
from jax_wideep.grouped_matmul import Implementation, grouped_matmul_weight_grad


def add_expert_bias(
    rows: Float[jax.Array, "*rows n"],
    bias: Float[jax.Array, "groups n"],
    group_sizes: Int32[jax.Array, " groups"],
    implementation: Implementation,
) -> Float[jax.Array, "*rows n"]:
    """Rows as grouped_matmul takes them, each plus its group's bias; unspecified, with their gradient, on rows of no
    group, whose cotangents do not reach the bias."""
    rows, bias, group_sizes = _ffi.vary([rows, bias, group_sizes])
    return _add(rows, bias, group_sizes, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _add(
    rows: jax.Array, bias: jax.Array, group_sizes: jax.Array, implementation: Implementation
) -> jax.Array:
    bias = bias.astype(rows.dtype)
    if rows.ndim == 3:
        return rows + bias[:, None, :]
    ends = jnp.cumsum(group_sizes)
    group_of_row = jnp.sum(jnp.arange(rows.shape[0])[:, None] >= ends, axis=1)
    return rows + jnp.take(bias, group_of_row, axis=0, mode="clip")


def _add_fwd(
    rows: jax.Array, bias: jax.Array, group_sizes: jax.Array, implementation: Implementation
) -> tuple[jax.Array, Any]:
    # An empty array carries the bias's dtype to the backward pass.
    return _add(rows, bias, group_sizes, implementation), (group_sizes, bias[:0])


def _add_bwd(
    implementation: Implementation, residuals: Any, dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    group_sizes, like_bias = residuals
    # Each group's sum of dout, which is ones^T @ dout: accumulated in float32 and blind to rows of no group, as the
    # gradient of the experts' matrices is. Eight columns of ones are the fewest that every implementation takes.
    ones = jnp.ones((*dout.shape[:-1], 8), dout.dtype)
    sums = grouped_matmul_weight_grad(
        ones, dout, group_sizes, implementation=implementation, preferred_element_type=jnp.float32
    )
    return dout, sums[:, 0].astype(like_bias.dtype), None


_add.defvjp(_add_fwd, _add_bwd)
