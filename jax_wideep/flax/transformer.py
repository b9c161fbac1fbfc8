"""Transformer: a small decoder-only language model whose feed-forward layers are `jax_wideep.flax.MoE`.

Attention is data parallel: every device holds some of the sequences. Experts are spread over the same
devices. It is what the examples train and what `python -m jax_wideep.bench decode` runs:

    config = TransformerConfig(hidden=128, num_experts=16, top_k=2)
    with config.make_group(mesh) as group:
        model = make_transformer(config, group, seed=0)
        logits, stats = model(tokens, return_stats=True)            # [batch, seq] -> [batch, seq, vocab]

        prefill, decode_step = compile_steps(model)                 # under jax.jit
        logits, cache = prefill(prompt, model.init_cache(batch, max_len=512))
        logits, cache = decode_step(next_tokens, cache)             # [batch] -> [batch, vocab]
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_wideep._types import Float, Float32, Int32
from jax_wideep.flax.nnx import MoE
from jax_wideep.group import ExpertGroup
from jax_wideep.low_latency import Quantize
from jax_wideep.moe import Activation, Mode, MoEStats, Remat
from jax_wideep.plan import Overflow
from jax_wideep.routing import RouterConfig


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Static settings of a Transformer; hashable.

    Attributes:
      vocab: number of token ids; 256 for bytes.
      hidden: hidden size; a multiple of num_heads, and of 128 for an FP8 wire.
      num_layers: blocks of attention and MoE.
      num_heads: attention heads; hidden / num_heads must be even, since RoPE rotates pairs.
      ffn: inner size of an expert.
      num_experts: experts over all ranks.
      top_k: experts per token.
      router: how experts are chosen; None is softmax with renormalised top-k.
      activation: of the experts, see MoE.
      shared_ffn: inner size of the shared expert; 0 for none.
      shared_gate: whether a learned score of the token gates the shared expert.
      use_bias: whether experts have biases.
      weigh_input: whether gate weights multiply the experts' inputs.
      capacity_factor: rows a rank can receive, as a multiple of the average load; None drops nothing.
      overflow: what happens above it, see MoE; "spill" loses no token.
      microbatches: parts of a rank's tokens that take turns in the experts, see MoE.
      expert_chunk: rows that experts work on at a time, see MoE.
      remat: what the experts' backward pass keeps, see MoE.
      quantize: wire format of decode.
      redundant_experts: places for replicas of hot experts in every layer, see MoE; None: no placement.
      load_decay: of the average load that layers keep, see MoE.
      rope_theta: base of the rotary position embedding (arXiv:2104.09864).
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      ValueError: sizes that do not divide as they must.
    """

    vocab: int = 256
    hidden: int = 128
    num_layers: int = 2
    num_heads: int = 4
    ffn: int = 256
    num_experts: int = 16
    top_k: int = 2
    router: RouterConfig | None = None
    activation: Activation = "swiglu"
    shared_ffn: int = 0
    shared_gate: bool = False
    use_bias: bool = False
    weigh_input: bool = False
    capacity_factor: float | None = None
    overflow: Overflow = "drop"
    microbatches: int = 1
    expert_chunk: int | None = None
    remat: Remat = "none"
    quantize: Quantize = "fp8"
    redundant_experts: int | None = None
    load_decay: float | None = None
    rope_theta: float = 10_000.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.num_heads):
            raise ValueError(
                f"TransformerConfig: hidden: expected a multiple of 2 * num_heads={2 * self.num_heads}, got "
                f"{self.hidden}; change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden // self.num_heads

    def make_group(
        self, mesh: jax.sharding.Mesh, axis: str | tuple[str, ...] | None = None, **settings: Any
    ) -> ExpertGroup:
        """The ExpertGroup that a model with these settings needs.

        Args:
          mesh: mesh of the devices.
          axis: mesh axes that experts are spread over; None is all of them.
          **settings: further arguments of ExpertGroup: `backend`, `chunk`, `deadline_s`.
        """
        return ExpertGroup(
            mesh,
            axis=tuple(mesh.axis_names) if axis is None else axis,
            num_experts=self.num_experts + (self.redundant_experts or 0),
            top_k=self.top_k,
            hidden=self.hidden,
            **settings,
        )


class Cache(NamedTuple):
    """Keys and values of all positions seen so far; a pytree, laid out over the mesh by sequence.

    Attributes:
      keys: [layers, batch, max_len, heads, head_dim].
      values: the same shape.
      length: positions filled, the same for all sequences.
    """

    keys: Float[jax.Array, "layers batch max_len heads head_dim"]
    values: Float[jax.Array, "layers batch max_len heads head_dim"]
    length: Int32[jax.Array, ""]


def _write_at(cached: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """Keys or values [batch, max_len, ..] with those of `new` from position `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), start, axis=1)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions (arXiv:2104.09864)."""

    def __init__(self, config: TransformerConfig, mesh: jax.sharding.Mesh, *, rngs: nnx.Rngs):
        self.config = config
        self.qkv = _linear(config.hidden, 3 * config.hidden, config, mesh, rngs)
        self.out = _linear(config.hidden, config.hidden, config, mesh, rngs)

    def __call__(
        self,
        x: Float[jax.Array, "batch seq hidden"],
        cached: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends within x, or, given keys and values of `start` positions before it, over those as well.

        Returns:
          Outputs, and the cached keys and values with those of x written behind `start`.
        """
        batch, seq, _ = x.shape
        heads = (batch, seq, self.config.num_heads, self.config.head_dim)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        position = start + jnp.arange(seq)
        query = rotate(query, position, self.config.rope_theta)
        key = rotate(key, position, self.config.rope_theta)
        if cached is None:
            out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            cached = (_write_at(cached[0], key, start), _write_at(cached[1], value, start))
            seen = jnp.arange(cached[0].shape[1])[None, :] <= position[:, None]
            out = jax.nn.dot_product_attention(query, *cached, mask=seen[None, None])
        return self.out(out.reshape(x.shape)), cached


class Block(nnx.Module):
    """Attention, then experts, each on a normalised input and added to it."""

    def __init__(self, config: TransformerConfig, group: ExpertGroup, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, group.mesh, rngs)
        self.attention = Attention(config, group.mesh, rngs=rngs)
        self.moe_norm = _norm(config, group.mesh, rngs)
        self.moe = MoE(
            config.hidden,
            config.ffn,
            config.num_experts,
            config.top_k,
            group,
            rngs=rngs,
            router=config.router,
            activation=config.activation,
            shared_ffn=config.shared_ffn,
            shared_gate=config.shared_gate,
            use_bias=config.use_bias,
            weigh_input=config.weigh_input,
            capacity_factor=config.capacity_factor,
            overflow=config.overflow,
            microbatches=config.microbatches,
            expert_chunk=config.expert_chunk,
            remat=config.remat,
            quantize=config.quantize,
            redundant_experts=config.redundant_experts,
            load_decay=config.load_decay,
            param_dtype=config.param_dtype,
        )

    def __call__(
        self,
        x: jax.Array,
        cached: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
        *,
        mode: Mode,
        return_stats: bool = False,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None, MoEStats | None]:
        with jax.named_scope("attention"):
            attended, cached = self.attention(self.attention_norm(x), cached, start)
            x = x + attended
        result = self.moe(self.moe_norm(x), mode=mode, return_stats=return_stats)
        out, stats = result if isinstance(result, tuple) else (result, None)
        return x + out, cached, stats


class Transformer(nnx.Module):
    """A decoder-only language model of MoE blocks.

    Args:
      config: static settings.
      group: from `config.make_group`; its mesh axes must be of type Auto.
      rngs: uses the stream `params`.
    """

    def __init__(self, config: TransformerConfig, group: ExpertGroup, *, rngs: nnx.Rngs):
        if any(kind != jax.sharding.AxisType.Auto for kind in group.mesh.axis_types):
            raise ValueError(
                f"Transformer: group: expected a mesh of Auto axes, got {group.mesh.axis_types}; make it "
                "with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * ndim)"
            )
        self.config = config
        self.group = group
        embed_init = nnx.with_partitioning(jax.nn.initializers.normal(1.0), (None, None), mesh=group.mesh)
        self.embedding = nnx.Param(
            embed_init(rngs.params(), (config.vocab, config.hidden), config.param_dtype)
        )
        self.blocks = nnx.List(Block(config, group, rngs=rngs) for _ in range(config.num_layers))
        self.norm = _norm(config, group.mesh, rngs)
        # Small, so that a new model's prediction is close to uniform.
        self.unembed = _linear(config.hidden, config.vocab, config, group.mesh, rngs, scale=0.01)

    def __call__(
        self, tokens: Int32[jax.Array, "batch seq"], *, return_stats: bool = False
    ) -> Float32[jax.Array, "batch seq vocab"] | tuple[Float32[jax.Array, "batch seq vocab"], MoEStats]:
        """Logits of the token after each one; for training.

        Args:
          tokens: ids below `config.vocab`. Fastest where batch is a multiple of the devices.
          return_stats: whether to return statistics as well.

        Returns:
          Logits; with `return_stats` also a MoEStats whose arrays have a leading axis of layers.
        """
        x = self._embed(tokens)
        of_layers = []
        for block in self.blocks:
            x, _, stats = block(x, mode="throughput", return_stats=return_stats)
            x = self._split_batch(x)
            of_layers.append(stats)
        logits = self._logits(x)
        if not return_stats:
            return logits
        return logits, jax.tree.map(lambda *layers: jnp.stack(layers), *of_layers)

    def update_load(self, stats: MoEStats) -> None:
        """Takes a step's statistics, [layers, ...], into the layers' average load; see MoE."""
        for layer, block in enumerate(self.blocks):
            block.moe.update_load(jax.tree.map(lambda array, layer=layer: array[layer], stats))

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """An empty cache for `batch` sequences of up to `max_len` tokens, prompt included."""
        config = self.config
        shape = (config.num_layers, batch, max_len, config.num_heads, config.head_dim)
        sharding = self._sharding(batch, leading=1)

        def zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
            return jnp.zeros(shape, dtype, device=sharding)

        return Cache(
            zeros(shape, config.dtype, sharding),
            zeros(shape, config.dtype, sharding),
            zeros((), jnp.int32, NamedSharding(self.group.mesh, PartitionSpec())),
        )

    def prefill(
        self, tokens: Int32[jax.Array, "batch seq"], cache: Cache
    ) -> tuple[Float32[jax.Array, "batch vocab"], Cache]:
        """Reads prompts, all of one length, in the throughput shape.

        Returns:
          Logits of the token after the last one, and the cache with `seq` more positions. Positions past the
          cache's `max_len` are the caller's to avoid: they overwrite its last ones.
        """
        return self._cached(tokens, cache, "throughput")

    def decode_step(
        self, tokens: Int32[jax.Array, " batch"], cache: Cache
    ) -> tuple[Float32[jax.Array, "batch vocab"], Cache]:
        """Takes one more token of every sequence, in the low-latency shape; the rest is as in `prefill`."""
        return self._cached(tokens[:, None], cache, "low_latency")

    def _cached(self, tokens: jax.Array, cache: Cache, mode: Mode) -> tuple[jax.Array, Cache]:
        x = self._embed(tokens)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            cached = (cache.keys[layer], cache.values[layer])
            x, written, _ = block(x, cached, cache.length, mode=mode)
            assert written is not None  # a block that is given a cache returns one
            x = self._split_batch(x)
            keys.append(written[0])
            values.append(written[1])
        cache = Cache(jnp.stack(keys), jnp.stack(values), cache.length + tokens.shape[1])
        return self._logits(x[:, -1]), cache

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self._split_batch(self.embedding[...].astype(self.config.dtype)[tokens])

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.unembed(self.norm(x)).astype(jnp.float32)

    def _split_batch(self, x: jax.Array) -> jax.Array:
        if self.group.is_manual():  # called inside a shard_map, on one rank's sequences
            return x
        return jax.lax.with_sharding_constraint(x, self._sharding(x.shape[0]))

    def _sharding(self, batch: int, leading: int = 0) -> NamedSharding:
        """Spreads sequences over the devices if that is even; `leading` axes come before them."""
        mesh = self.group.mesh
        axes = tuple(mesh.axis_names) if batch % mesh.size == 0 else None
        return NamedSharding(mesh, PartitionSpec(*[None] * leading, axes))


def make_transformer(config: TransformerConfig, group: ExpertGroup, seed: int) -> Transformer:
    """A Transformer with random parameters, each made where it lies: no device holds all experts, and the devices
    may belong to several processes.
    """

    def make() -> Transformer:
        return Transformer(config, group, rngs=nnx.Rngs(seed))

    graph, abstract = nnx.split(nnx.eval_shape(make))
    everywhere = NamedSharding(group.mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: leaf.sharding or everywhere, abstract)
    state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings)()
    return nnx.merge(graph, state)


Step = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]


def compile_steps(model: Transformer) -> tuple[Step, Step]:
    """`model.prefill` and `model.decode_step` under `jax.jit`, with the parameters of now.

    The cache passed in is donated. Faster per call than `nnx.jit`, which looks through the model's attributes
    every time.
    """
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=2)
    def prefill(state: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graph, state).prefill(tokens, cache)

    @functools.partial(jax.jit, donate_argnums=2)
    def decode_step(state: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return nnx.merge(graph, state).decode_step(tokens, cache)

    return functools.partial(prefill, state), functools.partial(decode_step, state)


def rotate(
    x: Float[jax.Array, "batch seq heads head_dim"], position: Int32[jax.Array, " seq"], theta: float
) -> Float[jax.Array, "batch seq heads head_dim"]:
    """Rotates pairs (x[i], x[i + head_dim / 2]) by position * theta^(-2 i / head_dim) (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    angle = position[:, None] * jnp.exp(jnp.arange(half) * (-math.log(theta) / half))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _linear(
    n_in: int,
    n_out: int,
    config: TransformerConfig,
    mesh: jax.sharding.Mesh,
    rngs: nnx.Rngs,
    scale: float = 1.0,
) -> nnx.Linear:
    """Without bias; `scale` times the usual variance 1 / n_in of the kernel."""
    init = jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
    init = nnx.with_partitioning(init, (None, None), mesh=mesh)
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=False,
        kernel_init=init,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _norm(config: TransformerConfig, mesh: jax.sharding.Mesh, rngs: nnx.Rngs) -> nnx.RMSNorm:
    init = nnx.with_partitioning(jax.nn.initializers.ones, (None,), mesh=mesh)
    return nnx.RMSNorm(
        config.hidden, scale_init=init, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )
