"""grouped_matmul's own kernels on a GPU, through the public functions, against float64 products in NumPy.

    JAX_PLATFORMS=cuda,cpu XLA_FLAGS=--xla_gpu_graph_min_graph_size=1 pytest -m gpu tests/gpu

The flag has XLA put even a single call into a command buffer. Rows of no group hold NaN throughout.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jax_wideep as wep
from jax_wideep._swiglu import swiglu, swiglu_of_groups

pytestmark = pytest.mark.gpu

EPS = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}
REPOSITORY = pathlib.Path(__file__).parents[2]


def slices_of(sizes, shape):
    """Where in an array of rows each group lies."""
    ends = np.cumsum(sizes)
    if len(shape) == 3:
        return [(group, slice(0, size)) for group, size in enumerate(sizes)]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def poisoned(array, sizes):
    """A copy with NaN in the rows of no group."""
    out = np.full_like(array, np.nan)
    for at in slices_of(sizes, array.shape):
        out[at] = array[at]
    return out


def products(rows, w, sizes):
    """Group by group in float64; zero elsewhere."""
    out = np.zeros((*rows.shape[:-1], w.shape[2]))
    for group, at in enumerate(slices_of(sizes, rows.shape)):
        out[at] = rows[at] @ w[group]
    return out


def outer_products(rows, dout, sizes):
    dw = np.zeros((len(sizes), rows.shape[-1], dout.shape[-1]))
    for group, at in enumerate(slices_of(sizes, rows.shape)):
        dw[group] = rows[at].T @ dout[at]
    return dw


def check(name, got, want, magnitude, dtype):
    """`magnitude`: the same sums over absolute values, to which float32 accumulation is relative."""
    error = np.abs(np.asarray(got, np.float64) - want)
    worst = np.max(error - EPS[dtype] * np.abs(want) - 1e-5 * magnitude, initial=0)
    assert worst <= 1e-7, f"{name}: {worst} above the bound"  # false for NaN


def draw_sizes(draw, groups, m, padded):
    kind = draw(st.sampled_from(["random", "one group holds all", "empty"]), "kind of sizes")
    sizes = np.zeros(groups, np.int32)
    if kind == "one group holds all":
        sizes[draw(st.integers(0, groups - 1))] = m
    elif kind == "random":
        bound = m if padded else m // groups
        sizes[:] = draw(st.lists(st.integers(0, bound), min_size=groups, max_size=groups))
    return sizes


@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_values_and_gradients(data):
    groups = data.draw(st.integers(1, 7), "groups")
    m = data.draw(st.sampled_from([0, 1, 7, 130, 700]), "m")
    k, n = (8 * data.draw(st.integers(1, 40), name) for name in "kn")
    padded = data.draw(st.booleans(), "padded")
    sizes = draw_sizes(data.draw, groups, m, padded)
    dtype = data.draw(st.sampled_from([jnp.bfloat16, jnp.float16]), "dtype")
    out_dtype = data.draw(st.sampled_from([dtype, jnp.float32]), "out dtype")
    w_dtype = data.draw(st.sampled_from([dtype, jnp.float32]), "w dtype")
    remat = data.draw(st.booleans(), "remat")
    random = np.random.default_rng(data.draw(st.integers(0, 2**20), "seed"))
    lead = (groups, m) if padded else (m,)
    rows, w, dout = (
        np.asarray(jnp.asarray(random.normal(size=shape), dtype), np.float64)
        for shape in ((*lead, k), (groups, k, n), (*lead, n))
    )

    multiply = functools.partial(
        wep.grouped_matmul, group_sizes=sizes, implementation="cuda", preferred_element_type=out_dtype
    )
    multiply = jax.checkpoint(multiply) if remat else multiply

    @jax.jit
    def run(rows, w, dout):
        out, gradients = jax.vjp(multiply, rows, w)
        return out, *gradients(dout)

    arguments = jnp.asarray(poisoned(rows, sizes), dtype), jnp.asarray(w, w_dtype)
    out, drows, dw = run(*arguments, jnp.asarray(poisoned(dout, sizes), out_dtype))
    assert (out.dtype, drows.dtype, dw.dtype) == (out_dtype, dtype, w_dtype)
    wt = w.transpose(0, 2, 1)
    sized = functools.partial(products, sizes=sizes)
    check("out", out, sized(rows, w), sized(np.abs(rows), np.abs(w)), out_dtype)
    check("drows", drows, sized(dout, wt), sized(np.abs(dout), np.abs(wt)), dtype)
    outer = functools.partial(outer_products, sizes=sizes)
    check("dw", dw, outer(rows, dout), outer(np.abs(rows), np.abs(dout)), w_dtype)


@pytest.mark.parametrize("padded", [False, True])
def test_sizes_change_inside_a_loop(padded):
    """Nothing about the sizes may be fixed in a captured graph; twice, since a graph is replayed."""
    groups, cap, k, n = 6, 160, 192, 328
    random = np.random.default_rng(0)
    shape = (groups, cap, k) if padded else (500, k)
    rows, w = (
        np.asarray(jnp.asarray(random.normal(size=s), jnp.bfloat16), np.float64)
        for s in (shape, (groups, k, n))
    )
    all_sizes = random.multinomial(150 if padded else 450, np.ones(groups) / groups, size=8).astype(np.int32)
    poisoned_rows = np.stack([poisoned(rows, sizes) for sizes in all_sizes])

    @jax.jit
    def run(w, all_rows, all_sizes):
        def step(carry, x):
            return carry, wep.grouped_matmul(x[0], w, x[1], implementation="cuda")

        return jax.lax.scan(step, 0, (all_rows, all_sizes))[1]

    for _ in range(2):
        outs = run(jnp.asarray(w, jnp.bfloat16), jnp.asarray(poisoned_rows, jnp.bfloat16), all_sizes)
        for out, sizes in zip(outs, all_sizes, strict=True):
            check(
                "out", out, products(rows, w, sizes), products(np.abs(rows), np.abs(w), sizes), jnp.bfloat16
            )


def test_gradients_through_scan_and_remat():
    """A chain of products, each remade in the backward pass, equals the same chain over ragged_dot."""
    random = np.random.default_rng(1)
    rows = jnp.asarray(random.normal(size=(300, 128)), jnp.bfloat16)
    w = jnp.asarray(random.normal(size=(5, 128, 128)) / 128**0.5, jnp.bfloat16)
    all_sizes = jnp.asarray(random.multinomial(300, np.ones(5) / 5, size=4), jnp.int32)

    def loss(rows, w, implementation):
        @jax.checkpoint
        def step(rows, sizes):
            return jnp.sin(wep.grouped_matmul(rows, w, sizes, implementation=implementation)), None

        return jnp.sum(jax.lax.scan(step, rows, all_sizes)[0].astype(jnp.float32) ** 2)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, implementation=name), (0, 1)))(rows, w)
        for name in ("cuda", "xla")
    )
    for got, want in zip(ours, theirs, strict=True):
        assert relative_error(got, want) < 0.02


def relative_error(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_weight_grad(out_dtype):
    random = np.random.default_rng(2)
    rows, dout = (
        np.asarray(jnp.asarray(random.normal(size=s), jnp.bfloat16), np.float64)
        for s in ((400, 72), (400, 264))
    )
    sizes = np.array([100, 0, 201, 3], np.int32)
    dw = jax.jit(functools.partial(wep.grouped_matmul_weight_grad, preferred_element_type=out_dtype))(
        *(jnp.asarray(poisoned(a, sizes), jnp.bfloat16) for a in (rows, dout)), sizes
    )
    assert dw.dtype == out_dtype
    magnitude = outer_products(np.abs(rows), np.abs(dout), sizes)
    check("dw", dw, outer_products(rows, dout, sizes), magnitude, out_dtype)


def test_auto_takes_the_kernels_without_a_warning():
    rows, w = jnp.ones((64, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = jax.jit(wep.grouped_matmul).lower(rows, w, jnp.array([3, 4], jnp.int32)).as_text()
    assert "@wideep_grouped_matmul(" in text and "ragged_dot" not in text


def test_outside_of_jit_and_under_vmap():
    random = np.random.default_rng(3)
    rows, w = jnp.asarray(random.normal(size=(3, 50, 64)), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    sizes = jnp.array([[20, 30], [0, 50], [1, 2]], jnp.int32)
    one = functools.partial(wep.grouped_matmul, implementation="cuda")
    want = np.stack([np.asarray(one(rows[i], w, sizes[i]), np.float32) for i in range(3)])
    got = jax.vmap(lambda rows, sizes: one(rows, w, sizes))(rows, sizes)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_swiglu(padded, dtype):
    random = np.random.default_rng(4)
    sizes = np.array([60, 0, 35], np.int32)
    lead = (3, 70) if padded else (120,)
    hidden, dout = (2 * random.normal(size=(*lead, columns)) for columns in (2 * 200, 200))
    hidden, dout = (jnp.asarray(poisoned(a, sizes), dtype) for a in (hidden, dout))

    @jax.jit
    def run(hidden, dout):
        out, gradient = jax.vjp(lambda h: swiglu_of_groups(h, sizes, "cuda"), hidden)
        return out, *gradient(dout)

    out, gradient = jax.vjp(swiglu, hidden.astype(jnp.float32))
    wanted = out, *gradient(dout.astype(jnp.float32))
    for got, want in zip(run(hidden, dout), wanted, strict=True):
        assert got.dtype == dtype
        for at in slices_of(sizes, got.shape):
            np.testing.assert_allclose(
                np.asarray(got[at], np.float64), np.asarray(want[at], np.float64), rtol=EPS[dtype], atol=1e-4
            )


@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
def test_layer_on_one_gpu(mode):
    """The layer leaves rows past a group's end as it finds them: whatever memory held comes out nowhere."""
    mesh = jax.make_mesh(
        (1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    tokens, hidden, ffn, experts, top_k = 96, 256, 128, 8, 3
    random = np.random.default_rng(5)
    x = jnp.asarray(random.normal(size=(tokens, hidden)), jnp.bfloat16)
    wi = jnp.asarray(random.normal(size=(experts, hidden, 2 * ffn)) / hidden**0.5, jnp.bfloat16)
    wo = jnp.asarray(random.normal(size=(experts, ffn, hidden)) / ffn**0.5, jnp.bfloat16)
    topk_idx = np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    topk_idx[::2] = -1  # half of the rows stay unused
    topk_weights = jnp.asarray(random.random((tokens, top_k)), jnp.float32)
    spec = jax.sharding.PartitionSpec("expert")

    with wep.ExpertGroup(mesh, num_experts=experts, top_k=top_k, hidden=hidden, backend="xla") as group:

        def run(x, topk_weights, wi, wo, implementation):
            def layer(x, topk_idx, topk_weights, wi, wo):
                settings = {"mode": mode, "quantize": None, "implementation": implementation}
                return wep.moe_ffn(x, topk_idx, topk_weights, wi, wo, group, **settings)[0]

            sharded = jax.shard_map(layer, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec)
            out, gradients = jax.vjp(
                lambda x, t, wi, wo: sharded(x, topk_idx, t, wi, wo), x, topk_weights, wi, wo
            )
            return out, *gradients(jnp.ones_like(out))

        run = jax.jit(run, static_argnames="implementation")
        fill_memory_with_nan()
        ours = run(x, topk_weights, wi, wo, implementation="cuda")
        theirs = run(*(a.astype(jnp.float32) for a in (x, topk_weights, wi, wo)), implementation="xla")
        for got, want in zip(ours, theirs, strict=True):
            assert relative_error(got, want) < 0.02
        for got, again in zip(ours, run(x, topk_weights, wi, wo, implementation="cuda"), strict=True):
            np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(again, np.float32))


def fill_memory_with_nan():
    """The allocator hands out again what this frees."""
    for arrays in ([jnp.full((1 << size,), jnp.nan) for size in range(8, 28)] for _ in range(2)):
        jax.block_until_ready(arrays)


def test_is_captured_in_a_command_buffer(tmp_path):
    """XLA captures the call, and replays with other sizes and other buffers are right."""
    flags = f"--xla_gpu_graph_min_graph_size=1 --xla_dump_to={tmp_path}"
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *sys.path])
    script = pathlib.Path(__file__).with_name("captured_steps.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 6 and max(errors) < 6e-3
    dumped = [path for path in tmp_path.rglob("*") if "captured_step" in str(path) and path.is_file()]
    captured = [path.name for path in dumped if b"kCommandBuffer" in path.read_bytes()]
    assert captured, f"no command buffer in {sorted(path.name for path in dumped)}"
