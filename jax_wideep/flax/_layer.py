"""What the nnx and the linen layer share: static settings, parameter shapes, and the forward pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_wideep import _ffi
from jax_wideep.group import ExpertGroup
from jax_wideep.low_latency import Quantize
from jax_wideep.moe import Activation, Mode, MoEStats, Remat, activate, check_activation, inner_size, moe_ffn
from jax_wideep.placement import Placement, make_placement
from jax_wideep.plan import Overflow
from jax_wideep.routing import RouterConfig, load_balance_loss, route, router_logits, z_loss

#: Rows of a round as a multiple of the mean, where overflow="spill" and nothing is said of the capacity.
SPILL_CAPACITY_FACTOR = 1.5


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Static settings of a layer; hashable. The layers' docstrings say what each one means."""

    hidden: int
    ffn: int
    group: ExpertGroup
    router: RouterConfig
    activation: Activation
    shared_ffn: int
    shared_gate: bool
    use_bias: bool
    weigh_input: bool
    mode: Mode
    capacity: int | None
    capacity_factor: float | None
    overflow: Overflow
    microbatches: int
    expert_chunk: int | None
    remat: Remat
    quantize: Quantize
    redundant_experts: int | None
    batch_axes: tuple[str, ...]
    dtype: Any
    param_dtype: Any


def make_config(
    *,
    hidden: int,
    ffn: int,
    num_experts: int,
    top_k: int,
    group: ExpertGroup,
    router: RouterConfig | None,
    activation: Activation,
    shared_ffn: int,
    shared_gate: bool,
    use_bias: bool,
    weigh_input: bool,
    mode: Mode,
    capacity: int | None,
    capacity_factor: float | None,
    overflow: Overflow,
    microbatches: int,
    expert_chunk: int | None,
    remat: Remat,
    quantize: Quantize,
    redundant_experts: int | None,
    batch_axes: tuple[str, ...] | None,
    dtype: Any,
    param_dtype: Any,
) -> LayerConfig:
    """Checks the settings against each other and fills in what was left out."""
    router = router or RouterConfig(num_experts=num_experts, top_k=top_k)
    if redundant_experts is not None and redundant_experts < 0:
        raise ValueError(f"MoE: redundant_experts: expected None or at least 0, got {redundant_experts}")
    logical_of_group = group.num_experts - (redundant_experts or 0)
    for name, ours, of_group in (
        ("num_experts", num_experts, logical_of_group),
        ("top_k", top_k, group.top_k),
    ):
        for other, theirs in (("group", of_group), ("router", getattr(router, name))):
            if ours != theirs:
                raise ValueError(f"MoE: {name}: expected {theirs} as in {other}, got {ours}; make them equal")
    if hidden != group.hidden:
        raise ValueError(f"MoE: hidden: expected {group.hidden} as in group, got {hidden}; make them equal")
    check_activation("MoE", activation)
    for name, value, choices in (
        ("mode", mode, get_args(Mode)),
        ("overflow", overflow, get_args(Overflow)),
        ("remat", remat, get_args(Remat)),
    ):
        if value not in choices:
            raise ValueError(f"MoE: {name}: expected one of {choices}, got {value!r}")
    if ffn < 1 or shared_ffn < 0:
        raise ValueError(f"MoE: ffn, shared_ffn: expected at least 1 and 0, got {ffn} and {shared_ffn}")
    if shared_gate and not shared_ffn:
        raise ValueError(
            "MoE: shared_gate: expected False without a shared expert, got True; set shared_ffn too"
        )
    if capacity is not None and capacity_factor is not None:
        raise ValueError("MoE: expected capacity or capacity_factor, got both; leave one out")
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"MoE: capacity_factor: expected more than 0, got {capacity_factor}")
    if overflow == "spill" and capacity is None and capacity_factor is None:
        capacity_factor = SPILL_CAPACITY_FACTOR
    axes = tuple(group.mesh.axis_names) if batch_axes is None else tuple(batch_axes)
    if not set(group.axis) <= set(axes) or not set(axes) <= set(group.mesh.axis_names):
        raise ValueError(
            f"MoE: batch_axes: expected axes of the mesh {group.mesh.axis_names} that include the group's "
            f"{group.axis}, got {axes}; tokens must be spread over the ranks that exchange them"
        )
    return LayerConfig(
        hidden=hidden,
        ffn=ffn,
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
        batch_axes=axes,
        dtype=None if dtype is None else jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
    )


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: how to make it and how it is laid out over the mesh."""

    shape: tuple[int, ...]
    init: Callable[..., jax.Array]
    partition: tuple[Any, ...]
    dtype: Any


_dense_init = jax.nn.initializers.lecun_normal()
# Each expert is initialised as a dense layer of its own.
_expert_init = jax.nn.initializers.lecun_normal(batch_axis=0)
_zeros = jax.nn.initializers.zeros


def param_specs(config: LayerConfig) -> dict[str, ParamSpec]:
    """The layer's parameters by name; "gate.kernel" and "gate.bias" live in the submodule `gate`."""
    experts, hidden = config.group.num_experts, config.hidden
    num_logical, expert_init = config.router.num_experts, _copied_to_replicas(config, _expert_init)
    axis = config.group.axis[0] if len(config.group.axis) == 1 else config.group.axis
    inner = inner_size(config.ffn, config.activation)
    dtype = config.param_dtype
    specs = {
        # The router decides in float32, whatever the experts' dtype.
        "gate.kernel": ParamSpec((hidden, num_logical), _dense_init, (None, None), jnp.float32),
        "wi": ParamSpec((experts, hidden, inner), expert_init, (axis, None, None), dtype),
        "wo": ParamSpec((experts, config.ffn, hidden), expert_init, (axis, None, None), dtype),
    }
    if config.router.use_logit_bias:
        specs["gate.bias"] = ParamSpec((num_logical,), _zeros, (None,), jnp.float32)
    if config.use_bias:
        specs["bi"] = ParamSpec((experts, inner), _zeros, (axis, None), dtype)
        specs["bo"] = ParamSpec((experts, hidden), _zeros, (axis, None), dtype)
    if config.shared_ffn:
        shared_inner = inner_size(config.shared_ffn, config.activation)
        specs["shared_wi"] = ParamSpec((hidden, shared_inner), _dense_init, (None, None), dtype)
        specs["shared_wo"] = ParamSpec((config.shared_ffn, hidden), _dense_init, (None, None), dtype)
    if config.shared_gate:
        specs["shared_gate"] = ParamSpec((hidden, 1), _dense_init, (None, None), dtype)
    return specs


