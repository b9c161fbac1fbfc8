"""grouped_matmul: each expert's rows times its own matrix, and its gradients.

Implementations:
  "loop"  tiles of rows, one after the other, each with its expert's matrix; the number of tiles follows the
          group sizes at run time, so empty capacity costs nothing. The choice on CPU, where `ragged_dot`
          multiplies every row with every expert's matrix.
  "xla"   `jax.lax.ragged_dot`, on any device.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_wideep import _check, _ffi
from jax_wideep._types import Float, Int32

Implementation = Literal["auto", "loop", "xla"]

# Rows of a tile. Large enough that reading an expert's matrix is paid for, small enough that the last tile of
# an expert wastes little.
_TILE_ROWS = 128


def grouped_matmul(
    rows: Float[jax.Array, "*rows n_in"],
    w: Float[jax.Array, "groups n_in n_out"],
    group_sizes: Int32[jax.Array, " groups"],
    *,
    implementation: Implementation = "auto",
) -> Float[jax.Array, "*rows n_out"]:
    """Multiplies each group of rows with its own matrix, accumulating in float32.

    Args:
      rows: [m, n_in], groups one after the other, as `jax.lax.ragged_dot` takes them; or the padded form
        [groups, m, n_in], each group's rows at the front of its slab. bfloat16, float16 or float32.
      w: one matrix per group, same dtype.
      group_sizes: rows of each group; their sum is at most m (2-D), or each is at most m (3-D).
      implementation: see the module; "auto" is "loop" on CPU and "xla" elsewhere.

    Returns:
      Products in the shape and dtype of rows. Rows that belong to no group give zeros, and what they hold is
      ignored, in values and gradients.

    Raises:
      ValueError: for arguments of the wrong shape or dtype.
    """
    op = "grouped_matmul"
    if jnp.ndim(rows) not in (2, 3):
        raise ValueError(f"{op}: rows: expected [m, n_in] or [groups, m, n_in], got {list(jnp.shape(rows))}")
    _check.shape(op, "w", w, ("groups", rows.shape[-1], "n_out"), "n_in is the last size of rows")
    _check.shape(op, "group_sizes", group_sizes, (w.shape[0],), "one size per matrix of w")
    _check.dtype(op, "group_sizes", group_sizes, (jnp.int32,), "use .astype(jnp.int32)")
    _check.dtype(op, "rows", rows, _check.ROW_DTYPES)
    _check.dtype(op, "w", w, (rows.dtype,), "cast rows and w to one dtype")
    if rows.ndim == 3:
        _check.shape(op, "rows", rows, (w.shape[0], "m", rows.shape[2]), "one slab per matrix of w")
    if implementation not in ("auto", "loop", "xla"):
        raise ValueError(f"{op}: implementation: expected 'auto', 'loop' or 'xla', got {implementation!r}")
    rows, w, group_sizes = _ffi.vary([rows, w, group_sizes])
    if implementation == "xla":
        return _with_ragged_dot(rows, w, group_sizes)
    if implementation == "loop":
        return _with_loop(rows, w, group_sizes)
    return jax.lax.platform_dependent(rows, w, group_sizes, cpu=_with_loop, default=_with_ragged_dot)


# ---- xla ----


def _with_ragged_dot(rows: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    if rows.ndim == 3:
        filled = jnp.arange(rows.shape[1])[None, :, None] < group_sizes[:, None, None]
        rows = jnp.where(filled, rows, 0)
        return jnp.einsum("gmk,gkn->gmn", rows, w, preferred_element_type=jnp.float32).astype(rows.dtype)
    # What past rows hold may be anything; zeros keep a NaN there out of every product.
    filled = jnp.arange(rows.shape[0])[:, None] < jnp.sum(group_sizes)
    rows = jnp.where(filled, rows, 0)
    out = jax.lax.ragged_dot(rows, w, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(filled, out, 0).astype(rows.dtype)


# ---- loop ----


@jax.custom_vjp
def _with_loop(rows: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _multiply(rows, w, group_sizes, contract_w=0)


def _with_loop_fwd(rows: jax.Array, w: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _with_loop(rows, w, group_sizes), (rows, w, group_sizes)


def _with_loop_bwd(residuals: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, w, group_sizes = residuals
    return _multiply(dout, w, group_sizes, contract_w=1), _outer(rows, dout, group_sizes).astype(w.dtype), None


_with_loop.defvjp(_with_loop_fwd, _with_loop_bwd)


def _tiles(rows: jax.Array, group_sizes: jax.Array) -> tuple[int, jax.Array]:
    """Rows of a tile, and the first row of every group, counted through all slabs of a padded form."""
    if rows.ndim == 3:
        return min(_TILE_ROWS, rows.shape[1]), jnp.arange(rows.shape[0], dtype=jnp.int32) * rows.shape[1]
    return min(_TILE_ROWS, rows.shape[0]), (jnp.cumsum(group_sizes) - group_sizes).astype(jnp.int32)


def _tile_at(flat: jax.Array, start: jax.Array, end: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """The first row of the tile that covers [start, min(start + tile, end)), and which of its rows do.

    A tile at the end of the array begins earlier, so that it lies inside.
    """
    first = jnp.minimum(start, flat.shape[0] - tile)
    row = first + jnp.arange(tile, dtype=jnp.int32)
    return first, ((row >= start) & (row < jnp.minimum(start + tile, end)))[:, None]


def _multiply(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, contract_w: int) -> jax.Array:
    """rows times w[group], contracting dimension `contract_w` of each matrix."""
    n_out = w.shape[2 - contract_w]
    tile, first_row = _tiles(rows, group_sizes)
    flat = rows.reshape(-1, rows.shape[-1])
    out = _ffi.vary([jnp.zeros((flat.shape[0], n_out), rows.dtype), group_sizes])[0]
    if tile == 0:
        return out.reshape(*rows.shape[:-1], n_out)

    def one_group(group: jax.Array, out: jax.Array) -> jax.Array:
        matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        start, size = first_row[group], group_sizes[group]

        def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
            first, mine = _tile_at(flat, start + i * tile, start + size, tile)
            piece = jax.lax.dynamic_slice_in_dim(flat, first, tile)
            product = jax.lax.dot_general(
                piece, matrix, (((1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32
            )
            before = jax.lax.dynamic_slice_in_dim(out, first, tile)
            product = jnp.where(mine, product.astype(out.dtype), before)
            return jax.lax.dynamic_update_slice_in_dim(out, product, first, axis=0)

        return jax.lax.fori_loop(0, -(-size // tile), one_tile, out)

    out = jax.lax.fori_loop(0, w.shape[0], one_group, out)
    return out.reshape(*rows.shape[:-1], n_out)


def _outer(rows: jax.Array, dout: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """float32 [groups, n_in, n_out]: each group's rows^T @ dout; zero for an empty group."""
    n_in, n_out = rows.shape[-1], dout.shape[-1]
    tile, first_row = _tiles(rows, group_sizes)
    flat, dflat = rows.reshape(-1, n_in), dout.reshape(-1, n_out)
    zero = _ffi.vary([jnp.zeros((n_in, n_out), jnp.float32), group_sizes])[0]
    if tile == 0:
        return jnp.broadcast_to(zero, (group_sizes.shape[0], n_in, n_out))

    def one_group(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, size = bounds

        def one_tile(i: jax.Array, total: jax.Array) -> jax.Array:
            first, mine = _tile_at(flat, start + i * tile, start + size, tile)
            piece = jnp.where(mine, jax.lax.dynamic_slice_in_dim(flat, first, tile), 0)
            dpiece = jnp.where(mine, jax.lax.dynamic_slice_in_dim(dflat, first, tile), 0)
            return total + jax.lax.dot_general(
                piece, dpiece, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        return jax.lax.fori_loop(0, -(-size // tile), one_tile, zero)

    return jax.lax.map(one_group, (first_row, group_sizes))
