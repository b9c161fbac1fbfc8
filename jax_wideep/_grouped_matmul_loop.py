"""grouped_matmul's implementation "loop": tiles of rows, one after the other, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_wideep import _ffi

# Rows of a tile. Large enough that reading an expert's matrix is paid for, small enough that the last tile of
# an expert wastes little.
_TILE_ROWS = 128


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


def product(
    rows: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose_w: bool, out_dtype: Any, zero_tail: bool
) -> jax.Array:
    """rows times w[group], or times its transpose; the tail is zero in any case."""
    del zero_tail
    contract_w = 1 if transpose_w else 0
    n_out = w.shape[2 - contract_w]
    tile, first_row = _tiles(rows, group_sizes)
    flat = rows.reshape(-1, rows.shape[-1])
    out = _ffi.vary([jnp.zeros((flat.shape[0], n_out), out_dtype), group_sizes])[0]
    if tile == 0:
        return out.reshape(*rows.shape[:-1], n_out)

    def one_group(group: jax.Array, out: jax.Array) -> jax.Array:
        matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        start, size = first_row[group], group_sizes[group]

        def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
            first, mine = _tile_at(flat, start + i * tile, start + size, tile)
            piece = jax.lax.dynamic_slice_in_dim(flat, first, tile)
            dot = jax.lax.dot_general(
                piece, matrix, (((1,), (contract_w,)), ((), ())), preferred_element_type=jnp.float32
            )
            before = jax.lax.dynamic_slice_in_dim(out, first, tile)
            dot = jnp.where(mine, dot.astype(out.dtype), before)
            return jax.lax.dynamic_update_slice_in_dim(out, dot, first, axis=0)

        return jax.lax.fori_loop(0, -(-size // tile), one_tile, out)

    out = jax.lax.fori_loop(0, w.shape[0], one_group, out)
    return out.reshape(*rows.shape[:-1], n_out)


def weight_grad(rows: jax.Array, dout: jax.Array, group_sizes: jax.Array, out_dtype: Any) -> jax.Array:
    """[groups, n_in, n_out]: each group's rows^T @ dout; zero for an empty group."""
    n_in, n_out = rows.shape[-1], dout.shape[-1]
    tile, first_row = _tiles(rows, group_sizes)
    flat, dflat = rows.reshape(-1, n_in), dout.reshape(-1, n_out)
    zero = _ffi.vary([jnp.zeros((n_in, n_out), jnp.float32), group_sizes])[0]
    if tile == 0:
        return jnp.broadcast_to(zero, (group_sizes.shape[0], n_in, n_out)).astype(out_dtype)

    def one_group(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, size = bounds

        def one_tile(i: jax.Array, total: jax.Array) -> jax.Array:
            first, mine = _tile_at(flat, start + i * tile, start + size, tile)
            piece = jnp.where(mine, jax.lax.dynamic_slice_in_dim(flat, first, tile), 0)
            dpiece = jnp.where(mine, jax.lax.dynamic_slice_in_dim(dflat, first, tile), 0)
            return total + jax.lax.dot_general(
                piece, dpiece, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        return jax.lax.fori_loop(0, -(-size // tile), one_tile, zero).astype(out_dtype)

    return jax.lax.map(one_group, (first_row, group_sizes))
