"""Where a training step's time goes, and the exchange beside what XLA offers."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

import jax_wideep as wep
from jax_wideep.bench import baselines
from jax_wideep.bench.measure import Candidate, time_interleaved
from jax_wideep.flax.transformer import Block, Transformer
from jax_wideep.moe import activate
from lm.training import LossWeights, put_batch, train_step

_REPEATS = 8


class LayerInputs(NamedTuple):
    """What the parts of one layer see, as global arrays.

    Attributes:
      block: the layer.
      x: [batch, seq, hidden] input of the layer.
      tokens: [batch * seq, hidden] input of its MoE layer.
      topk_idx: [batch * seq, k] where they go, physical experts.
      topk_weights: [batch * seq, k] gate weights.
    """

    block: Block
    x: jax.Array
    tokens: jax.Array
    topk_idx: jax.Array
    topk_weights: jax.Array


def layer_inputs(model: Transformer, tokens: np.ndarray) -> list[LayerInputs]:
    """Runs a batch [batch, seq] through the model and keeps every layer's inputs; batch must divide evenly."""

    @nnx.jit
    def run(model: Transformer, tokens: jax.Array) -> list[tuple[jax.Array, ...]]:
        x = model.embedding[...][tokens]
        found = []
        for block in model.blocks:
            after = x + block.attention(block.attention_norm(x))[0]
            normed = block.moe_norm(after)
            flat = normed.reshape(-1, normed.shape[-1])
            topk_idx, topk_weights = _route(model)(block.moe.gate.kernel[...], flat)[0]
            if block.moe.places is not None:
                topk_idx = _to_physical(model, block.moe.places.get(), topk_idx)
            found.append((x, flat, topk_idx, topk_weights))
            x = after + block.moe(normed)
        return found

    arrays = run(model, put_batch(model, tokens))
    return [LayerInputs(block, *layer) for block, layer in zip(model.blocks, arrays, strict=True)]


def routes(model: Transformer, layer: LayerInputs) -> np.ndarray:
    """[ranks, experts] selections that each source rank sends to each expert."""
    num_ranks, num_experts = model.group.num_ranks, model.group.num_experts
    chosen = np.asarray(layer.topk_idx).reshape(num_ranks, -1)
    return np.stack([np.bincount(of_rank, minlength=num_experts) for of_rank in chosen])


