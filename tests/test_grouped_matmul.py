"""grouped_matmul against float64 products in NumPy and, for gradients, against jax.lax.ragged_dot's."""

import importlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_wideep as wep
from jax_wideep import _ffi

grouped_matmul_module = importlib.import_module(
    "jax_wideep.grouped_matmul"
)  # the name in wep is the function

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
            (jnp.ones((4, 4), jnp.bfloat16), jnp.ones((2, 4, 4), jnp.float16), jnp.ones(2, jnp.int32)),
            "w: expected dtype bfloat16 or float32, got float16",
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"implementation": "fast"}, "implementation: expected 'auto', 'cuda', 'loop' or 'xla', got 'fast'"),
        ({"implementation": "cuda"}, "'cuda' needs bfloat16 or float16 rows, got float32"),
        (
            {"preferred_element_type": jnp.float16},
            "preferred_element_type: expected None, float32 as rows, or float32",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        wep.grouped_matmul(jnp.ones((4, 4)), jnp.ones((2, 4, 4)), jnp.ones(2, jnp.int32), **settings)


def test_cuda_needs_multiples_of_8_and_a_gpu():
    rows, sizes = jnp.ones((4, 16), jnp.bfloat16), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="multiples of 8, got 16 and 12"):
        wep.grouped_matmul(rows, jnp.ones((2, 16, 12), jnp.bfloat16), sizes, implementation="cuda")
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, this is being compiled for cpu"):
        wep.grouped_matmul(rows, jnp.ones((2, 16, 8), jnp.bfloat16), sizes, implementation="cuda")


