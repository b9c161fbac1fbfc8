"""FP8 block quantisation of the wire: float8_e4m3fn values with one float32 scale per 128 of them.

The block size and the format are those of DeepSeek-V3's activations (arXiv:2412.19437, section 3.3.2). The
compiled backends give the same bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_wideep._types import Float, Float32

#: Values that share one scale; hidden must be a multiple of it for an FP8 wire.
QUANT_BLOCK = 128

_FP8_MAX = 448.0  # largest finite float8_e4m3fn
_MIN_AMAX = 1e-30  # keeps the scale of an all-zero block positive


def quantize(
    x: Float[jax.Array, "tokens hidden"],
) -> tuple[jax.Array, Float32[jax.Array, "tokens blocks"]]:
    """Quantises rows to FP8.

        scale = max(max |x|, 1e-30) * (1/448),  q = round_to_nearest_even(x * (1/scale))

    A block that holds an infinity or a NaN dequantises to NaN throughout.

    Args:
      x: rows; hidden is a multiple of 128.

    Returns:
      q: float8_e4m3fn, shape of x.
      scales: float32 [tokens, hidden / 128].
    """
    tokens, hidden = x.shape
    blocks = x.astype(jnp.float32).reshape(tokens, hidden // QUANT_BLOCK, QUANT_BLOCK)
    # Magnitudes ordered as integers, where NaN is the largest: XLA's CPU maximum of floats may lose a NaN.
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(blocks), jnp.int32)
    floor = jnp.float32(_MIN_AMAX).view(jnp.int32)
    amax = jax.lax.bitcast_convert_type(jnp.maximum(jnp.max(magnitude, axis=2), floor), jnp.float32)
    scales = amax * jnp.float32(1 / _FP8_MAX)
    q = (blocks * (1 / scales)[:, :, None]).astype(jnp.float8_e4m3fn)
    return q.reshape(tokens, hidden), scales


def dequantize(q: jax.Array, scales: Float32[jax.Array, "*rows blocks"], dtype) -> jax.Array:
    """float32(q) * scale of its block, rounded to `dtype`.

    Args:
      q: float8_e4m3fn [..., hidden].
      scales: float32 [..., hidden / 128].
      dtype: of the result.
    """
    blocks = q.astype(jnp.float32).reshape(*scales.shape, QUANT_BLOCK) * scales[..., None]
    return blocks.reshape(q.shape).astype(dtype)
