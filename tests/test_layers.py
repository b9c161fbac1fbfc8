"""The nnx and the linen layer against a loop over experts on all tokens: values and every gradient."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep

HIDDEN, FFN, EXPERTS, TOP_K = 16, 8, 16, 2
ROUTER = wep.RouterConfig(num_experts=EXPERTS, top_k=TOP_K)
ACTIVATIONS = {
    "swiglu": lambda h: jax.nn.silu(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :],
    "gelu": lambda h: 0.5 * h * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
    "relu2": lambda h: jnp.where(h > 0, h, 0) ** 2,
}
MESHES = {
    "one axis": ((8,), ("expert",), ("expert",)),
    "data by expert": ((2, 4), ("data", "expert"), ("data", "expert")),
    "data axis besides": ((2, 4), ("data", "expert"), ("expert",)),
}


def make_mesh(layout, kind="Auto"):
    sizes, names, axis = MESHES[layout]
    kinds = (getattr(jax.sharding.AxisType, kind),) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=jax.devices()[: np.prod(sizes)]), axis


@pytest.fixture(params=["nnx", "linen"])
def flavour(request):
    return request.param


@dataclasses.dataclass
class Layer:
    """Either flavour, as parameters by name and a pure function of them."""

    params: dict[str, Any]
    apply: Any  # (params, x, **options) -> output, or (output, stats)


def build(flavour, group, bias=None, **settings):
    settings = {"hidden": group.hidden, "ffn": FFN, "num_experts": EXPERTS, "top_k": TOP_K} | settings
    if flavour == "nnx":
        layer = wep.flax.MoE(**settings, group=group, rngs=nnx.Rngs(0))
        if bias is not None:
            layer.gate.selection_bias[...] = bias
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        flat = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(params)}

        def apply(values, x, **options):
            state = [(path, leaf.replace(values[".".join(path)])) for path, leaf in nnx.to_flat_state(params)]
            return nnx.merge(graph, nnx.from_flat_state(state), rest)(x, **options)

        return Layer(flat, apply)
    layer = wep.flax.linen.MoE(**settings, group=group)
    with jax.set_mesh(group.mesh):
        variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), jnp.zeros((8, group.hidden))))
    flat = {
        ".".join(path): leaf for path, leaf in nnx.traversals.flatten_mapping(variables["params"]).items()
    }
    state = {} if bias is None else {"router_state": {"selection_bias": bias}}

    def apply(values, x, **options):
        nested = nnx.traversals.unflatten_mapping({tuple(name.split(".")): v for name, v in values.items()})
        return layer.apply({"params": nested, **state}, x, **options)

    return Layer(flat, apply)


def dense(params, x, router=ROUTER, activation="swiglu", *, bias=None, mask=None):
    """The layer's output, and what its routing decided, on one device."""
    tokens = x.reshape(-1, x.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    logits = jnp.matmul(tokens, params["gate.kernel"], precision="highest")
    routing = wep.routing.route(logits, router, selection_bias=bias, token_mask=mask)
    act = ACTIVATIONS[activation]
    out = oracle.dense_moe(tokens, routing.topk_idx, routing.topk_weights, params["wi"], params["wo"], act)
    if "shared_wi" in params:
        out = out + act(tokens @ params["shared_wi"]) @ params["shared_wo"]
    return out.reshape(x.shape), (logits, routing)


def relative(got, want, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry, leaf by leaf."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.abs(b).max() > 0, path
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst < tolerance, f"{jax.tree_util.keystr(path)}: differs by {worst:.1e} of the largest"

    jax.tree_util.tree_map_with_path(check, got, want)


def on_one_device(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


def draw(shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


DEEPSEEK = {
    "score": "sigmoid", "num_groups": 4, "group_top_k": 2, "use_selection_bias": True, "scaling_factor": 2.5,
}  # fmt: skip
# mesh, axis types, backend, x's shape without hidden, router, layer's settings, which tokens are real
VARIANTS = {
    "swiglu": ("one axis", "Auto", "cpu", (8, 3), {}, {}, None),
    "swiglu, xla": ("one axis", "Auto", "xla", (8, 3), {}, {"shared_ffn": 6}, None),
    "gelu, deepseek": (
        "data by expert", "Explicit", "cpu", (8, 3), DEEPSEEK, {"activation": "gelu", "shared_ffn": 6}, None,
    ),
    "relu2, not renormalised": (
        "data axis besides", "Auto", "cpu", (16, 2), {"renormalize": False}, {"activation": "relu2"}, None,
    ),
    "sub-axis, explicit": ("data axis besides", "Explicit", "cpu", (8, 3), {"score": "sigmoid"}, {}, 0.3),
    "uneven batch": ("one axis", "Auto", "cpu", (3, 5), {}, {"shared_ffn": 6}, None),
    "uneven batch, explicit": ("data by expert", "Explicit", "cpu", (3, 5), {}, {"activation": "gelu"}, 0.3),
    "low latency": ("one axis", "Auto", "cpu", (8, 5), DEEPSEEK, {"mode": "low_latency"}, 0.3),
    "low latency, xla": ("data axis besides", "Explicit", "xla", (8, 2), {}, {"mode": "low_latency"}, None),
    "low latency, relu2": (
        "data by expert", "Auto", "cpu", (8, 4), {}, {"mode": "low_latency", "activation": "relu2"}, None,
    ),
}  # fmt: skip


# The linen layer shares its forward pass with the nnx layer: some variants are enough.
@pytest.mark.parametrize(
    ("flavour", "variant"),
    [("nnx", variant) for variant in VARIANTS]
    + [
        ("linen", variant)
        for variant in ("swiglu", "gelu, deepseek", "uneven batch, explicit", "low latency")
    ],
)
def test_equals_a_dense_loop_over_experts(make_group, flavour, variant):
    layout, kind, backend, shape, router, settings, masked = VARIANTS[variant]
    mesh, axis = make_mesh(layout, kind)
    group = make_group(
        mesh=mesh, axis=axis, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, backend=backend, chunk=4
    )
    router = wep.RouterConfig(num_experts=EXPERTS, top_k=TOP_K, **router)
    activation = settings.get("activation", "swiglu")
    bias = draw(EXPERTS, 1, 0.1) if router.use_selection_bias else None
    layer = build(flavour, group, bias, router=router, quantize=None, **settings)
    x, pull = draw((*shape, HIDDEN)), draw((*shape, HIDDEN), 2)
    mask = None if masked is None else np.random.default_rng(3).random(shape) > masked

    def loss(params, x):
        out, stats = layer.apply(params, x, token_mask=mask, return_stats=True)
        return jnp.sum(out * pull) + stats.aux_loss + stats.z_loss, (out, stats)

    def dense_loss(params, x):
        out, (logits, routing) = dense(params, x, router, activation, bias=bias, mask=mask)
        flat_mask = None if mask is None else mask.reshape(-1)
        aux = wep.routing.load_balance_loss(routing.scores, routing.topk_idx, EXPERTS, token_mask=flat_mask)
        z = wep.routing.z_loss(logits, token_mask=flat_mask)
        chosen = routing.topk_idx.reshape(-1)
        counts = jnp.bincount(jnp.where(chosen >= 0, chosen, EXPERTS), length=EXPERTS)
        stats = wep.MoEStats(counts, jnp.int32(0), aux, z)
        return jnp.sum(out * pull) + aux + z, (out, stats)

    step = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    (got_loss, (out, stats)), grads = jax.jit(step(loss))(layer.params, x)
    (want_loss, (want, want_stats)), want_grads = jax.jit(step(dense_loss))(on_one_device(layer.params), x)
    assert out.shape == x.shape and out.dtype == x.dtype
    relative((got_loss, out, grads), (want_loss, want, want_grads))
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)
    assert stats.overflow == 0
    relative((stats.aux_loss, stats.z_loss), (want_stats.aux_loss, want_stats.z_loss))
    if not settings.get("shared_ffn") and mask is not None:
        np.testing.assert_array_equal(np.asarray(out)[~mask], 0)


@pytest.fixture
def group(make_group):
    mesh, axis = make_mesh("one axis")
    return make_group(mesh=mesh, axis=axis, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, chunk=16)


def test_parameters(group, flavour):
    layer = build(flavour, group, shared_ffn=6, param_dtype=jnp.bfloat16, activation="gelu")
    shapes = {name: (leaf.shape, leaf.dtype.name) for name, leaf in layer.params.items()}
    assert shapes == {
        "gate.kernel": ((HIDDEN, EXPERTS), "float32"),
        "wi": ((EXPERTS, HIDDEN, FFN), "bfloat16"),
        "wo": ((EXPERTS, FFN, HIDDEN), "bfloat16"),
        "shared_wi": ((HIDDEN, 6), "bfloat16"),
        "shared_wo": ((6, HIDDEN), "bfloat16"),
    }
    # Experts differ from each other, and each has the variance of a dense layer of its own.
    wi = np.asarray(layer.params["wi"], np.float32)
    assert len(np.unique(wi[:, 0, 0])) > EXPERTS // 2
    assert abs(wi.std() * np.sqrt(HIDDEN) - 1) < 0.1


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_partitioning_metadata(make_group, flavour, kind):
    mesh, axis = make_mesh("data by expert", kind)
    group = make_group(mesh=mesh, axis=axis, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    settings = {
        "hidden": HIDDEN, "ffn": FFN, "num_experts": EXPERTS, "top_k": TOP_K, "group": group, "shared_ffn": 4,
    }  # fmt: skip
    if flavour == "nnx":
        layer = wep.flax.MoE(**settings, rngs=nnx.Rngs(0))
        specs = nnx.get_partition_spec(nnx.state(layer, nnx.Param))
        specs = {name: specs[name].get_value() for name in ("wi", "wo", "shared_wi")} | {
            "gate.kernel": specs["gate"]["kernel"].get_value()
        }
        assert layer.wi[...].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(axis)), 3)
    else:
        layer = wep.flax.linen.MoE(**settings)
        abstract = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((8, HIDDEN)))
        specs = nn.get_partition_spec(abstract)["params"]
        specs = {name: specs[name] for name in ("wi", "wo", "shared_wi")} | {
            "gate.kernel": specs["gate"]["kernel"]
        }
    experts = PartitionSpec(axis, None, None)
    replicated = PartitionSpec(None, None)
    assert specs == {"wi": experts, "wo": experts, "shared_wi": replicated, "gate.kernel": replicated}


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float16),
    ],
)
def test_dtypes(group, x_dtype, dtype, param_dtype):
    """Computes in `dtype` (x's if None), keeps parameters in `param_dtype`, returns x's dtype; routes in float32."""
    layer = build("nnx", group, dtype=dtype, param_dtype=param_dtype, shared_ffn=6)
    x = draw((8, 2, HIDDEN)).astype(x_dtype)
    out, pullback = jax.vjp(jax.jit(layer.apply), layer.params, x)
    assert out.dtype == x_dtype
    params64 = {name: leaf.astype(jnp.float32) for name, leaf in layer.params.items()}
    want, _ = dense(params64, x.astype(jnp.float32))
    relative(out, want, 0.03)
    dparams, dx = pullback(jnp.ones_like(out))
    assert dx.dtype == x_dtype
    assert all(dparams[name].dtype == leaf.dtype for name, leaf in layer.params.items())


