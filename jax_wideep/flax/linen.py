"""MoE: the drop-in layer for Flax linen."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_wideep.flax import _layer
from jax_wideep.group import ExpertGroup
from jax_wideep.load import update_average
from jax_wideep.low_latency import Quantize
from jax_wideep.moe import Activation, Mode, MoEStats, Remat
from jax_wideep.placement import Placement
from jax_wideep.plan import Overflow
from jax_wideep.routing import RouterConfig


class Gate(nn.Module):
    """Holds the router's parameters: `kernel`, float32 [hidden, num_experts], and perhaps `bias`."""

    specs: dict[str, _layer.ParamSpec]
    mesh: jax.sharding.Mesh

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {
            name: self.param(name, _partitioned(spec, self.mesh), spec.shape, spec.dtype)
            for name, spec in self.specs.items()
        }


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer with experts spread over the group's ranks.

    The linen form of `jax_wideep.flax.MoE`: same attributes as its arguments, same parameters, same values.
    A selection bias lives in the collection `router_state` as `selection_bias`, the arrays of a Placement in
    `expert_placement`, the average load in `expert_load` as `average`: it moves in every call that may change that
    collection, as under `apply(..., mutable=["expert_load"])`.
    """

    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    group: ExpertGroup
    router: RouterConfig | None = None
    activation: Activation = "swiglu"
    shared_ffn: int = 0
    shared_gate: bool = False
    use_bias: bool = False
    weigh_input: bool = False
    mode: Mode = "throughput"
    capacity: int | None = None
    capacity_factor: float | None = None
    overflow: Overflow = "drop"
    microbatches: int = 1
    expert_chunk: int | None = None
    remat: Remat = "none"
    quantize: Quantize = "fp8"
    redundant_experts: int | None = None
    load_decay: float | None = None
    batch_axes: tuple[str, ...] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        token_mask: jax.Array | None = None,
        jitter_rng: jax.Array | None = None,
        mode: Mode | None = None,
        return_stats: bool = False,
    ) -> jax.Array | tuple[jax.Array, MoEStats]:
        """Applies the layer; arguments and results are those of `jax_wideep.flax.MoE.__call__`."""
        config = _layer.make_config(
            hidden=self.hidden,
            ffn=self.ffn,
            num_experts=self.num_experts,
            top_k=self.top_k,
            group=self.group,
            router=self.router,
            activation=self.activation,
            shared_ffn=self.shared_ffn,
            shared_gate=self.shared_gate,
            use_bias=self.use_bias,
            weigh_input=self.weigh_input,
            mode=self.mode if mode is None else mode,
            capacity=self.capacity,
            capacity_factor=self.capacity_factor,
            overflow=self.overflow,
            microbatches=self.microbatches,
            expert_chunk=self.expert_chunk,
            remat=self.remat,
            quantize=self.quantize,
            redundant_experts=self.redundant_experts,
            batch_axes=self.batch_axes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        specs, mesh = _layer.param_specs(config), config.group.mesh
        of_gate = {
            name.removeprefix("gate."): spec for name, spec in specs.items() if name.startswith("gate.")
        }
        params = {f"gate.{name}": value for name, value in Gate(of_gate, mesh, name="gate")().items()}
        for name, spec in specs.items():
            if not name.startswith("gate."):
                params[name] = self.param(name, _partitioned(spec, mesh), spec.shape, spec.dtype)
        bias = None
        if config.router.use_selection_bias:
            bias = self.variable(
                "router_state", "selection_bias", jnp.zeros, (self.num_experts,), jnp.float32
            ).value
        moves_load = self.load_decay is not None and self.is_mutable_collection("expert_load")
        out, stats = _layer.apply(
            config,
            params,
            x,
            selection_bias=bias,
            token_mask=token_mask,
            jitter_rng=jitter_rng,
            placement=self._placement(config),
            return_stats=return_stats or moves_load,
        )
        if stats is None:
            return out
        if self.load_decay is not None and moves_load:
            average = self.variable("expert_load", "average", jnp.zeros, (self.num_experts,), jnp.float32)
            if not self.is_initializing():
                average.value = update_average(average.value, stats.tokens_per_expert, self.load_decay)
        return (out, stats) if return_stats else out

    def _placement(self, config: _layer.LayerConfig) -> Placement | None:
        first = _layer.first_placement(config)
        if first is None:
            return None
        names = [field.name for field in dataclasses.fields(first)]
        arrays = {
            name: self.variable("expert_placement", name, jnp.asarray, getattr(first, name)).value
            for name in names
        }
        return Placement(**arrays)


def _partitioned(spec: _layer.ParamSpec, mesh: jax.sharding.Mesh) -> Any:
    def init(*args: Any) -> jax.Array:
        return _layer.lay_out(mesh, spec.init(*args), PartitionSpec(*spec.partition))

    return nn.with_partitioning(init, spec.partition)
