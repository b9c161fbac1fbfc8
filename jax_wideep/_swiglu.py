"""The experts' SwiGLU: on Hopper GPUs by a kernel of our own that reads the group sizes, so that rows past a
group's end cost nothing; the rows that a rank can receive are many times those that it usually does.
And its clamped form, in XLA on every device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_wideep import _ffi, _kernels
from jax_wideep._types import Float, Int32
from jax_wideep.grouped_matmul import Choice, Implementation, by_platform, choose


def swiglu(hidden: Float[jax.Array, "*rows inner"]) -> Float[jax.Array, "*rows ffn"]:
    """silu(gate) * up (arXiv:2002.05202), for hidden = gate | up along the last axis."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """The activation of GPT-OSS: `gate * sigmoid(alpha * gate) * (up + 1)` after clamping; hashable.

    Attributes:
      alpha: steepness of the gate's sigmoid.
      limit: the gate is clamped to at most `limit`, `up` to [-limit, limit]. The gradient is 0 beyond.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, hidden: Float[jax.Array, "*rows inner"]) -> Float[jax.Array, "*rows ffn"]:
        gate, up = jnp.split(hidden, 2, axis=-1)
        # Not jnp.clip, whose gradient at the limit itself is a half.
        gate = jnp.where(gate > self.limit, self.limit, gate)
        up = jnp.where(up > self.limit, self.limit, jnp.where(up < -self.limit, -self.limit, up))
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


def swiglu_of_groups(
    hidden: Float[jax.Array, "*rows inner"],
    group_sizes: Int32[jax.Array, " groups"],
    implementation: Implementation,
) -> Float[jax.Array, "*rows ffn"]:
    """swiglu of rows as grouped_matmul takes them; unspecified, with its gradient, on rows of no group.

    The kernel computes in float32 and rounds once.
    """
    choice = choose("swiglu", implementation, hidden.dtype, hidden.shape[-1] // 2, 8)
    if choice not in ("auto", "cuda"):
        return swiglu(hidden)
    return _swiglu(*_ffi.vary([hidden, group_sizes]), choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _swiglu(hidden: jax.Array, group_sizes: jax.Array, choice: Choice) -> jax.Array:
    def plain(hidden: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return swiglu(hidden)

    return by_platform(choice, _kernels.swiglu, plain, plain, hidden, group_sizes)


def _swiglu_fwd(hidden, group_sizes, choice):
    return _swiglu(hidden, group_sizes, choice), (hidden, group_sizes)


def _swiglu_bwd(choice, residuals, dout):
    def plain(hidden: jax.Array, dout: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return jax.vjp(swiglu, hidden)[1](dout)[0]

    hidden, group_sizes = residuals
    return by_platform(choice, _kernels.swiglu_grad, plain, plain, hidden, dout, group_sizes), None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
