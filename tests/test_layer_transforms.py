"""The layers under Flax's transformations, and saved and restored by orbax."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep

HIDDEN, FFN, EXPERTS, TOP_K, DEPTH = 16, 8, 8, 2, 3
SETTINGS = {"hidden": HIDDEN, "ffn": FFN, "num_experts": EXPERTS, "top_k": TOP_K}


@pytest.fixture
def group(make_group):
    return make_group(4, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, chunk=16)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def loss_of(layer, x):
    return jnp.mean(jnp.square(layer(x) - 1))


class Residual(nnx.Module):
    """One layer of a stack."""

    def __init__(self, group, rngs):
        self.moe = wep.flax.MoE(**SETTINGS, group=group, rngs=rngs)

    def __call__(self, x):
        return x + self.moe(x)


# ---- nnx ----


def test_nnx_training_step(group):
    """nnx.jit around nnx.value_and_grad, updating in place, is what the same step does without nnx."""
    layer = wep.flax.MoE(**SETTINGS, group=group, rngs=nnx.Rngs(0))
    x = draw((4, 3, HIDDEN))
    graph, params = nnx.split(nnx.clone(layer))

    @nnx.jit
    def step(layer, x):
        loss, grads = nnx.value_and_grad(loss_of)(layer, x)
        params = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
        return loss

    @jax.jit
    def plain(params, x):
        loss, grads = jax.value_and_grad(lambda params: loss_of(nnx.merge(graph, params), x))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    losses = []
    for _ in range(4):
        losses.append(float(step(layer, x)))
        want, params = plain(params, x)
        np.testing.assert_allclose(losses[-1], want, rtol=1e-5)
    assert losses == sorted(losses, reverse=True)
    close(nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(params))


@pytest.mark.parametrize("remat", [False, True])
def test_nnx_scan_over_stacked_layers(group, remat):
    """A stack made by nnx.vmap and run by nnx.scan (and nnx.remat) equals its layers called one by one."""
    x = draw((4, 2, HIDDEN))

    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Residual(group, rngs)

    stack = make(nnx.Rngs(0))
    assert stack.moe.wi[...].shape == (DEPTH, EXPERTS, HIDDEN, 2 * FFN)
    graph, state = nnx.split(stack)

    def call(layer, x):
        return layer(x)

    if remat:
        call = nnx.remat(call)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return call(layer, x)

    def stacked(stack, x):
        return jnp.mean(jnp.square(forward(stack, x)))

    def one_by_one(state, x):
        for i in range(DEPTH):
            x = nnx.merge(graph, jax.tree.map(operator.itemgetter(i), state))(x)
        return jnp.mean(jnp.square(x))

    got, grads = nnx.jit(nnx.value_and_grad(stacked, argnums=(0, 1)))(stack, x)
    want, want_grads = jax.jit(jax.value_and_grad(one_by_one, argnums=(0, 1)))(state, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    close(nnx.to_pure_dict(grads[0]), nnx.to_pure_dict(want_grads[0]))
    close(grads[1], want_grads[1])


def test_nnx_remat_gives_the_same_bits(group):
    layer = wep.flax.MoE(**SETTINGS, group=group, rngs=nnx.Rngs(0))
    x = draw((4, 3, HIDDEN))
    plain = nnx.jit(nnx.value_and_grad(loss_of))(layer, x)
    again = nnx.jit(nnx.value_and_grad(nnx.remat(loss_of)))(layer, x)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(plain), jax.tree.leaves(again))


def test_nnx_state_is_made_where_it_belongs(make_group):
    """A layer made under nnx.jit on an Explicit mesh has its experts spread over the ranks."""
    mesh = jax.make_mesh(
        (2, 2),
        ("data", "expert"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 2,
        devices=jax.devices()[:4],
    )
    group = make_group(mesh=mesh, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    with jax.set_mesh(mesh):
        layer = nnx.jit(lambda: wep.flax.MoE(**SETTINGS, group=group, rngs=nnx.Rngs(0)))()
        assert layer.wi[...].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("expert")), 3)
        out = nnx.jit(lambda layer, x: layer(x))(layer, draw((4, 3, HIDDEN)))
    eager = wep.flax.MoE(**SETTINGS, group=group, rngs=nnx.Rngs(0))
    close(out, eager(draw((4, 3, HIDDEN))))


# ---- linen ----


class LinenResidual(nn.Module):
    group: wep.ExpertGroup

    @nn.compact
    def __call__(self, x, _=None):
        return x + wep.flax.linen.MoE(**SETTINGS, group=self.group, name="moe")(x), None


class LinenStack(nn.Module):
    """DEPTH layers; `remat` drops their activations."""

    group: wep.ExpertGroup
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(LinenResidual) if self.remat else LinenResidual
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=DEPTH,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return stack(self.group, name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_linen_scan_over_stacked_layers(group, remat):
    x = draw((4, 2, HIDDEN))
    stack = LinenStack(group, remat)
    boxed = jax.jit(stack.init)(jax.random.key(0), x)
    assert nn.get_partition_spec(boxed)["params"]["layers"]["moe"]["wi"] == PartitionSpec(
        None, "expert", None, None
    )
    params = nn.meta.unbox(boxed)

    def stacked(params, x):
        return jnp.mean(jnp.square(stack.apply(params, x)))

    def one_by_one(params, x):
        for i in range(DEPTH):
            mine = jax.tree.map(operator.itemgetter(i), params["params"]["layers"])
            x = LinenResidual(group).apply({"params": mine}, x)[0]
        return jnp.mean(jnp.square(x))

    got = jax.jit(jax.value_and_grad(stacked, argnums=(0, 1)))(params, x)
    want = jax.jit(jax.value_and_grad(one_by_one, argnums=(0, 1)))(params, x)
    close(got, want)


# ---- orbax ----


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_orbax_saves_and_restores_values_and_shardings(group, flavour, tmp_path):
    x = draw((4, 3, HIDDEN))
    if flavour == "nnx":
        layer = wep.flax.MoE(**SETTINGS, group=group, shared_ffn=4, rngs=nnx.Rngs(0))
        other = wep.flax.MoE(**SETTINGS, group=group, shared_ffn=4, rngs=nnx.Rngs(1))
        state, target = nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(other))
    else:
        layer = wep.flax.linen.MoE(**SETTINGS, group=group, shared_ffn=4)
        boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
        shardings = nn.get_sharding(boxed, group.mesh)
        init = jax.jit(lambda key: nn.meta.unbox(layer.init(key, x)), out_shardings=shardings)
        state, target = init(jax.random.key(0)), init(jax.random.key(1))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", abstract)

    jax.tree.map(np.testing.assert_array_equal, restored, state)
    wi = restored["wi"] if flavour == "nnx" else restored["params"]["wi"]
    assert wi.sharding.is_equivalent_to(NamedSharding(group.mesh, PartitionSpec("expert")), 3)
    assert wi.addressable_shards[0].data.shape[0] == EXPERTS // 4
    if flavour == "nnx":
        before = other(x)
        nnx.update(other, restored)
        assert (other(x) != before).any()
        np.testing.assert_array_equal(other(x), layer(x))
    else:
        np.testing.assert_array_equal(layer.apply(restored, x), layer.apply(state, x))
