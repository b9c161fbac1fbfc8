"""Layers with replicas of hot experts: they train as layers without, while experts move from rank to rank."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_wideep as wep
from jax_wideep.flax import placing
from jax_wideep.flax.transformer import TransformerConfig, make_transformer

RANKS, EXPERTS, EXTRA = 4, 8, 4
CONFIG = {
    "vocab": 11, "hidden": 16, "num_layers": 1, "num_heads": 2, "ffn": 8, "num_experts": EXPERTS, "top_k": 2,
    "quantize": None,
}  # fmt: skip


@contextlib.contextmanager
def no_compilation():
    """Fails if anything is compiled inside."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
        assert not compiled, f"{len(compiled)} programs were compiled"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss_of(model):
        logits, stats = model(tokens[:, :-1], return_stats=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return loss + 0.01 * stats.aux_loss.mean(), stats

    (loss, stats), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    gradients = placing.sum_replica_gradients(model, gradients)
    norm = placing.global_norm(model, gradients)
    gradients = jax.tree.map(lambda gradient: gradient / (1 + norm), gradients)
    optimizer.update(model, gradients)
    if model.config.load_decay is not None:
        model.update_load(stats)
    return loss, norm, stats


def make(make_group, **settings):
    config = TransformerConfig(**CONFIG, **settings)
    group = make_group(
        RANKS, num_experts=EXPERTS + settings.get("redundant_experts", 0), top_k=2, hidden=config.hidden
    )
    model = make_transformer(config, group, seed=0)
    # A large epsilon: where a gradient is all rounding, Adam would make a step of it.
    return model, nnx.Optimizer(model, optax.adamw(3e-2, eps=1e-3), wrt=nnx.Param)


def logical_parameters(model):
    """Parameters by path, of experts one replica; checks that replicas are the same bits."""
    layers = placing.placed_layers(model)
    values = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        values[path] = np.asarray(variable[...])
        if path[:-1] in layers and path[-1] in ("wi", "wo"):
            placement = jax.tree.map(np.asarray, layers[path[:-1]].places.get())
            first = values[path][placement.physical_of_logical[:, 0]]
            np.testing.assert_array_equal(values[path], first[placement.logical_of_physical])
            values[path] = first
    return values


def test_training_with_replicas_equals_training_without(make_group):
    plain, plain_optimizer = make(make_group)
    placed, placed_optimizer = make(make_group, redundant_experts=EXTRA, load_decay=0.5)
    rng = np.random.default_rng(0)
    for path, value in logical_parameters(placed).items():
        np.testing.assert_array_equal(value, dict(nnx.to_flat_state(nnx.state(plain, nnx.Param)))[path][...])

    def step():
        tokens = jnp.asarray(rng.integers(0, 11, (RANKS, 6)), jnp.int32)
        want_loss, want_norm, want = train_step(plain, plain_optimizer, tokens)
        loss, norm, stats = train_step(placed, placed_optimizer, tokens)
        np.testing.assert_allclose([loss, norm], [want_loss, want_norm], rtol=1e-5)
        np.testing.assert_array_equal(stats.tokens_per_expert, want.tokens_per_expert)
        assert (np.sum(stats.rows_per_rank, axis=1) == RANKS * 5 * 2).all()

    def compare():
        want = logical_parameters(plain)
        for path, got in logical_parameters(placed).items():
            error = np.abs(got - want[path]).max() / np.abs(want[path]).max()
            assert error < 1e-5, (path, error)

    tables = []

    def replace():
        placements = placing.compute_placements(placed)
        before = logical_parameters(placed)
        placing.replace_experts(placed, placements, placed_optimizer)
        for path, got in logical_parameters(placed).items():
            np.testing.assert_array_equal(got, before[path])
        tables.append(placements.logical_of_physical)

    for _ in range(2):
        step()
    compare()
    replace()
    step()
    compare()
    with no_compilation():  # a second time: every program is there
        placing.replace_experts(
            placed,
            placing.compute_placements(placed, load=np.arange(EXPERTS)[None]),
            placed_optimizer,
        )
        step()
    compare()
    for layer in placing.placed_layers(placed).values():
        np.testing.assert_array_equal(
            layer.places.replicas[...], np.bincount(layer.places.logical_of_physical[...])
        )
        assert layer.load[...].sum() > 0


def test_linen_layer_with_replicas_equals_one_without(make_group):
    settings = {"hidden": 16, "ffn": 8, "num_experts": EXPERTS, "top_k": 2, "quantize": None}
    plain = wep.flax.linen.MoE(**settings, group=make_group(RANKS, num_experts=EXPERTS, hidden=16))
    placed = wep.flax.linen.MoE(
        **settings,
        group=make_group(RANKS, num_experts=EXPERTS + EXTRA, hidden=16),
        redundant_experts=EXTRA,
        load_decay=0.75,
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(RANKS, 3, 16)), jnp.float32)
    plain_variables, variables = (
        nn.meta.unbox(jax.jit(m.init)(jax.random.key(0), x)) for m in (plain, placed)
    )
    assert set(variables) == {"params", "expert_placement", "expert_load"}
    want, want_stats = plain.apply(plain_variables, x, return_stats=True)
    np.testing.assert_array_equal(variables["expert_load"]["average"], 0)
    (got, stats), state = placed.apply(variables, x, return_stats=True, mutable=["expert_load"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stats.tokens_per_expert, want_stats.tokens_per_expert)
    np.testing.assert_allclose(state["expert_load"]["average"], 0.25 * want_stats.tokens_per_expert)

    old = wep.Placement(**variables["expert_placement"])
    new = wep.compute_placement(np.arange(EXPERTS), EXPERTS + EXTRA, RANKS)
    experts = {name: variables["params"].pop(name) for name in ("wi", "wo")}
    variables["params"] |= wep.move_experts(experts, old, new, placed.group)
    variables["expert_placement"] = vars(new)
    np.testing.assert_allclose(placed.apply(variables, x), want, rtol=1e-5, atol=1e-5)


def test_what_is_missing_is_named(make_group):
    settings = {"hidden": 16, "ffn": 8, "num_experts": EXPERTS, "top_k": 2}
    plain = wep.flax.MoE(
        **settings, group=make_group(RANKS, num_experts=EXPERTS, hidden=16), rngs=nnx.Rngs(0)
    )
    group = make_group(RANKS, num_experts=EXPERTS + EXTRA, hidden=16)
    placed = wep.flax.MoE(**settings, group=group, redundant_experts=EXTRA, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers with redundant_experts, got none"):
        placing.compute_placements(plain)
    with pytest.raises(ValueError, match="layers with an average load, got one without"):
        placing.compute_placements(placed)
    with pytest.raises(ValueError, match="expected a layer with load_decay"):
        placed.update_load(wep.MoEStats(jnp.zeros(EXPERTS), jnp.int32(0)))
    with pytest.raises(ValueError, match="expected a stack of 1"):
        placing.replace_experts(placed, wep.compute_placement(np.ones(EXPERTS), EXPERTS + EXTRA, RANKS))
    with pytest.raises(ValueError, match="num_experts: expected 8 as in group, got 7"):
        wep.flax.MoE(16, 8, 7, 2, group, redundant_experts=EXTRA, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="redundant_experts: expected None or at least 0"):
        wep.flax.MoE(16, 8, 7, 2, group, redundant_experts=-1, rngs=nnx.Rngs(0))
