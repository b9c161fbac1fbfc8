"""grouped_matmul: each expert's rows times its own matrix, and its gradients.

Implementations:
  "cuda"  hand-written kernels for Hopper GPUs (compute capability 9.0): bfloat16 or float16 rows, n_in and n_out
          multiples of 8. Group sizes are read on the device.
  "loop"  tiles of rows, one after the other, each with its expert's matrix; the number of tiles follows the
          group sizes at run time, so empty capacity costs nothing. The choice on CPU, where `ragged_dot`
          multiplies every row with every expert's matrix.
  "xla"   `jax.lax.ragged_dot`, on any device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jax_wideep import _check, _ffi, _grouped_matmul_loop, _kernels
from jax_wideep._types import Float, Int32

Implementation = Literal["auto", "cuda", "loop", "xla"]

_BUILD_CUDA = "install with `pip install . -C cmake.define.WIDEEP_CUDA=ON`"


def grouped_matmul(
    rows: Float[jax.Array, "*rows n_in"],
    w: Float[jax.Array, "groups n_in n_out"],
    group_sizes: Int32[jax.Array, " groups"],
    *,
    implementation: Implementation = "auto",
    preferred_element_type: Any = None,
    zero_tail: bool = True,
) -> Float[jax.Array, "*rows n_out"]:
    """Multiplies each group of rows with its own matrix, accumulating in float32.

    Args:
      rows: [m, n_in], groups one after the other, as `jax.lax.ragged_dot` takes them; or the padded form
        [groups, m, n_in], each group's rows at the front of its slab. bfloat16, float16 or float32.
      w: one matrix per group, in the dtype of rows, or in float32: then it is rounded to the dtype of rows for the
        products, and its gradient comes in float32 without having been rounded, to be summed over microbatches.
      group_sizes: rows of each group; their sum is at most m (2-D), or each is at most m (3-D).
      implementation: see the module. "auto" is "loop" on CPU; on GPU "cuda" where it can be had, otherwise "xla",
        with one warning that says why.
      preferred_element_type: dtype of the output: that of rows (None), or float32. Its cotangent is rounded to the
        dtype of rows for the gradients.
      zero_tail: rows that belong to no group give zeros, in the output and in the gradient of rows; otherwise those
        are unspecified, which saves writing them.

    Returns:
      Products in the shape of rows. What rows that belong to no group hold is ignored, in values and gradients.

    Raises:
      ValueError: for arguments of the wrong shape or dtype, or that implementation "cuda" cannot take.
    """
    op = "grouped_matmul"
    _check_rows(op, rows)
    _check.shape(op, "w", w, ("groups", rows.shape[-1], "n_out"), "n_in is the last size of rows")
    _check.shape(op, "group_sizes", group_sizes, (w.shape[0],), "one size per matrix of w")
    _check.dtype(op, "group_sizes", group_sizes, (jnp.int32,), "use .astype(jnp.int32)")
    _check.dtype(op, "w", w, (rows.dtype, jnp.float32), "cast rows and w to one dtype")
    if rows.ndim == 3:
        _check.shape(op, "rows", rows, (w.shape[0], "m", rows.shape[2]), "one slab per matrix of w")
    out_dtype = _out_dtype(op, "preferred_element_type", preferred_element_type, rows)
    choice = choose(op, implementation, rows.dtype, rows.shape[-1], w.shape[2])
    rows, w, group_sizes = _ffi.vary([rows, w, group_sizes])
    return _grouped_matmul(rows, w, group_sizes, _Settings(choice, out_dtype, w.dtype, zero_tail))


def grouped_matmul_weight_grad(
    rows: Float[jax.Array, "*rows n_in"],
    dout: Float[jax.Array, "*rows n_out"],
    group_sizes: Int32[jax.Array, " groups"],
    *,
    implementation: Implementation = "auto",
    preferred_element_type: Any = None,
) -> Float[jax.Array, "groups n_in n_out"]:
    """The gradient of grouped_matmul's matrices: each group's rows^T @ dout, accumulated in float32.

    What `jax.grad` calls; for hand-written backward passes, such as one that sums float32 gradients over
    microbatches while the matrices are bfloat16. Not differentiable itself under implementation "cuda".

    Args:
      rows: as in grouped_matmul.
      dout: the output's cotangent, in the dtype of rows.
      group_sizes: as in grouped_matmul.
      implementation: as in grouped_matmul.
      preferred_element_type: dtype of the result: that of rows (None), or float32.

    Returns:
      One matrix per group, zero for a group without rows. Rows that belong to no group are ignored.

    Raises:
      ValueError: as grouped_matmul.
    """
    op = "grouped_matmul_weight_grad"
    _check_rows(op, rows)
    _check.shape(op, "dout", dout, (*rows.shape[:-1], "n_out"), "one row per row of rows")
    _check.dtype(op, "dout", dout, (rows.dtype,), "cast rows and dout to one dtype")
    _check.shape(op, "group_sizes", group_sizes, (rows.shape[0] if rows.ndim == 3 else "groups",))
    _check.dtype(op, "group_sizes", group_sizes, (jnp.int32,), "use .astype(jnp.int32)")
    out_dtype = _out_dtype(op, "preferred_element_type", preferred_element_type, rows)
    choice = choose(op, implementation, rows.dtype, rows.shape[-1], dout.shape[-1])
    rows, dout, group_sizes = _ffi.vary([rows, dout, group_sizes])
    return _weight_grad(choice, rows, dout, group_sizes, out_dtype=out_dtype)


def _check_rows(op: str, rows: Any) -> None:
    if jnp.ndim(rows) not in (2, 3):
        raise ValueError(f"{op}: rows: expected [m, n_in] or [groups, m, n_in], got {list(jnp.shape(rows))}")
    _check.dtype(op, "rows", rows, _check.ROW_DTYPES)


def _out_dtype(op: str, name: str, wanted: Any, rows: jax.Array) -> jnp.dtype:
    out_dtype = jnp.dtype(rows.dtype if wanted is None else wanted)
    if out_dtype not in (rows.dtype, jnp.float32):
        raise ValueError(
            f"{op}: {name}: expected None, {jnp.dtype(rows.dtype).name} as rows, or float32, got {out_dtype.name}; "
            "cast the result"
        )
    return out_dtype


# ---- the choice of implementation ----

# What choose() returns: "auto" is then "loop" on CPU, "cuda" on NVIDIA GPUs and "xla" elsewhere; "fallback" the
# same without "cuda".
Choice = Literal["auto", "fallback", "cuda", "loop", "xla"]


def choose(op: str, implementation: Implementation, dtype: Any, n_in: int, n_out: int) -> Choice:
    """What to compile for products of these sizes, on whatever device; warns once where "auto" is slow.

    Raises:
      ValueError: for an unknown implementation, or "cuda" where it cannot be had.
    """
    if implementation not in ("auto", "cuda", "loop", "xla"):
        raise ValueError(
            f"{op}: implementation: expected 'auto', 'cuda', 'loop' or 'xla', got {implementation!r}"
        )
    if implementation in ("loop", "xla"):
        return implementation
    problem = _cuda_problem(jnp.dtype(dtype), n_in, n_out)
    if problem is None:
        return implementation
    if implementation == "cuda":
        raise ValueError(f"{op}: implementation: 'cuda' {problem}")
    if _ffi.gpu_compute_capability() is not None:
        _warn_once(
            f"grouped_matmul uses jax.lax.ragged_dot, many times slower than its own kernel, which {problem}"
        )
    return "fallback"


def _cuda_problem(dtype: jnp.dtype, n_in: int, n_out: int) -> str | None:
    """Why the kernels cannot be used, if so. A machine without a GPU may compile for one that has."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16 rows, got {dtype.name}; cast them"
    if n_in % 8 or n_out % 8:
        return f"needs n_in and n_out that are multiples of 8, got {n_in} and {n_out}; pad them"
    capability = _ffi.gpu_compute_capability()
    if capability is not None and capability != "9.0":
        return f"needs GPUs of compute capability 9.0, got {capability}; use implementation='xla'"
    if capability is not None and _ffi.cuda_module() is None:
        return f"is not built; {_BUILD_CUDA}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def by_platform(choice: Choice, cuda: Callable, loop: Callable, xla: Callable, *operands: jax.Array) -> Any:
    """Calls the function of the implementation that `choice` stands for on the platform compiled for."""
    if choice == "auto":
        return jax.lax.platform_dependent(*operands, cpu=loop, cuda=cuda, default=xla)
    if choice == "fallback":
        return jax.lax.platform_dependent(*operands, cpu=loop, default=xla)
    return {"cuda": cuda, "loop": loop, "xla": xla}[choice](*operands)