def first_placement(config: LayerConfig) -> Placement | None:
    """Where experts lie in a new layer: in order, and then some of them once more."""
    if config.redundant_experts is None:
        return None
    experts = config.router.num_experts
    return make_placement(np.arange(config.group.num_experts) % experts, experts)


def _copied_to_replicas(config: LayerConfig, init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`init` of logical experts, copied to the physical ones."""
    placement = first_placement(config)
    if not config.redundant_experts or placement is None:
        return init

    def init_physical(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return init(key, (config.router.num_experts, *shape[1:]), dtype)[placement.logical_of_physical]

    return init_physical


def apply(
    config: LayerConfig,
    params: dict[str, jax.Array],
    x: jax.Array,
    *,
    selection_bias: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    jitter_rng: jax.Array | None = None,
    placement: Placement | None = None,
    return_stats: bool = False,
) -> tuple[jax.Array, MoEStats | None]:
    """The layer on a global array, or, where the group's axes are manual already, on one rank's shard.

    Args:
      config: static settings.
      params: as param_specs names them.
      x: [..., hidden].
      selection_bias: [num_experts], see route.
      token_mask: [...] bool; False marks padding, which is routed nowhere and gives zeros.
      jitter_rng: key for the router's input noise; None for none.
      placement: where experts lie, for a layer with `redundant_experts`.
      return_stats: whether to compute statistics.

    Returns:
      Output in the shape and dtype of x, and the statistics or None.

    Raises:
      ValueError: for arguments of the wrong shape.
    """
    if x.ndim < 2 or x.shape[-1] != config.hidden:
        raise ValueError(f"MoE: x: expected [..., {config.hidden}] with at least 2 axes, got {list(x.shape)}")
    if token_mask is not None and token_mask.shape != x.shape[:-1]:
        raise ValueError(f"MoE: token_mask: expected {list(x.shape[:-1])}, got {list(token_mask.shape)}")
    optional = {
        name: value
        for name, value in (
            ("selection_bias", selection_bias), ("token_mask", token_mask), ("jitter_rng", jitter_rng),
            ("placement", placement),
        )
        if value is not None
    }  # fmt: skip
    if config.group.is_manual():
        return _on_one_rank(config, return_stats, params, x, optional)
    return _on_all_ranks(config, return_stats, params, x, optional)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _on_all_ranks(config, return_stats, params, x, optional):
    """shard_map over the whole mesh; the leading axis of x is split if it can be, otherwise all tokens are."""
    mesh, axes = config.group.mesh, config.batch_axes
    ranks = math.prod(mesh.shape[name] for name in axes)
    shape, layout = x.shape, jax.typeof(x).sharding
    pad = shape[0] % ranks != 0
    if pad:
        spare = -math.prod(shape[:-1]) % ranks
        mask = optional.get("token_mask", jnp.ones(shape[:-1], bool))
        # Reshaping and padding a split axis is not possible on Explicit axes: undo the split first.
        x, mask = lay_out(mesh, (x, mask), (PartitionSpec(), PartitionSpec()))
        x = jnp.pad(x.reshape(-1, config.hidden), ((0, spare), (0, 0)))
        optional = optional | {"token_mask": jnp.pad(mask.reshape(-1), (0, spare))}

    batch = PartitionSpec(axes)
    specs = {name: PartitionSpec(*spec.partition) for name, spec in param_specs(config).items()}
    optional_specs = {name: batch if name == "token_mask" else PartitionSpec() for name in optional}
    run = jax.shard_map(
        functools.partial(_on_one_rank, config, return_stats),
        mesh=mesh,
        in_specs=(specs, batch, optional_specs),
        out_specs=(batch, PartitionSpec()),
    )
    params, x, optional = lay_out(mesh, (params, x, optional), (specs, batch, optional_specs))
    out, stats = run(params, x, optional)
    if pad:
        out = lay_out(mesh, out, PartitionSpec())[: math.prod(shape[:-1])].reshape(shape)
    if _has_explicit_axes(mesh) and not layout.mesh.empty:
        out = jax.reshard(out, layout)  # as a dense layer would leave it
    return out, stats


def _has_explicit_axes(mesh: jax.sharding.Mesh) -> bool:
    return any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


def lay_out(mesh: jax.sharding.Mesh, arrays: Any, specs: Any) -> Any:
    """On a mesh of Explicit axes shard_map wants its arguments laid out as its specs say."""
    if not _has_explicit_axes(mesh):
        return arrays
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    return jax.reshard(arrays, shardings)


def _on_one_rank(config, return_stats, params, x, optional):
    group, axes = config.group, config.batch_axes
    dtype = config.dtype or x.dtype
    tokens = x.reshape(-1, config.hidden)
    mask = optional.get("token_mask")
    if mask is not None:
        mask = mask.reshape(-1)
        # Whatever padding holds, also NaN: a gradient of 0 times it must be 0.
        tokens = jnp.where(mask[:, None], tokens, 0)
    rng = optional.get("jitter_rng")
    if rng is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axes))

    with jax.named_scope("wideep_route"):
        logits = router_logits(
            tokens, params["gate.kernel"], config.router, bias=params.get("gate.bias"), jitter_rng=rng
        )
        routing = route(logits, config.router, selection_bias=optional.get("selection_bias"), token_mask=mask)
    tokens = tokens.astype(dtype)
    capacity = config.capacity
    if config.capacity_factor is not None:
        capacity = max(1, math.ceil(config.capacity_factor * tokens.shape[0] * group.top_k))
    out, stats = moe_ffn(
        tokens,
        routing.topk_idx,
        routing.topk_weights,
        params["wi"].astype(dtype),
        params["wo"].astype(dtype),
        group,
        mode=config.mode,
        capacity=capacity if config.mode == "throughput" else None,
        overflow=config.overflow,
        microbatches=config.microbatches,
        expert_chunk=config.expert_chunk if config.mode == "throughput" else None,
        remat=config.remat,
        activation=config.activation,
        bi=params["bi"].astype(dtype) if config.use_bias else None,
        bo=params["bo"].astype(dtype) if config.use_bias else None,
        weigh_input=config.weigh_input,
        quantize=config.quantize,
        placement=optional.get("placement"),
        return_stats=return_stats,
    )
    if config.shared_ffn:
        with jax.named_scope("wideep_shared_expert"):
            hidden = activate(tokens @ params["shared_wi"].astype(dtype), config.activation)
            shared = hidden @ params["shared_wo"].astype(dtype)
            if config.shared_gate:
                shared = jax.nn.sigmoid(tokens @ params["shared_gate"].astype(dtype)) * shared
            out = out + shared
    out = out.reshape(x.shape).astype(x.dtype)
    if not return_stats:
        return out, None
    return out, _stats_of_all_ranks(config, stats, logits, routing, mask)


def _stats_of_all_ranks(config, stats, logits, routing, mask):
    axes = config.batch_axes
    # Every rank of a group holds the group's counts already; sum over the groups side by side.
    others = tuple(name for name in axes if name not in config.group.axis)
    overflow, spilled, *counts = _ffi.vary(
        [stats.overflow, stats.spilled, stats.tokens_per_expert, stats.rows_per_rank], axes
    )
    counts = jax.lax.pmax(counts, config.group.axis)
    per_expert, per_rank = jax.lax.psum(counts, others) if others else counts
    return MoEStats(
        tokens_per_expert=per_expert,
        overflow=jax.lax.psum(overflow, axes),
        aux_loss=load_balance_loss(
            routing.scores, routing.topk_idx, config.router.num_experts, axis_name=axes, token_mask=mask
        ),
        z_loss=z_loss(logits, axis_name=axes, token_mask=mask),
        rows_per_rank=per_rank,
        spilled=jax.lax.psum(spilled, axes),
    )
