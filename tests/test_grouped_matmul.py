"""grouped_matmul against float64 products in NumPy and, for gradients, against jax.lax.ragged_dot's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_wideep as wep

EPS = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}


def expected(rows, w, sizes):
    out = np.zeros((*rows.shape[:-1], w.shape[2]))
    start = 0
    for group, size in enumerate(sizes):
        if rows.ndim == 3:
            out[group, :size] = rows[group, :size].astype(np.float64) @ w[group].astype(np.float64)
        else:
            out[start : start + size] = rows[start : start + size].astype(np.float64) @ w[group].astype(
                np.float64
            )
        start += size
    return out


@given(data=st.data())
def test_values(data):
    groups = data.draw(st.integers(1, 5), "groups")
    m = data.draw(st.sampled_from([1, 7, 64, 300]), "m")
    padded = data.draw(st.booleans(), "padded")
    bound = m if padded else m // groups
    sizes = np.array(data.draw(st.lists(st.integers(0, bound), min_size=groups, max_size=groups)), np.int32)
    if data.draw(st.booleans(), "one group holds all"):
        sizes = np.zeros(groups, np.int32)
        sizes[data.draw(st.integers(0, groups - 1))] = m
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]), "dtype")
    implementation = data.draw(st.sampled_from(["auto", "loop", "xla"]), "implementation")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20), "seed"))
    rows = rng.normal(size=(groups, m, 16) if padded else (m, 16))
    w = rng.normal(size=(groups, 16, 24))
    rows, w = (np.asarray(jnp.asarray(a, dtype)) for a in (rows, w))
    want = expected(rows, w, sizes)
    # Rows of no group may hold anything.
    rows = rows.copy()
    for group in range(groups):
        if padded:
            rows[group, sizes[group] :] = np.nan
    if not padded:
        rows[sizes.sum() :] = np.nan
    run = jax.jit(lambda *a: wep.grouped_matmul(*a, implementation=implementation))
    out = run(rows, w, sizes)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=4 * EPS[dtype], atol=16 * EPS[dtype])


@pytest.mark.parametrize("implementation", ["loop", "xla"])
@pytest.mark.parametrize("shape", ["flat", "padded"])
@pytest.mark.parametrize("sizes", [[3, 0, 200, 50], [0, 0, 0, 0], [0, 0, 260, 0]])
def test_gradients(implementation, shape, sizes):
    """drows = dout @ w^T and dw = rows^T @ dout, group by group, in float64; zero outside of groups."""
    rng = np.random.default_rng(1)
    lead = (260,) if shape == "flat" else (4, 260)
    rows, w = rng.normal(size=(*lead, 16)), rng.normal(size=(4, 16, 24))
    dout = rng.normal(size=(*lead, 24))

    def run(rows, w):
        out = wep.grouped_matmul(rows, w, jnp.array(sizes, jnp.int32), implementation=implementation)
        return jnp.sum(out * jnp.asarray(dout, jnp.float32))

    drows, dw = jax.jit(jax.grad(run, argnums=(0, 1)))(
        jnp.asarray(rows, jnp.float32), jnp.asarray(w, jnp.float32)
    )
    want_drows = expected(dout, w.transpose(0, 2, 1), sizes)
    want_dw = np.zeros_like(w)
    start = 0
    for group, size in enumerate(sizes):
        at = (group, slice(0, size)) if shape == "padded" else slice(start, start + size)
        want_dw[group] = rows[at].T @ dout[at]
        start += size
    np.testing.assert_allclose(drows, want_drows, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-4)


def test_under_remat_vmap_and_scan():
    rng = np.random.default_rng(2)
    rows = jnp.asarray(rng.normal(size=(3, 40, 8)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(4, 8, 8)), jnp.float32)
    sizes = jnp.array([[10, 0, 20, 5], [0, 40, 0, 0], [1, 2, 3, 4]], jnp.int32)

    def one(rows, sizes):
        return wep.grouped_matmul(rows, w, sizes, implementation="loop")

    want = jnp.stack([one(rows[i], sizes[i]) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(one)(rows, sizes), want, rtol=1e-6, atol=1e-6)

    def scanned(rows):
        return jax.lax.scan(
            lambda c, i: (jnp.sin(jax.checkpoint(one)(c, sizes[i])), None), rows, jnp.arange(3)
        )[0]

    def unrolled(rows):
        for i in range(3):
            rows = jnp.sin(one(rows, sizes[i]))
        return rows

    a, b = (jax.jit(jax.grad(lambda r, f=f: jnp.sum(f(r) ** 2)))(rows[0]) for f in (scanned, unrolled))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(4), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32)), r"rows: expected \[m, n_in\]"),
        (
            (jnp.ones((4, 4)), jnp.ones((2, 5, 4)), jnp.ones(2, jnp.int32)),
            r"w: expected shape \[groups, 4, n_out\]",
        ),
        (
            (jnp.ones((4, 4)), jnp.ones((2, 4, 4)), jnp.ones(3, jnp.int32)),
            r"group_sizes: expected shape \[2\]",
        ),
        (
            (jnp.ones((4, 4)), jnp.ones((2, 4, 4)), jnp.ones(2)),
            "group_sizes: expected dtype int32, got float32",
        ),
        (
            (jnp.ones((4, 4), jnp.bfloat16), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32)),
            "w: expected dtype bfloat16",
        ),
        (
            (jnp.ones((4, 4), int), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32)),
            "rows: expected dtype bfloat16 or",
        ),
        (
            (jnp.ones((3, 4, 4)), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32)),
            r"rows: expected shape \[2, m, 4\]",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        wep.grouped_matmul(*arguments)


def test_bad_implementation():
    with pytest.raises(ValueError, match="implementation: expected 'auto', 'loop' or 'xla', got 'fast'"):
        wep.grouped_matmul(
            jnp.ones((4, 4)), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32), implementation="fast"
        )
