"""Training state and steps: loss with the router's losses, AdamW on float32 weights, held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep.flax import placing
from jax_wideep.flax.transformer import Transformer, TransformerConfig, make_transformer
from lm.text import Windows

_CLIP_NORM = 1.0
# Of the average load that experts are placed by: it forgets half in 14 steps.
_LOAD_DECAY = 0.95


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model.

    Attributes:
      hidden: hidden size, a multiple of 128.
      layers: blocks of attention and experts.
      heads: attention heads.
      ffn: inner size of an expert.
      experts: experts over all devices.
      top_k: experts a byte goes to.
      capacity_factor: rows a device can receive, as a multiple of the average; what is above is dropped.
      redundant_experts: places in every layer for replicas of hot experts; none has no placement of experts.
      dtype: of parameters and computation. The router decides in float32 all the same, and the optimiser keeps
        float32 weights.
    """

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    ffn: int = 256
    experts: int = 16
    top_k: int = 2
    capacity_factor: float = 2.0
    redundant_experts: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def config(self, **settings: Any) -> TransformerConfig:
        """The model with these sizes; `settings` are further ones."""
        return TransformerConfig(
            hidden=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            ffn=self.ffn,
            num_experts=self.experts,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            redundant_experts=self.redundant_experts,
            load_decay=None if self.redundant_experts is None else _LOAD_DECAY,
            **{"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.dtype), **settings},
        )


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the router's losses beside the next-byte loss.

    Attributes:
      aux: load-balance loss, the mean over layers (arXiv:2101.03961).
      z: z-loss, the mean over layers (arXiv:2202.08906).
    """

    aux: float = 1e-2
    z: float = 1e-3


class StepReport(NamedTuple):
    """What one training step saw; a pytree of arrays.

    Attributes:
      loss: next-byte loss before the step's update, nats a byte, without the router's losses.
      stats: of the layers, each array with a leading axis of layers.
    """

    loss: jax.Array
    stats: wep.MoEStats


def describe(model: Transformer) -> str:
    """A line about a model's sizes and one about where it runs."""
    config, group = model.config, model.group
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{num_parameters(model) / 1e6:.1f} M parameters: {config.num_layers} layers, hidden {config.hidden}, "
        f"{config.num_experts} experts of inner size {config.ffn}, top-{config.top_k}\n"
        f"{group.num_ranks} {jax.devices()[0].platform} devices, {group.local_experts} experts of every layer on "
        f"each, exchange backend {group.backend!r}{processes}"
    )


def num_parameters(model: Transformer) -> int:
    """Numbers in all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def make_mesh() -> jax.sharding.Mesh:
    """All devices on one axis, over which both sequences and experts are spread."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def make_model(config: TransformerConfig, seed: int, **group_settings: Any) -> Transformer:
    """A model with random weights on all devices. Its group stays open as long as the model lives."""
    group = config.make_group(make_mesh(), **group_settings)
    return make_transformer(config, group, seed)


def make_schedule(
    learning_rate: float, steps: int, warmup: int | None = None, final: float = 0.0
) -> optax.Schedule:
    """Learning rate by step: raised linearly from 0 over `warmup` steps, then lowered along a cosine.

    Args:
      learning_rate: the highest.
      steps: steps in all, at the end of which it is `final` times the highest.
      warmup: None is a tenth of the steps, at most 20.
      final: see steps.
    """
    warmup = max(1, min(20, steps // 10)) if warmup is None else warmup
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(steps, warmup + 1), end_value=final * learning_rate
    )


def make_optimizer(model: Transformer, learning_rate: optax.ScalarOrSchedule) -> nnx.Optimizer:
    """AdamW; all its state is float32, whatever the parameters are. `train_step` clips the gradients."""
    chain = optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.01)
    if model.config.param_dtype != jnp.float32:
        chain = with_float32_weights(chain)
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    # Moments lie where their parameters do, but counters are on one device: put them on all, of every process.
    everywhere = NamedSharding(model.group.mesh, PartitionSpec())

    def spread(leaf: jax.Array) -> jax.Array:
        if leaf.ndim:
            return leaf
        value = np.asarray(leaf)
        return jax.make_array_from_callback((), everywhere, lambda _: value)

    nnx.update(optimizer, jax.tree.map(spread, nnx.state(optimizer)))
    return optimizer


class Float32Weights(NamedTuple):
    """State of `with_float32_weights`: the weights that steps add up in, and the inner optimiser's state."""

    weights: optax.Params
    inner: optax.OptState


