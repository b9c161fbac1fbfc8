"""A Flax decoder with `ragged_dot` experts becomes expert-parallel by changing one line.

    python examples/drop_in.py                                                     # 8 CPU devices
    python examples/drop_in.py --dtype bfloat16 --hidden 1024 --ffn 512 ..         # all GPUs, where JAX finds some

The model is plain Flax, trained data parallel: the batch is spread over the devices, and each device has all experts,
sorts its own tokens by expert, and multiplies with `jax.lax.ragged_dot`. `wep.flax.MoE` has the same parameters and the
same routing; its experts are spread over the devices, and tokens travel. Both are trained from the same parameters on
the same text, the standard library's source, so their losses are the same but for the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from lm.text import read_corpus

import jax_wideep as wep

Kind = Literal["ragged_dot", "jax_wideep"]
BY_TOKEN, EVERYWHERE = PartitionSpec("data"), PartitionSpec()


class RaggedMoE(nnx.Module):
    """SwiGLU experts, all of them on every device."""

    def __init__(
        self, hidden: int, ffn: int, num_experts: int, top_k: int, mesh: Mesh, *, dtype: str, rngs: nnx.Rngs
    ):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = nnx.Linear(hidden, num_experts, use_bias=False, rngs=rngs)
        self.wi = nnx.Param(init(rngs.params(), (num_experts, hidden, 2 * ffn), jnp.float32))
        self.wo = nnx.Param(init(rngs.params(), (num_experts, ffn, hidden), jnp.float32))
        self.dtype = dtype
        self.on_each_device = jax.shard_map(
            functools.partial(self.experts, num_experts, top_k),
            mesh=mesh,
            in_specs=(BY_TOKEN, BY_TOKEN, EVERYWHERE, EVERYWHERE),
            out_specs=BY_TOKEN,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        weights = self.wi[...].astype(self.dtype), self.wo[...].astype(self.dtype)
        return self.on_each_device(x, self.gate(x.astype(jnp.float32)), *weights)

    @staticmethod
    def experts(
        num_experts: int, top_k: int, x: jax.Array, logits: jax.Array, wi: jax.Array, wo: jax.Array
    ) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])
        scores = jax.nn.softmax(logits.reshape(-1, num_experts))
        gates, chosen = jax.lax.top_k(scores, top_k)
        gates = gates / gates.sum(axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=num_experts)
        gate, up = jnp.split(jax.lax.ragged_dot(tokens[order // top_k], wi, sizes), 2, axis=-1)
        y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, wo, sizes)
        y = y.astype(jnp.float32) * gates.reshape(-1)[order, None]
        out = jnp.zeros(tokens.shape, jnp.float32).at[order // top_k].add(y)
        return out.astype(x.dtype).reshape(x.shape)


class Block(nnx.Module):
    """Attention, and experts of either kind."""

    def __init__(self, options: Options, kind: Kind, group: wep.ExpertGroup, *, rngs: nnx.Rngs):
        hidden, sizes = options.hidden, (options.hidden, options.ffn, options.experts, options.top_k)
        self.norm1 = nnx.LayerNorm(hidden, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, hidden, dtype=options.dtype, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(hidden, rngs=rngs)
        if kind == "ragged_dot":
            self.experts = RaggedMoE(*sizes, group.mesh, dtype=options.dtype, rngs=rngs)
        else:  # The line that changes:
            self.experts = wep.flax.MoE(*sizes, group, dtype=options.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.experts(self.norm2(x))


class Decoder(nnx.Module):
    """Bytes to logits of the next byte, up to `seq` positions."""

    def __init__(self, options: Options, kind: Kind, group: wep.ExpertGroup):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(256, options.hidden, rngs=rngs)
        self.positions = nnx.Embed(options.seq, options.hidden, rngs=rngs)
        self.blocks = nnx.List(Block(options, kind, group, rngs=rngs) for _ in range(options.layers))
        self.norm = nnx.LayerNorm(options.hidden, rngs=rngs)
        self.out = nnx.Linear(options.hidden, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: Decoder, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_of(model: Decoder) -> jax.Array:
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
      ffn: inner size of each expert.
      layers: blocks.
      experts: experts over all devices.
      top_k: experts a byte goes to.
      learning_rate: of Adam, constant; too large for a model, its losses jump, and no two runs agree.
      dtype: of the products; parameters are float32.
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
    learning_rate: float = 2e-3
    dtype: Literal["float32", "bfloat16"] = "float32"


def train(options: Options, kind: Kind, group: wep.ExpertGroup) -> list[float]:
    """Losses of all steps; prints how it went."""
    model = Decoder(options, kind, group)
    optimizer = nnx.Optimizer(model, optax.adam(options.learning_rate), wrt=nnx.Param)
    # Each parameter and its moments where they belong: experts as the layer's metadata say, all others on every device.
    graph, state = nnx.split((model, optimizer))
    model, optimizer = nnx.merge(graph, jax.device_put(state, nnx.get_named_sharding(state, group.mesh)))
    corpus, spread = read_corpus(), NamedSharding(group.mesh, BY_TOKEN)
    losses, seconds = [], []
    for step in range(options.steps):
        tokens = corpus.train_batch(step, 0, options.batch, options.seq + 1)[:]
        began = time.perf_counter()
        losses.append(float(train_step(model, optimizer, jax.device_put(tokens, spread))))
        seconds.append(time.perf_counter() - began)
    ours = jax.tree.leaves(nnx.state(model, nnx.Param))
    held = sum(leaf.addressable_shards[0].data.size for leaf in ours)
    print(
        f"{kind:10}  loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte  "
        f"{1e3 * statistics.median(seconds[1:]):8.1f} ms a step  "
        f"{held:,} of {sum(leaf.size for leaf in ours):,} parameters on a device",
        flush=True,
    )
    return losses


def main(options: Options) -> None:
    wep.use_cpu_devices(options.devices)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    settings = {"num_experts": options.experts, "top_k": options.top_k, "hidden": options.hidden}
    with wep.ExpertGroup(mesh, axis="data", **settings) as group:
        print(f"{mesh.size} x {mesh.devices.flat[0].device_kind}, backend {group.backend}")
        curves = [train(options, kind, group) for kind in ("ragged_dot", "jax_wideep")]
    apart = [abs(a - b) for a, b in zip(*curves, strict=True)]
    print(
        f"losses differ by {apart[0]:.1e} at the first step, by {max(apart):.1e} at most, "
        f"by {statistics.median(apart):.1e} in the middle"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