def test_low_latency_on_an_fp8_wire_is_close(make_group):
    mesh, axis = make_mesh("one axis")
    group = make_group(mesh=mesh, axis=axis, num_experts=EXPERTS, top_k=TOP_K, hidden=128, chunk=16)
    layer = build("nnx", group, mode="low_latency")
    x = draw((8, 3, 128))
    got = jax.jit(layer.apply)(layer.params, x)
    want, _ = dense(layer.params, x)
    relative(got, want, 0.1)
    assert np.abs(got - want).max() > 1e-4  # it went over the wire


def test_padding_may_hold_anything(group, flavour):
    layer = build(flavour, group)
    x = np.asarray(draw((8, 4, HIDDEN)))
    mask = np.random.default_rng(1).random((8, 4)) < 0.6
    dirty = np.where(mask[..., None], x, np.nan)

    @jax.jit
    def run(x):
        return jax.value_and_grad(
            lambda params, x: jnp.sum(
                jnp.where(mask[..., None], layer.apply(params, x, token_mask=mask), 0) ** 2
            ),
            argnums=(0,),
        )(layer.params, x)

    jax.tree.map(np.testing.assert_array_equal, run(x), run(dirty))


@pytest.mark.parametrize("settings", [{"capacity": 4}, {"capacity_factor": 0.5}])
def test_capacity_drops_and_counts(group, settings):
    layer = build("nnx", group, overflow="drop", **settings)
    x = draw((8, 4, HIDDEN))
    out, stats = jax.jit(functools.partial(layer.apply, return_stats=True))(layer.params, x)
    # Each rank hosts two experts and takes 4 rows: of 8 * 4 * 2 selections, in order of rank and token.
    _, (_, routing) = dense(layer.params, x)
    plan = oracle.make_plan(np.asarray(routing.topk_idx).reshape(8, 4, TOP_K), EXPERTS, 4)
    assert stats.overflow == plan.overflow.sum() > 0
    np.testing.assert_array_equal(stats.tokens_per_expert, plan.tokens_per_expert)
    kept = jnp.where(plan.dest_rank.reshape(-1, TOP_K) >= 0, routing.topk_weights, 0)
    params = layer.params
    want = oracle.dense_moe(
        x.reshape(-1, HIDDEN), routing.topk_idx, kept, params["wi"], params["wo"], ACTIVATIONS["swiglu"]
    )
    relative(out.reshape(-1, HIDDEN), want)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 2), (0, 4)])