def with_float32_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets `inner` work on float32 copies of the parameters, which then are those copies, rounded.

    In bfloat16 a step smaller than 2^-9 of a parameter would be lost (mixed-precision training, arXiv:1710.03740).
    """

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: optax.Params) -> Float32Weights:
        # A copy also where a parameter is float32 already: both are donated to a step.
        weights = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
        return Float32Weights(weights, inner.init(weights))

    def update(updates: optax.Updates, state: Float32Weights, params: optax.Params | None = None) -> Any:
        updates, inner_state = inner.update(to_float32(updates), state.inner, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        # The caller adds this in float32 and rounds the sum, which gives the rounded weights.
        change = jax.tree.map(
            lambda new, old: new.astype(old.dtype).astype(jnp.float32) - old.astype(jnp.float32),
            weights,
            params,
        )
        return change, Float32Weights(weights, inner_state)

    return optax.GradientTransformation(init, update)


def next_byte_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross entropy in nats; logits [batch, seq, vocab], targets [batch, seq]."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def training_loss(
    model: Transformer, tokens: jax.Array, weights: LossWeights
) -> tuple[jax.Array, tuple[jax.Array, wep.MoEStats]]:
    """The loss that is minimised, and beside it the next-byte loss and the layers' statistics.

    tokens [batch, seq + 1]: every byte but the last is read, every byte but the first is predicted.
    """
    logits, stats = model(tokens[:, :-1], return_stats=True)
    loss = next_byte_loss(logits, tokens[:, 1:])
    router_loss = weights.aux * jnp.mean(stats.aux_loss) + weights.z * jnp.mean(stats.z_loss)
    return loss + router_loss, (loss, stats)


@nnx.jit(static_argnames=("weights", "microbatches"), donate_argnames=("model", "optimizer"))
def train_step(
    model: Transformer,
    optimizer: nnx.Optimizer,
    tokens: jax.Array,
    weights: LossWeights,
    microbatches: int = 1,
) -> StepReport:
    """One update of the model and the optimiser, in place, by gradients clipped to a norm of 1.

    Args:
      model: the model.
      optimizer: its optimiser.
      tokens: [batch, seq + 1].
      weights: of the losses.
      microbatches: parts of the batch that go through the model one after the other, so that only one part's
        activations are kept. Their gradients are averaged in float32.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params: Any, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, wep.MoEStats]]:
        return training_loss(nnx.merge(graph, params, rest), tokens, weights)

    def gradients_of(tokens: jax.Array) -> tuple[Any, jax.Array, wep.MoEStats]:
        (_, (loss, stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, tokens)
        return gradients, loss, stats

    if microbatches == 1:
        gradients, loss, stats = gradients_of(tokens)
    else:
        batch, length = tokens.shape
        # Every device's sequences are dealt out to the parts in turn: none moves to another device.
        parts = tokens.reshape(batch // microbatches, microbatches, length).swapaxes(0, 1)

        def accumulate(total: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(
                lambda sums, new: sums + new.astype(sums.dtype), total, gradients_of(part)
            ), None

        kinds = jax.eval_shape(gradients_of, parts[0])
        zeros = jax.tree.map(lambda kind: jnp.zeros(kind.shape, _sum_dtype(kind.dtype)), kinds)
        (gradients, loss, stats), _ = jax.lax.scan(accumulate, zeros, parts)
        gradients, loss = jax.tree.map(lambda sums: sums / microbatches, (gradients, loss))
    # Replicas of an expert get the gradient that the expert would have, and count once in the norm.
    gradients = placing.sum_replica_gradients(model, gradients)
    scale = jnp.minimum(1.0, _CLIP_NORM / jnp.maximum(placing.global_norm(model, gradients), 1e-12))
    optimizer.update(model, jax.tree.map(lambda gradient: gradient * scale, gradients))
    if model.config.load_decay is not None:
        model.update_load(stats)
    return StepReport(loss, stats)


def _sum_dtype(dtype: Any) -> Any:
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype


@nnx.jit
def _loss_of_batch(model: Transformer, tokens: jax.Array) -> jax.Array:
    return next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])


def held_out_loss(model: Transformer, batches: Sequence[Windows]) -> float:
    """Mean next-byte loss over batches [batch, seq + 1], nats a byte."""
    losses = [_loss_of_batch(model, put_batch(model, tokens)) for tokens in batches]
    return float(np.mean(jax.device_get(losses)))


def put_batch(model: Transformer, tokens: np.ndarray | Windows) -> jax.Array:
    """Spreads sequences over the devices, if they can be spread evenly.

    Each process asks for the rows of its own devices only.
    """
    mesh = model.group.mesh
    axes = mesh.axis_names if tokens.shape[0] % mesh.size == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])