# ---- value and gradient ----


class _Settings(NamedTuple):
    choice: Choice
    out_dtype: jnp.dtype
    w_dtype: jnp.dtype
    zero_tail: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(rows: jax.Array, w: jax.Array, group_sizes: jax.Array, settings: _Settings) -> jax.Array:
    return _grouped_matmul_fwd(rows, w, group_sizes, settings)[0]


def _grouped_matmul_fwd(
    rows: jax.Array, w: jax.Array, group_sizes: jax.Array, settings: _Settings
) -> tuple[jax.Array, Any]:
    w = w.astype(rows.dtype)
    product = _product_settings(settings, transpose_w=False, out_dtype=settings.out_dtype)
    return _product(settings.choice, rows, w, group_sizes, **product), (rows, w, group_sizes)


def _grouped_matmul_bwd(
    settings: _Settings, residuals: Any, dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, w, group_sizes = residuals
    dout = dout.astype(rows.dtype)
    product = _product_settings(settings, transpose_w=True, out_dtype=rows.dtype)
    drows = _product(settings.choice, dout, w, group_sizes, **product)
    return drows, _weight_grad(settings.choice, rows, dout, group_sizes, out_dtype=settings.w_dtype), None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _product(
    choice: Choice, rows: jax.Array, w: jax.Array, group_sizes: jax.Array, **settings: Any
) -> jax.Array:
    """rows times w[group], or times its transpose: transpose_w, out_dtype, zero_tail."""
    cuda, loop, xla = (
        functools.partial(product, **settings)
        for product in (_kernels.grouped_matmul, _grouped_matmul_loop.product, _xla_product)
    )
    return by_platform(choice, cuda, loop, xla, rows, w, group_sizes)


def _product_settings(settings: _Settings, transpose_w: bool, out_dtype: Any) -> dict[str, Any]:
    return {"transpose_w": transpose_w, "out_dtype": out_dtype, "zero_tail": settings.zero_tail}


def _weight_grad(
    choice: Choice, rows: jax.Array, dout: jax.Array, group_sizes: jax.Array, **settings: Any
) -> jax.Array:
    """Each group's rows^T @ dout: out_dtype."""
    cuda, loop, xla = (
        functools.partial(weight_grad, **settings)
        for weight_grad in (
            _kernels.grouped_matmul_weight_grad,
            _grouped_matmul_loop.weight_grad,
            _xla_weight_grad,
        )
    )
    return by_platform(choice, cuda, loop, xla, rows, dout, group_sizes)


# ---- xla ----


def _in_groups(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Whether a row belongs to a group, in the shape [.., 1] of rows."""
    if rows.ndim == 3:
        return jnp.arange(rows.shape[1])[None, :, None] < group_sizes[:, None, None]
    return jnp.arange(rows.shape[0])[:, None] < jnp.sum(group_sizes)


def _xla_product(
    rows: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose_w: bool, out_dtype: Any, zero_tail: bool
) -> jax.Array:
    del zero_tail  # the tail is always zero here
    # What rows of no group hold may be anything; zeros keep a NaN there out of every product.
    filled = _in_groups(rows, group_sizes)
    rows = jnp.where(filled, rows, 0)
    if rows.ndim == 3:
        equation = "gmn,gkn->gmk" if transpose_w else "gmk,gkn->gmn"
        return jnp.einsum(equation, rows, w, preferred_element_type=jnp.float32).astype(out_dtype)
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_w else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = jax.lax.ragged_dot_general(rows, w, group_sizes, dimensions, preferred_element_type=jnp.float32)
    return jnp.where(filled, out, 0).astype(out_dtype)


def _xla_weight_grad(rows: jax.Array, dout: jax.Array, group_sizes: jax.Array, out_dtype: Any) -> jax.Array:
    filled = _in_groups(rows, group_sizes)
    rows, dout = jnp.where(filled, rows, 0), jnp.where(filled, dout, 0)
    if rows.ndim == 3:
        return jnp.einsum("gmk,gmn->gkn", rows, dout, preferred_element_type=jnp.float32).astype(out_dtype)
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    dw = jax.lax.ragged_dot_general(rows, dout, group_sizes, dimensions, preferred_element_type=jnp.float32)
    return dw.astype(out_dtype)