def test_leading_axes(group, shape):
    layer = build("nnx", group, shared_ffn=4)
    x = draw((*shape, HIDDEN))
    out = jax.jit(layer.apply)(layer.params, x)
    assert out.shape == x.shape
    if x.size:
        relative(out, dense(layer.params, x)[0])


def test_tokens_spread_over_some_axes_only(make_group):
    """batch_axes: tokens are the same along the mesh axes left out."""
    mesh, axis = make_mesh("data axis besides")
    group = make_group(mesh=mesh, axis=axis, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    layer = build("nnx", group, batch_axes=("expert",))
    x = draw((4, 3, HIDDEN))

    def loss(apply, params, x):
        return jnp.sum(apply(params, x) ** 2)

    def dense_apply(params, x):
        return dense(params, x)[0]

    step = jax.value_and_grad(loss, argnums=(1, 2))
    got = jax.jit(functools.partial(step, layer.apply))(layer.params, x)
    relative(got, step(dense_apply, layer.params, x))
    stats = layer.apply(layer.params, x, return_stats=True)[1]
    assert stats.tokens_per_expert.sum() == 4 * 3 * TOP_K


def test_inside_a_shard_map_of_the_callers(group):
    layer = build("nnx", group)
    x = draw((8, 3, HIDDEN))
    split = {"wi": PartitionSpec("expert"), "wo": PartitionSpec("expert"), "gate.kernel": PartitionSpec()}
    run = jax.shard_map(
        layer.apply,
        mesh=group.mesh,
        in_specs=(split, PartitionSpec("expert")),
        out_specs=PartitionSpec("expert"),
    )
    relative(jax.jit(run)(layer.params, x), dense(layer.params, x)[0])


def test_jitter(group):
    router = dataclasses.replace(ROUTER, jitter=0.3)
    layer = build("nnx", group, router=router)
    x = jnp.tile(draw((1, 3, HIDDEN)), (8, 1, 1))  # the same tokens on every rank
    run = jax.jit(layer.apply)
    noisy = [run(layer.params, x, jitter_rng=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert (noisy[0] != noisy[2]).any()
    assert (noisy[0][0] != noisy[0][1]).any()  # each rank draws its own
    relative(run(layer.params, x), dense(layer.params, x)[0])


def test_selection_bias_update(group):
    router = dataclasses.replace(ROUTER, use_selection_bias=True)
    layer = wep.flax.MoE(HIDDEN, FFN, EXPERTS, TOP_K, group, router=router, rngs=nnx.Rngs(0))
    x = draw((8, 16, HIDDEN)) + 2  # uneven load
    step = nnx.jit(lambda layer, x: layer(x, return_stats=True)[1])
    before = step(layer, x)
    for _ in range(60):
        layer.update_selection_bias(step(layer, x), rate=0.02)
    after = step(layer, x)
    assert after.tokens_per_expert.std() < 0.5 * before.tokens_per_expert.std()
    assert ("gate", "selection_bias") not in dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))


def test_overflow_error_reaches_the_caller(group):
    layer = build("nnx", group, capacity=1, overflow="error")
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank \d is sent \d+ rows but has capacity 1"):
        jax.block_until_ready(jax.jit(layer.apply)(layer.params, draw((8, 4, HIDDEN))))


def test_large_experts_stay_on_their_ranks(group):
    """No parameter of the experts is gathered: the compiled program never holds all of wi on a device."""
    layer = build("nnx", group, ffn=24)
    params = jax.device_put(
        layer.params,
        {
            name: NamedSharding(group.mesh, PartitionSpec("expert" if name in ("wi", "wo") else None))
            for name in layer.params
        },
    )
    x = jax.device_put(draw((8, 4, HIDDEN)), NamedSharding(group.mesh, PartitionSpec("expert")))
    text = jax.jit(layer.apply).lower(params, x).compile().as_text()
    assert f"f32[{EXPERTS // 8},{HIDDEN},48]" in text and f"f32[{EXPERTS},{HIDDEN},48]" not in text
    assert "wideep_dispatch" in text
