"""Training state and steps: loss with the router's losses, AdamW, held-out loss."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep.flax.transformer import Transformer, TransformerConfig, make_transformer


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
    """

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    ffn: int = 256
    experts: int = 16
    top_k: int = 2
    capacity_factor: float = 2.0

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
            **settings,
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
      dropped: selections dropped, over all layers.
      tokens_per_expert: [layers, experts] selections.
    """

    loss: jax.Array
    dropped: jax.Array
    tokens_per_expert: jax.Array


def describe(model: Transformer) -> str:
    """A line about a model's sizes and one about where it runs."""
    config, group = model.config, model.group
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return (
        f"{parameters / 1e6:.1f} M parameters: {config.num_layers} layers, hidden {config.hidden}, "
        f"{config.num_experts} experts of inner size {config.ffn}, top-{config.top_k}\n"
        f"{group.num_ranks} {jax.devices()[0].platform} devices, {group.local_experts} experts of every layer on "
        f"each, exchange backend {group.backend!r}"
    )


def make_mesh() -> jax.sharding.Mesh:
    """All devices on one axis, over which both sequences and experts are spread."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def make_model(config: TransformerConfig, seed: int, **group_settings: Any) -> Transformer:
    """A model with random weights on all devices. Its group stays open as long as the model lives."""
    group = config.make_group(make_mesh(), **group_settings)
    return make_transformer(config, group, seed)


def make_optimizer(model: Transformer, learning_rate: float, steps: int) -> nnx.Optimizer:
    """AdamW, warmed up and then lowered along a cosine, gradients clipped to norm 1."""
    warmup = max(1, min(20, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.01)
    )
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    # Moments lie where their parameters do, but counters are on one device: put them on all.
    everywhere = NamedSharding(model.group.mesh, PartitionSpec())
    state = nnx.state(optimizer)
    nnx.update(optimizer, jax.tree.map(lambda x: jax.device_put(x, everywhere) if x.ndim == 0 else x, state))
    return optimizer


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


@nnx.jit(static_argnames="weights", donate_argnames=("model", "optimizer"))
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array, weights: LossWeights
) -> StepReport:
    """One update of the model and the optimiser, in place."""
    value_and_grad = nnx.value_and_grad(training_loss, has_aux=True)
    (_, (loss, stats)), gradients = value_and_grad(model, tokens, weights)
    optimizer.update(model, gradients)
    return StepReport(loss, jnp.sum(stats.overflow), stats.tokens_per_expert)


@nnx.jit
def _loss_of_batch(model: Transformer, tokens: jax.Array) -> jax.Array:
    return next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])


def held_out_loss(model: Transformer, batches: np.ndarray) -> float:
    """Mean next-byte loss over [count, batch, seq + 1], nats a byte."""
    losses = [_loss_of_batch(model, put_batch(model, tokens)) for tokens in batches]
    return float(np.mean(jax.device_get(losses)))


def put_batch(model: Transformer, tokens: np.ndarray) -> jax.Array:
    """Spreads sequences over the devices, if they can be spread evenly."""
    mesh = model.group.mesh
    axes = mesh.axis_names if tokens.shape[0] % mesh.size == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    # Devices may belong to other processes, which make the rest of the array.
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])