def step_parts(
    model: Transformer, optimizer: nnx.Optimizer, tokens: np.ndarray, weights: LossWeights
) -> dict[str, float]:
    """Seconds of one training step, and of its parts, each run alone forward and backward over all layers.

    Changes the model: it takes training steps. tokens [batch, seq + 1].
    """
    batch = put_batch(model, tokens)
    functions, arguments = _parts(model, tokens.shape[0] * (tokens.shape[1] - 1) // model.group.num_ranks)
    calls = {("step", 0): lambda: train_step(model, optimizer, batch, weights)}
    for index, layer in enumerate(layer_inputs(model, tokens[:, :-1])):
        for name, of_part in arguments(layer).items():
            # Copies, since a training step takes the model's own arrays away.
            of_part = jax.tree.map(jnp.copy, of_part)
            calls[name, index] = functools.partial(functions[name], *of_part)
    seconds = dict.fromkeys((*functions, "rest", "step"), 0.0)
    for (name, _), median in _median_seconds(calls).items():
        seconds[name] += median
    seconds["rest"] = max(0.0, seconds["step"] - sum(seconds[name] for name in functions))
    return seconds


def exchange_alternatives(model: Transformer, layer: LayerInputs) -> dict[str, tuple[float, float]]:
    """Seconds of (forward, forward and backward) of dispatch and combine of one layer's tokens, by method.

    All methods drop nothing, bring rows into expert order, and give the same sums, which is checked.
    """
    group = model.group
    tokens = layer.tokens.shape[0] // group.num_ranks
    setting = baselines.no_drop_setting(group.axis, group.num_ranks, group.num_experts, tokens, group.top_k)

    def ours(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
        return _exchange(x, topk_idx, topk_weights, group, capacity=None)

    def theirs(baseline: baselines.Baseline) -> Callable[..., jax.Array]:
        return lambda x, topk_idx, topk_weights: baselines.moe(
            baseline, x, topk_idx, topk_weights, lambda rows, group_sizes: rows, setting
        )

    missing = baselines.missing_on(group.mesh)
    methods = {"jax_wideep": ours} | {
        name: theirs(baseline) for name, baseline in baselines.BASELINES.items() if name not in missing
    }
    arguments = (layer.tokens, layer.topk_idx, layer.topk_weights)
    calls, want = {}, None
    for name, method in methods.items():
        run = _on_ranks(model, method)
        out = np.asarray(run(*arguments))
        want = out if want is None else want
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5, err_msg=name)
        calls[name, "forward"] = functools.partial(run, *arguments)
        calls[name, "both"] = functools.partial(_gradient(run, (0, 2)), *arguments)
    seconds = _median_seconds(calls)
    return {name: (seconds[name, "forward"], seconds[name, "both"]) for name in methods}


def _median_seconds(calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """The median time of each call, all run in turn so that they share the machine's ups and downs."""
    candidates = {name: Candidate(call) for name, call in calls.items()}
    seconds, failed = time_interleaved(candidates, lambda repeat: (), repeats=_REPEATS)
    if failed:
        raise RuntimeError(f"measure: {failed}")
    return {name: statistics.median(times.wall) for name, times in seconds.items()}


# ---- the parts ----


def _parts(
    model: Transformer, tokens_per_rank: int
) -> tuple[dict[str, Callable[..., Any]], Callable[[LayerInputs], dict[str, tuple[Any, ...]]]]:
    """A compiled gradient function per part, and what takes their arguments from a layer's inputs."""
    group, config = model.group, model.config
    capacity = None
    if config.capacity_factor is not None:
        capacity = int(np.ceil(config.capacity_factor * tokens_per_rank * group.top_k))
    graph, _, rest = nnx.split(model.blocks[0], nnx.Param, ...)
    rest = jax.tree.map(jnp.copy, rest)  # a training step takes the model's own arrays away

    def attention(state: Any, x: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state, rest)
        return block.attention(block.attention_norm(x))[0]

    def exchange(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
        return _exchange(x, topk_idx, topk_weights, group, capacity)

    def received(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        plan = wep.make_plan(topk_idx, group, capacity=capacity)
        return wep.dispatch(x, topk_weights, plan)[0], plan.group_sizes

    def experts(rows: jax.Array, group_sizes: jax.Array, wi: jax.Array, wo: jax.Array) -> jax.Array:
        hidden = activate(wep.grouped_matmul(rows, wi, group_sizes), config.activation)
        return wep.grouped_matmul(hidden, wo, group_sizes)

    receive = _on_ranks(model, received)

    def arguments(layer: LayerInputs) -> dict[str, tuple[Any, ...]]:
        moe = layer.block.moe
        rows, group_sizes = receive(layer.tokens, layer.topk_idx, layer.topk_weights)
        return {
            "attention": (nnx.state(layer.block, nnx.Param), layer.x),
            "routing": (moe.gate.kernel[...], layer.tokens),
            "exchange": (layer.tokens, layer.topk_idx, layer.topk_weights),
            "experts": (rows, group_sizes, moe.wi[...], moe.wo[...]),
        }

    functions = {
        "attention": _gradient(attention, (0, 1)),
        "routing": _gradient(_route(model), (0, 1)),
        "exchange": _gradient(_on_ranks(model, exchange), (0, 2)),
        "experts": _gradient(_on_ranks(model, experts), (0, 2, 3)),
    }
    return functions, arguments


def _exchange(x, topk_idx, topk_weights, group, capacity):
    """What moe_ffn does, with experts that return what they get."""
    plan = wep.make_plan(topk_idx, group, capacity=capacity)
    rows, row_weights = wep.dispatch(x, topk_weights, plan, zero_tail=False)
    return wep.combine(rows, row_weights, plan, zero_tail=False)


def _route(model: Transformer) -> Callable[..., Any]:
    """(gate kernel, tokens) -> (topk_idx, topk_weights), (load-balance loss, z-loss)."""
    axes, router = tuple(model.group.mesh.axis_names), model.blocks[0].moe.config.router

    def on_one_rank(kernel: jax.Array, x: jax.Array) -> Any:
        logits = wep.routing.router_logits(x, kernel, router)
        chosen = wep.routing.route(logits, router)
        aux = wep.routing.load_balance_loss(
            chosen.scores, chosen.topk_idx, router.num_experts, axis_name=axes
        )
        return (chosen.topk_idx, chosen.topk_weights), (aux, wep.routing.z_loss(logits, axis_name=axes))

    return jax.shard_map(
        on_one_rank,
        mesh=model.group.mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=(PartitionSpec(axes), PartitionSpec()),
    )


def _to_physical(model: Transformer, placement: wep.Placement, topk_idx: jax.Array) -> jax.Array:
    """What moe_ffn exchanges: each selection's replica."""
    axes = tuple(model.group.mesh.axis_names)
    return jax.shard_map(
        lambda placement, idx: placement.to_physical(idx, jax.lax.axis_index(axes)),
        mesh=model.group.mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(axes),
    )(placement, topk_idx)


def _on_ranks(model: Transformer, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on every rank's shards of arguments and results, split along their first axis."""
    spec = PartitionSpec(tuple(model.group.mesh.axis_names))
    return jax.jit(jax.shard_map(function, mesh=model.group.mesh, in_specs=spec, out_specs=spec))


def _gradient(function: Callable[..., Any], argnums: tuple[int, ...]) -> Callable[..., Any]:
    """The compiled gradient of half the sum of squares of all floating results."""

    def half_squares(*arguments: Any) -> jax.Array:
        leaves = jax.tree.leaves(function(*arguments))
        return sum(0.5 * jnp.vdot(leaf, leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

    return jax.jit(jax.grad(half_squares, argnums=argnums))
