"""ll_dispatch and ll_combine on both backends against the NumPy oracle, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_wideep as wep
from jax_wideep.quantize import dequantize, quantize

EPS = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}


def expected_rows(x, topk_idx, num_experts, chunk):
    """rows [experts, ranks * chunk, hidden], counts [experts], row_source, by appending in order."""
    num_ranks, _, top_k = topk_idx.shape
    rows = np.zeros((num_experts, num_ranks * chunk, x.shape[2]), x.dtype)
    counts = np.zeros(num_experts, np.int32)
    row_source = np.full((num_experts, num_ranks * chunk), -1, np.int32)
    for source, expert in enumerate(topk_idx.reshape(-1)):
        if expert >= 0:
            rows[expert, counts[expert]] = x.reshape(-1, x.shape[2])[source // top_k]
            row_source[expert, counts[expert]] = source
            counts[expert] += 1
    return rows, counts, row_source


def flat(*arrays):
    return [array.reshape(-1, array.shape[-1]) for array in arrays]


@given(data=st.data())
def test_any_routing(data):
    num_ranks = data.draw(st.sampled_from([1, 3, 8]), "ranks")
    num_experts = num_ranks * data.draw(st.integers(1, 3), "local experts")
    top_k = data.draw(st.integers(1, min(16, num_experts)), "top_k")
    chunk = data.draw(st.integers(1, 6), "chunk")
    tokens = data.draw(st.integers(1, chunk), "tokens")
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]), "dtype")
    fp8 = data.draw(st.booleans(), "fp8")
    hidden = data.draw(st.sampled_from([128, 256] if fp8 else [8, 40]), "hidden")
    backend = data.draw(st.sampled_from(["cpu", "cpu", "xla"]), "backend")
    kind = data.draw(st.sampled_from(["uniform", "zipf", "hot", "empty"]), "routing")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20), "seed"))
    x = np.asarray(jnp.asarray(rng.normal(size=(num_ranks, tokens, hidden)), dtype))
    weights = rng.normal(size=(num_ranks, tokens, top_k)).astype(np.float32)
    topk_idx = oracle.random_topk(rng, num_ranks, tokens, num_experts, top_k, kind=kind, masked=0.2)
    mesh = jax.make_mesh((num_ranks,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:num_ranks])  # fmt: skip
    with wep.ExpertGroup(
        mesh, num_experts=num_experts, top_k=top_k, hidden=hidden, backend=backend, chunk=chunk
    ) as group:

        def body(x, weights, topk_idx):
            recv = wep.ll_dispatch(x, topk_idx, group, quantize="fp8" if fp8 else None)
            out = wep.ll_combine(recv.rows * jnp.asarray(1.5, dtype), weights, recv)
            return recv.rows, recv.counts, recv.row_source, out

        run = oracle.on_ranks(group, body)
        rows, counts, row_source, out = jax.block_until_ready(run(*flat(x, weights, topk_idx)))

    sent = oracle.dequantize(*oracle.quantize(x), x.dtype) if fp8 else x
    want_rows, want_counts, want_source = expected_rows(sent, topk_idx, num_experts, chunk)
    np.testing.assert_array_equal(counts, want_counts)
    np.testing.assert_array_equal(row_source, want_source)
    np.testing.assert_array_equal(np.asarray(rows), want_rows)
    y = (want_rows.astype(np.float32) * np.float32(1.5)).astype(want_rows.dtype).astype(np.float64)
    want = np.zeros((num_ranks * tokens, hidden))
    for expert, row in np.argwhere(want_source >= 0):
        source = want_source[expert, row]
        want[source // top_k] += np.float64(weights.reshape(-1)[source]) * y[expert, row]
    eps = EPS[dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=eps, atol=8 * eps)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients(make_group, backend, dtype, fp8):
    """out = sum of w[t, k] * 1.5 * x[t]: by hand. The FP8 wire has the gradient of an exact one."""
    group = make_group(4, num_experts=8, top_k=3, hidden=128, chunk=6, backend=backend)
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.normal(size=(4, 5, 128)), dtype))
    weights = rng.normal(size=(4, 5, 3)).astype(np.float32)
    cotangent = np.asarray(jnp.asarray(rng.normal(size=x.shape), dtype))
    topk_idx = oracle.random_topk(rng, 4, 5, 8, 3, masked=0.2)

    def body(x, weights, topk_idx):
        recv = wep.ll_dispatch(x, topk_idx, group, quantize="fp8" if fp8 else None)
        return wep.ll_combine(recv.rows * jnp.asarray(1.5, dtype), weights, recv)

    run = oracle.on_ranks(group, body)

    def loss(x, weights):
        out = run(x, weights, topk_idx.reshape(-1, 3)).astype(jnp.float32)
        return jnp.sum(out * cotangent.reshape(out.shape).astype(np.float32))

    dx, dweights = jax.grad(loss, argnums=(0, 1))(*flat(x, weights))
    sent = oracle.dequantize(*oracle.quantize(x), x.dtype) if fp8 else x
    cot64 = cotangent.astype(np.float64)
    kept = topk_idx >= 0
    want_dx = 1.5 * np.where(kept, weights, 0).sum(axis=2)[..., None] * cot64
    want_dw = np.where(kept, 1.5 * np.sum(sent.astype(np.float64) * cot64, axis=2)[..., None], 0)
    eps = EPS[dtype]
    np.testing.assert_allclose(
        np.asarray(dx, np.float64), want_dx.reshape(dx.shape), rtol=8 * eps, atol=16 * eps
    )
    size = np.abs(sent.astype(np.float64) * cot64).sum(axis=2).max()
    np.testing.assert_allclose(dweights, want_dw.reshape(dweights.shape), rtol=8 * eps, atol=eps * size)


def test_no_tokens_at_all(make_group, backend):
    group = make_group(4, num_experts=4, top_k=1, hidden=128, chunk=2, backend=backend)

    def body(x, weights, topk_idx, scale):
        x, weights, topk_idx = x[:0], weights[:0], topk_idx[:0]
        recv = wep.ll_dispatch(x, topk_idx, group)
        out = wep.ll_combine(recv.rows * scale, weights, recv)
        assert out.shape == (0, 128)
        return recv.counts, jnp.sum(recv.rows)[None], jnp.sum(out)[None]

    # Not empty arguments: jax 0.11.2 crashes when it compiles a shard_map that has them, without this library too.
    one = np.ones((4, 128), np.float32), np.ones((4, 1), np.float32), np.zeros((4, 1), np.int32)
    for array in oracle.on_ranks(group, body)(*one, np.ones(4, np.float32)):
        np.testing.assert_array_equal(array, 0)


def test_rows_past_the_counts(make_group, backend):
    """Zero in values and gradients; where they are unspecified, no result shows what they hold, even NaN."""
    group = make_group(4, num_experts=8, top_k=2, hidden=16, chunk=5, backend=backend)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, 5, 16)).astype(np.float32)
    weights = rng.normal(size=(4, 5, 2)).astype(np.float32)
    topk_idx = oracle.random_topk(rng, 4, 5, 8, 2, masked=0.3)

    def run(zero_tail):
        def body(x, weights, topk_idx):
            def home(x, weights):
                recv = wep.ll_dispatch(x, topk_idx, group, quantize=None, zero_tail=zero_tail)
                past = jnp.arange(4 * 5)[None, :] >= recv.counts[:, None]
                rows = recv.rows if zero_tail else jnp.where(past[..., None], jnp.nan, recv.rows)
                return jnp.sum(jnp.sin(wep.ll_combine(rows, weights, recv, zero_tail=zero_tail))), (
                    recv,
                    past,
                )

            grads, (recv, past) = jax.grad(home, argnums=(0, 1), has_aux=True)(x, weights)
            pullback = jax.vjp(lambda y: wep.ll_combine(y, weights, recv, zero_tail=zero_tail), recv.rows)[1]
            return grads, recv.rows, pullback(jnp.ones_like(x))[0], past

        return jax.tree.map(np.asarray, oracle.on_ranks(group, body)(*flat(x, weights, topk_idx)))

    grads, rows, drows, past = run(True)
    assert past.any() and not rows[past].any() and not drows[past].any() and drows[~past].all()
    dirty_grads = run(False)[0]
    jax.tree.map(np.testing.assert_array_equal, grads, dirty_grads)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_rows_left_in_fp8(make_group, backend):
    group = make_group(2, num_experts=4, top_k=2, hidden=256, chunk=3, backend=backend)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 256)).astype(np.float32)
    topk_idx = oracle.random_topk(rng, 2, 3, 4, 2)

    def body(x, topk_idx):
        recv = wep.ll_dispatch(x, topk_idx, group, dequantize=False)
        return recv.rows, recv.scales

    rows, scales = oracle.on_ranks(group, body)(*flat(x, topk_idx))
    q, want_scales = oracle.quantize(x)
    assert rows.dtype == jnp.float8_e4m3fn and scales.dtype == jnp.float32
    want_rows, _, _ = expected_rows(q.view(np.uint8), topk_idx, 4, 3)
    np.testing.assert_array_equal(np.asarray(rows).view(np.uint8), want_rows)
    np.testing.assert_array_equal(scales, expected_rows(want_scales, topk_idx, 4, 3)[0])


def test_halves_equal_the_whole(make_group, backend):
    group = make_group(4, num_experts=8, top_k=2, hidden=128, chunk=4, backend=backend)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 4, 128)).astype(np.float32)
    weights = rng.random((4, 4, 2)).astype(np.float32)
    topk_idx = oracle.random_topk(rng, 4, 4, 8, 2)

    def whole(x, weights, topk_idx):
        recv = wep.ll_dispatch(x, topk_idx, group)
        return jnp.sum(jnp.sin(wep.ll_combine(jnp.tanh(recv.rows), weights, recv)))

    def halves(x, weights, topk_idx):
        sent = wep.ll_dispatch_send(x, topk_idx, group)
        between = jnp.sum(x)  # other work
        recv = wep.ll_dispatch_recv(sent)
        home = wep.ll_combine_send(jnp.tanh(recv.rows), weights, recv)
        return jnp.sum(jnp.sin(wep.ll_combine_recv(home))) + 0 * between

    results = [
        oracle.on_ranks(group, jax.grad(function, argnums=(0, 1)))(*flat(x, weights, topk_idx))
        for function in (whole, halves)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_wire_format_agrees_with_ml_dtypes(make_group, backend, dtype):
    """Bit for bit, for magnitudes from denormal to near the top, ties, zeros, infinities and NaN."""
    group = make_group(1, num_experts=1, top_k=1, hidden=1280, chunk=64, backend=backend)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 1280)) * 10.0 ** rng.integers(-6, 4, size=(64, 1280))
    x[0] = 0
    x[1] = np.tile(np.arange(-64, 64), 10) / 8  # many ties at 3 bits of mantissa
    x[2, 0], x[3, 7], x[4, 9] = np.inf, np.nan, -np.inf
    x = np.asarray(jnp.asarray(x, dtype))

    def body(x):
        recv = wep.ll_dispatch(x, jnp.zeros((64, 1), jnp.int32), group, dequantize=False)
        return recv.rows, recv.scales

    rows, scales = oracle.on_ranks(group, body)(x)
    with np.errstate(invalid="ignore", over="ignore"):
        q, want_scales = oracle.quantize(x)
        back = oracle.dequantize(q, want_scales, np.float32)
    got_back = np.asarray(dequantize(rows[0], scales[0], jnp.float32))
    finite = np.isfinite(x.astype(np.float32).reshape(64, -1, 128)).all(axis=-1)
    np.testing.assert_array_equal(np.asarray(scales)[0][finite], want_scales[finite])
    codes, want_codes = (np.asarray(a).view(np.uint8).reshape(64, -1, 128) for a in (rows, q))
    np.testing.assert_array_equal(codes[finite], want_codes[finite])
    np.testing.assert_array_equal(got_back.reshape(64, -1, 128)[finite], back.reshape(64, -1, 128)[finite])
    assert np.isnan(got_back.reshape(64, -1, 128)[~finite]).all()


def test_quantize_is_within_half_a_step():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 256)), jnp.float32)
    q, scales = quantize(x)
    back = dequantize(q, scales, jnp.float32)
    # e4m3 has 3 bits of mantissa: half a step is 2^-4 of the value, or of the smallest normal number 2^-6.
    bound = np.maximum(np.abs(x), np.repeat(np.asarray(scales), 128, axis=1) * 2.0**-6) * 2.0**-4
    assert (np.abs(back - x) <= bound * 1.001).all()
