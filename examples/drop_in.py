"""A dense Flax transformer becomes a Mixture-of-Experts one by changing one line.

    python examples/drop_in.py

The model is plain Flax: nnx.Embed, nnx.MultiHeadAttention, and a feed-forward layer in every block, trained data
parallel by spreading the batch over the devices. `wep.flax.MoE` takes the feed-forward layer's place; nothing
else changes. Both are trained on the same text.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lm.text import read_corpus

import jax_wideep as wep


class FeedForward(nnx.Module):
    """Two matrices with a GELU between them."""

    def __init__(self, hidden: int, ffn: int, *, rngs: nnx.Rngs):
        self.wi = nnx.Linear(hidden, ffn, rngs=rngs)
        self.wo = nnx.Linear(ffn, hidden, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(nnx.gelu(self.wi(x)))


class Block(nnx.Module):
    """Attention and a feed-forward layer: dense, or, given a group, experts on its ranks."""

    def __init__(self, hidden: int, ffn: int, group: wep.ExpertGroup | None, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(hidden, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, hidden, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(hidden, rngs=rngs)
        if group is None:
            self.ffn = FeedForward(hidden, ffn, rngs=rngs)
        else:  # The line that changes:
            self.ffn = wep.flax.MoE(hidden, ffn, group.num_experts, group.top_k, group, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.ffn(self.norm2(x))


class LanguageModel(nnx.Module):
    """Bytes to logits of the next byte, up to `seq` positions."""

    def __init__(self, seq: int, hidden: int, ffn: int, layers: int, group: wep.ExpertGroup | None):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(256, hidden, rngs=rngs)
        self.positions = nnx.Embed(seq, hidden, rngs=rngs)
        self.blocks = nnx.List(Block(hidden, ffn, group, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_of(model: LanguageModel) -> jax.Array:
        logits = model(tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings.

    Attributes:
      devices: CPU devices to make; where JAX finds GPUs, all of those are used.
      steps: training steps of each model.
      batch: sequences a step, over all devices.
      seq: bytes of a sequence.
      hidden: hidden size.
      ffn: inner size of the feed-forward layer, and of each expert.
      layers: blocks.
      experts: experts over all devices.
      top_k: experts a byte goes to.
    """

    devices: int = 8
    steps: int = 60
    batch: int = 16
    seq: int = 64
    hidden: int = 128
    ffn: int = 256
    layers: int = 2
    experts: int = 16
    top_k: int = 2


def main(options: Options) -> None:
    wep.use_cpu_devices(options.devices)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    corpus = read_corpus()
    with wep.ExpertGroup(
        mesh, axis="data", num_experts=options.experts, top_k=options.top_k, hidden=options.hidden
    ) as group:
        for name, group_or_none in (("dense", None), ("experts", group)):
            model = LanguageModel(options.seq, options.hidden, options.ffn, options.layers, group_or_none)
            optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
            losses = []
            for step in range(options.steps):
                tokens = corpus.train_batch(step, 0, options.batch, options.seq + 1)
                losses.append(float(train_step(model, optimizer, jax.device_put(tokens, spread))))
            print(
                f"{name:8} {parameters:9,} parameters  loss {losses[0]:.2f} -> {losses[-1]:.2f} nats a byte"
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
