"""MoE: the drop-in layer for Flax nnx."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_wideep.flax import _layer
from jax_wideep.group import ExpertGroup
from jax_wideep.load import update_average
from jax_wideep.low_latency import Quantize
from jax_wideep.moe import Activation, Mode, MoEStats, Remat
from jax_wideep.placement import Placement
from jax_wideep.plan import Overflow
from jax_wideep.routing import RouterConfig, update_selection_bias


class SelectionBias(nnx.Variable):
    """The router's selection bias: state, not a parameter; no gradient reaches it."""


class ExpertPlacement(nnx.Variable):
    """One array of a layer's placement: state, not a parameter."""


class ExpertLoad(nnx.Variable):
    """The exponential average of selections per expert: state, not a parameter."""


class Places(nnx.Module):
    """A layer's Placement as state; `get` and `set` take and give it whole."""

    def __init__(self, placement: Placement):
        self.logical_of_physical = ExpertPlacement(jnp.asarray(placement.logical_of_physical))
        self.replicas = ExpertPlacement(jnp.asarray(placement.replicas))
        self.physical_of_logical = ExpertPlacement(jnp.asarray(placement.physical_of_logical))

    def get(self) -> Placement:
        return Placement(self.logical_of_physical[...], self.replicas[...], self.physical_of_logical[...])

    def set(self, placement: Placement) -> None:
        """Takes another placement of the same sizes. It moves no parameters: see `flax.replace_experts`."""
        for name in ("logical_of_physical", "replicas", "physical_of_logical"):
            variable, array = getattr(self, name), jnp.asarray(getattr(placement, name))
            if array.shape != variable.shape:
                raise ValueError(
                    f"Places.set: placement: expected {name} of shape {list(variable.shape)}, got "
                    f"{list(array.shape)}; make it with the layer's sizes"
                )
            old = variable[...]
            if not isinstance(old, jax.core.Tracer) and not isinstance(array, jax.core.Tracer):
                # Laid out as the one before, or the next compiled step would compile again.
                host = np.asarray(array)
                array = jax.make_array_from_callback(host.shape, old.sharding, host.__getitem__)
            variable[...] = array


class Gate(nnx.Module):
    """The router's parameters.

    Attributes:
      kernel: float32 [hidden, num_experts].
      bias: float32 [num_experts] if the router's logits have one, otherwise None.
      selection_bias: float32 [num_experts] if the router uses one, otherwise None.
    """

    def __init__(self, kernel: nnx.Param, bias: nnx.Param | None, selection_bias: SelectionBias | None):
        self.kernel = kernel
        self.bias = bias
        self.selection_bias = selection_bias