def _random(shape, seed, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("implementation", ["loop", "xla"])
@pytest.mark.parametrize("lead", [(90,), (3, 40)])
def test_float32_output_and_weights(implementation, lead):
    """Nothing is rounded on the way: the output and the weights' gradient are exact to float32."""
    rows, w, dout = _random((*lead, 16), 0), _random((3, 16, 24), 1), _random((*lead, 24), 2)
    sizes = np.array([30, 0, 17], np.int32)

    def run(rows, w):
        return wep.grouped_matmul(
            rows, w, sizes, implementation=implementation, preferred_element_type=jnp.float32
        )

    out, gradient = jax.vjp(run, rows, w.astype(jnp.float32))
    assert out.dtype == jnp.float32
    wide_rows, wide_w, wide_dout = (np.asarray(a, np.float64) for a in (rows, w, dout))
    np.testing.assert_allclose(out, expected(wide_rows, wide_w, sizes), rtol=1e-5, atol=1e-5)

    drows, dw = gradient(dout.astype(jnp.float32))
    assert drows.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    want = _expected_dw(wide_rows, wide_dout, sizes)
    np.testing.assert_allclose(dw, want, rtol=1e-5, atol=1e-5)
    rounded = jnp.asarray(want, jnp.bfloat16)
    assert np.any(np.abs(np.asarray(rounded, np.float64) - want) > 1e-3)  # or the check above says nothing

    for out_dtype, tolerance in ((jnp.float32, 1e-5), (None, EPS[jnp.bfloat16])):
        dw = wep.grouped_matmul_weight_grad(
            rows, dout, sizes, implementation=implementation, preferred_element_type=out_dtype
        )
        assert dw.dtype == (out_dtype or jnp.bfloat16)
        np.testing.assert_allclose(np.asarray(dw, np.float64), want, rtol=tolerance, atol=tolerance)


def _expected_dw(rows, dout, sizes):
    dw = np.zeros((len(sizes), rows.shape[-1], dout.shape[-1]))
    start = 0
    for group, size in enumerate(sizes):
        at = (group, slice(0, size)) if rows.ndim == 3 else slice(start, start + size)
        dw[group] = rows[at].T @ dout[at]
        start += size
    return dw


def test_float32_weights_sum_over_microbatches():
    """Of many small gradients, a bfloat16 sum loses the later ones; float32 weights keep them."""
    rows, sizes = jnp.ones((512, 8, 8), jnp.bfloat16), jnp.array([8], jnp.int32)

    def total(w):
        return jax.lax.scan(
            lambda sum_, r: (sum_ + jnp.sum(wep.grouped_matmul(r, w, sizes).astype(jnp.float32)), None),
            0.0,
            rows,
        )[0]

    dw = jax.jit(jax.grad(total))(jnp.ones((1, 8, 8), jnp.float32))
    np.testing.assert_array_equal(dw, 512 * 8.0)


# ---- for GPUs, as far as a machine without one can tell ----


def _lowered(function, *arguments, platforms=("cuda",)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize("implementation", ["auto", "cuda"])
@pytest.mark.parametrize("lead", [(90,), (3, 30)])
def test_lowers_to_its_kernels(implementation, lead):
    rows, w, sizes = _random((*lead, 16), 0), _random((3, 16, 24), 1), jnp.array([1, 2, 3], jnp.int32)

    def loss(rows, w):
        return jnp.sum(wep.grouped_matmul(rows, w, sizes, implementation=implementation).astype(jnp.float32))

    text = _lowered(jax.grad(loss, (0, 1)), rows, w)
    assert text.count("@wideep_grouped_matmul(") == 1  # the loss is linear: only the input gradient is left
    assert "transpose_w = true" in text and "ragged_dot" not in text
    assert text.count("@wideep_grouped_matmul_weight_grad(") == 1
    forward = _lowered(loss, rows, w)
    assert "transpose_w = false" in forward and "zero_tail = true" in forward
    assert "has_side_effect = true" not in forward


def test_falls_back_to_ragged_dot():
    """What the kernels cannot take goes to ragged_dot; on a machine without a GPU nobody is warned."""
    sizes = jnp.array([1, 2, 3], jnp.int32)
    for rows, w in (
        (jnp.ones((9, 16)), jnp.ones((3, 16, 24))),
        (jnp.ones((9, 12), jnp.bfloat16), jnp.ones((3, 12, 24), jnp.bfloat16)),
    ):
        text = _lowered(lambda rows, w: wep.grouped_matmul(rows, w, sizes), rows, w)
        assert "ragged_dot" in text and "wideep" not in text


@pytest.mark.parametrize(
    ("capability", "built", "message"),
    [("8.0", True, "compute capability 9.0, got 8.0"), ("9.0", False, "is not built; install with")],
)
def test_warns_once_where_slow(monkeypatch, capability, built, message):
    monkeypatch.setattr(_ffi, "gpu_compute_capability", lambda: capability)
    monkeypatch.setattr(_ffi, "cuda_module", lambda: object() if built else None)
    grouped_matmul_module._warn_once.cache_clear()
    rows, w, sizes = _random((9, 16), 0), _random((3, 16, 24), 1), jnp.array([1, 2, 3], jnp.int32)
    with pytest.warns(UserWarning, match=message) as warned:
        text = _lowered(
            lambda rows, w: wep.grouped_matmul(wep.grouped_matmul(rows, w, sizes), w.mT, sizes), rows, w
        )
    assert len(warned) == 1
    assert "ragged_dot" in text and "wideep" not in text
    with pytest.raises(ValueError, match=message):
        wep.grouped_matmul(rows, w, sizes, implementation="cuda")


def test_one_program_for_both_platforms():
    rows, w, sizes = _random((9, 16), 0), _random((3, 16, 24), 1), jnp.array([1, 2, 3], jnp.int32)
    exported = jax.export.export(jax.jit(wep.grouped_matmul), platforms=("cpu", "cuda"), disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call("wideep_grouped_matmul")
    ])(rows, w, sizes)  # fmt: skip
    got, want = exported.call(rows, w, sizes), wep.grouped_matmul(rows, w, sizes)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_vmap_of_the_kernels():
    """One call after the other, in a loop."""
    w, sizes = _random((3, 16, 24), 1), jnp.array([[1, 2, 3], [3, 0, 0]], jnp.int32)

    def one(rows, sizes):
        return wep.grouped_matmul(rows, w, sizes, implementation="cuda")

    rows = _random((2, 9, 16), 0)
    assert jax.eval_shape(jax.vmap(one), rows, sizes).shape == (2, 9, 24)
    assert "while" in _lowered(jax.vmap(one), rows, sizes)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_layer_lowers_to_the_kernels(make_group, activation):
    """The layer clears no tails and, for SwiGLU, has them skipped; under remat and varying axes too."""
    group = make_group(2, num_experts=4, hidden=128, backend="xla")
    ffn = 32
    inner = wep.moe.inner_size(ffn, activation)
    x, wi, wo = _random((8, 128), 0), _random((4, 128, inner), 1), _random((4, ffn, 128), 2)
    topk_idx = jnp.tile(jnp.arange(2, dtype=jnp.int32), (8, 1))

    def layer(x, wi, wo, topk_idx):
        return wep.moe_ffn(x, topk_idx, jnp.ones((4, 2)), wi, wo, group, activation=activation)[0]

    spec = jax.sharding.PartitionSpec("expert")
    sharded = jax.checkpoint(jax.shard_map(layer, mesh=group.mesh, in_specs=(spec,) * 4, out_specs=spec))

    def loss(x, wi, wo):
        return jnp.sum(sharded(x, wi, wo, topk_idx).astype(jnp.float32) ** 2)

    text = _lowered(jax.grad(loss, (0, 1, 2)), x, wi, wo)
    assert "zero_tail = false" in text and "zero_tail = true" not in text
    assert text.count("@wideep_grouped_matmul_weight_grad(") == 2
    assert ("@wideep_swiglu(" in text) == ("@wideep_swiglu_grad(" in text) == (activation == "swiglu")
