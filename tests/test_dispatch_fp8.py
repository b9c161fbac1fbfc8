"""dispatch(quantize="fp8"): rows that travel as FP8, against ml_dtypes and the plan of the NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_wideep as wep


def inputs(hidden, dtype, tokens=11, num_ranks=4):
    rng = np.random.default_rng(hidden)
    x = rng.normal(size=(num_ranks, tokens, hidden)) * rng.lognormal(sigma=3, size=(num_ranks, tokens, 1))
    x[0, 0] = 0
    weights = rng.normal(size=(num_ranks, tokens, 3)).astype(np.float32)
    topk_idx = oracle.random_topk(rng, num_ranks, tokens, 8, 3, kind="zipf", masked=0.2)
    return np.asarray(jnp.asarray(x, dtype)), weights, topk_idx


def flat(*arrays):
    return [array.reshape(-1, array.shape[-1]) for array in arrays]


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("hidden", [128, 384, 640])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows(make_group, backend, dtype, hidden, capacity):
    group = make_group(4, num_experts=8, top_k=3, hidden=hidden, backend=backend)
    x, weights, topk_idx = inputs(hidden, dtype)

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group, capacity=capacity)
        rows, row_weights = wep.dispatch(x, weights, plan, quantize="fp8")
        (q, scales), _ = wep.dispatch(x, weights, plan, quantize="fp8", dequantize=False)
        return rows, row_weights, q, scales

    rows, row_weights, q, scales = oracle.on_ranks(group, body)(*flat(x, weights, topk_idx))
    plan = oracle.make_plan(topk_idx, 8, 4 * 11 * 3 if capacity is None else capacity)
    sent_q, sent_scales = oracle.quantize(x)
    want_q, want_row_weights = oracle.dispatch(sent_q, weights, plan)
    want_scales, _ = oracle.dispatch(sent_scales, weights, plan)
    assert (rows.dtype, q.dtype, scales.dtype) == (dtype, jnp.float8_e4m3fn, jnp.float32)
    np.testing.assert_array_equal(np.asarray(row_weights).reshape(want_row_weights.shape), want_row_weights)
    np.testing.assert_array_equal(np.asarray(q).view(np.uint8), want_q.view(np.uint8).reshape(q.shape))
    np.testing.assert_array_equal(np.asarray(scales), want_scales.reshape(scales.shape))
    want = oracle.dequantize(want_q, want_scales, x.dtype)
    np.testing.assert_array_equal(np.asarray(rows), want.reshape(rows.shape))


def test_gradient_is_that_of_rows_not_quantised(make_group, backend):
    group = make_group(4, num_experts=8, top_k=3, hidden=128, backend=backend)
    x, weights, topk_idx = inputs(128, jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(4 * 20, 128)), jnp.float32)

    def gradient(quantize):
        def body(x, weights, topk_idx, cotangent):
            plan = wep.make_plan(topk_idx, group, capacity=20)

            def loss(x, weights):
                rows, row_weights = wep.dispatch(x, weights, plan, quantize=quantize)
                return jnp.sum(rows * cotangent) + jnp.sum(row_weights**2)

            return jax.grad(loss, argnums=(0, 1))(x, weights)

        return oracle.on_ranks(group, body)(*flat(x, weights, topk_idx), cotangent)

    for straight_through, exact in zip(gradient("fp8"), gradient(None), strict=True):
        assert np.abs(np.asarray(exact)).max() > 0.1
        np.testing.assert_array_equal(np.asarray(straight_through), np.asarray(exact))


def test_bad_arguments(make_group):
    group = make_group(4, num_experts=8, top_k=3, hidden=64, backend="xla")

    def run(**options):
        def body(x, weights, topk_idx):
            return wep.dispatch(x, weights, wep.make_plan(topk_idx, group), **options)[1]

        return oracle.on_ranks(group, body)(*flat(*inputs(64, jnp.float32)))

    with pytest.raises(ValueError, match="dispatch: quantize: expected 'fp8' or None, got 'int8'"):
        run(quantize="int8")
    with pytest.raises(
        ValueError, match="dispatch: quantize: 'fp8' expects hidden to be a multiple of 128, got 64"
    ):
        run(quantize="fp8")


def test_rows_left_in_fp8_have_no_gradient(make_group):
    group = make_group(4, num_experts=8, top_k=3, hidden=128, backend="xla")

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        loss = lambda x: jnp.sum(wep.dispatch(x, weights, plan, quantize="fp8", dequantize=False)[0][1])  # noqa: E731
        return jax.grad(loss)(x)

    with pytest.raises(ValueError, match="dispatch: rows left in FP8"):
        oracle.on_ranks(group, body)(*flat(*inputs(128, jnp.float32)))