class MoE(nnx.Module):
    """A Mixture-of-Experts feed-forward layer with experts spread over the group's ranks.

    Takes and returns global arrays, under `nnx.jit` or not; it runs its own `jax.shard_map` over the group's
    mesh. Inside somebody else's shard_map over the group's axes it works on the shards it is given.

    Parameters: `gate.kernel` [hidden, num_experts] float32; `wi` [num_experts, hidden, 2 * ffn] (gate before
    up; ffn columns without a gate); `wo` [num_experts, ffn, hidden]; with biases `bi`, `bo`, one row per expert,
    and `gate.bias`; with shared experts `shared_wi`, `shared_wo`, `shared_gate` [hidden, 1]. Experts carry
    partitioning metadata over `group.axis`.

    Args:
      hidden: hidden size.
      ffn: inner size of an expert.
      num_experts: experts over all ranks.
      top_k: experts per token.
      group: the ExpertGroup.
      rngs: uses the stream `params`.
      router: how experts are chosen; None is softmax with renormalised top-k.
      activation: "swiglu", "gelu", "relu2" or a ClampedSwiGLU.
      shared_ffn: inner size of a shared expert that every token goes through (n shared experts of size f are
        one of size n * f); 0 for none.
      shared_gate: whether the shared expert's output is multiplied by the sigmoid of a learned score of the token.
      use_bias: whether experts have biases.
      weigh_input: whether gate weights multiply the experts' inputs in place of their outputs, see moe_ffn.
      mode: "throughput" for training and prefill, "low_latency" for decode; calls may choose the other.
      capacity: rows a rank can receive; None, without capacity_factor too, is the worst case, which drops nothing.
      capacity_factor: the same as a multiple of tokens * top_k per rank, the average load; 1.5 under "spill" if
        neither is given.
      overflow: "drop", "error" or "spill", see moe_ffn.
      microbatches: parts of a rank's tokens that take turns, see moe_ffn.
      expert_chunk: rows that experts work on at a time, see moe_ffn.
      remat: what the backward pass keeps, see moe_ffn.
      quantize: wire format of low-latency mode.
      redundant_experts: places beside num_experts for replicas of hot experts; the group then has num_experts +
        redundant_experts, and so have `wi`, `wo` (and `bi`, `bo`). The placement is the state `places`; see
        docs/placement.md. None: no placement.
      load_decay: of the exponential average of selections per expert, the state `load`, which `update_load` moves;
        None keeps none.
      batch_axes: mesh axes that tokens are spread over; None is all of them.
      dtype: of the computation; None is the input's.
      param_dtype: of the experts' parameters.

    Raises:
      ValueError: settings that contradict each other or the group.
    """

    wi: nnx.Param
    wo: nnx.Param

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        top_k: int,
        group: ExpertGroup,
        *,
        rngs: nnx.Rngs,
        router: RouterConfig | None = None,
        activation: Activation = "swiglu",
        shared_ffn: int = 0,
        shared_gate: bool = False,
        use_bias: bool = False,
        weigh_input: bool = False,
        mode: Mode = "throughput",
        capacity: int | None = None,
        capacity_factor: float | None = None,
        overflow: Overflow = "drop",
        microbatches: int = 1,
        expert_chunk: int | None = None,
        remat: Remat = "none",
        quantize: Quantize = "fp8",
        redundant_experts: int | None = None,
        load_decay: float | None = None,
        batch_axes: tuple[str, ...] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.config = _layer.make_config(
            hidden=hidden,
            ffn=ffn,
            num_experts=num_experts,
            top_k=top_k,
            group=group,
            router=router,
            activation=activation,
            shared_ffn=shared_ffn,
            shared_gate=shared_gate,
            use_bias=use_bias,
            weigh_input=weigh_input,
            mode=mode,
            capacity=capacity,
            capacity_factor=capacity_factor,
            overflow=overflow,
            microbatches=microbatches,
            expert_chunk=expert_chunk,
            remat=remat,
            quantize=quantize,
            redundant_experts=redundant_experts,
            batch_axes=batch_axes,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        made: dict[str, nnx.Param] = {}
        for name, spec in _layer.param_specs(self.config).items():
            init = nnx.with_partitioning(spec.init, spec.partition, mesh=group.mesh)
            made[name] = nnx.Param(init(rngs.params(), spec.shape, spec.dtype))
        bias = None
        if self.config.router.use_selection_bias:
            bias = SelectionBias(jnp.zeros(num_experts, jnp.float32))
        placement = _layer.first_placement(self.config)
        self.places = None if placement is None else Places(placement)
        self.load_decay = load_decay
        self.load = None if load_decay is None else ExpertLoad(jnp.zeros(num_experts, jnp.float32))
        self.gate = Gate(made.pop("gate.kernel"), made.pop("gate.bias", None), bias)
        for name, param in made.items():
            setattr(self, name, param)

    def mask_ranks(self, ranks: Iterable[int]) -> None:
        """Leaves ranks of the layer's group out, for all layers over it; see ExpertGroup.mask_ranks."""
        self.config.group.mask_ranks(ranks)

    def __call__(
        self,
        x: jax.Array,
        *,
        token_mask: jax.Array | None = None,
        jitter_rng: jax.Array | None = None,
        mode: Mode | None = None,
        return_stats: bool = False,
    ) -> jax.Array | tuple[jax.Array, MoEStats]:
        """Applies the layer.

        Args:
          x: [batch, seq, hidden], or any [..., hidden]. Fastest where the batch is a multiple of the ranks.
          token_mask: bool, x's shape without hidden; False marks padding, which is routed nowhere and gives
            zeros, whatever it holds.
          jitter_rng: key for the router's input noise while training; None for none.
          mode: for this call, in place of the layer's own.
          return_stats: whether to return statistics as well.

        Returns:
          Output in the shape and dtype of x; with `return_stats` also a MoEStats over all ranks.
        """
        params = {name: self.parameter(name)[...] for name in _layer.param_specs(self.config)}
        bias = self.gate.selection_bias
        out, stats = _layer.apply(
            self.config if mode is None else dataclasses.replace(self.config, mode=mode),
            params,
            x,
            selection_bias=None if bias is None else bias[...],
            token_mask=token_mask,
            jitter_rng=jitter_rng,
            placement=None if self.places is None else self.places.get(),
            return_stats=return_stats,
        )
        return out if stats is None else (out, stats)

    def parameter(self, name: str) -> nnx.Param:
        """The parameter of that name, such as "wi" or "gate.kernel"."""
        return (
            getattr(self.gate, name.removeprefix("gate."))
            if name.startswith("gate.")
            else getattr(self, name)
        )

    def update_load(self, stats: MoEStats) -> None:
        """Takes a step's selections into the average `load`; call it once a training step."""
        if self.load is None or self.load_decay is None:
            raise ValueError("MoE.update_load: expected a layer with load_decay, got one without")
        self.load[...] = update_average(self.load[...], stats.tokens_per_expert, self.load_decay)

    def update_selection_bias(self, stats: MoEStats, rate: float = 1e-3) -> None:
        """Moves the selection bias towards even load (arXiv:2408.15664); call it once a training step."""
        bias = self.gate.selection_bias
        if bias is None:
            raise ValueError(
                "MoE.update_selection_bias: expected a router with use_selection_bias=True, got one without"
            )
        bias[...] = update_selection_bias(bias[...], stats.tokens_per_expert, rate)
