"""What the exchange has to do, once more in NumPy loops and float64; shares no code with the library.

Arrays of all ranks carry a leading axis of ranks.
"""

import dataclasses

import jax
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec


@dataclasses.dataclass
class Plan:
    group_sizes: np.ndarray  # [ranks, local_experts]
    num_rows: np.ndarray  # [ranks]
    overflow: np.ndarray  # [ranks]
    tokens_per_expert: np.ndarray  # [experts]
    dest_rank: np.ndarray  # [ranks, tokens, k]
    dest_row: np.ndarray  # [ranks, tokens, k]
    row_source: np.ndarray  # [ranks, capacity]
    arrival_rows: np.ndarray  # [ranks, capacity]
    rows_per_source: np.ndarray  # [ranks, ranks]


def make_plan(topk_idx: np.ndarray, num_experts: int, capacity: int) -> Plan:
    num_ranks, tokens, top_k = topk_idx.shape
    local = num_experts // num_ranks
    received = [[[] for _ in range(local)] for _ in range(num_ranks)]  # sources, by rank and expert
    used = [0] * num_ranks
    plan = Plan(
        group_sizes=np.zeros((num_ranks, local), np.int32),
        num_rows=np.zeros(num_ranks, np.int32),
        overflow=np.zeros(num_ranks, np.int32),
        tokens_per_expert=np.zeros(num_experts, np.int32),
        dest_rank=np.full(topk_idx.shape, -1, np.int32),
        dest_row=np.full(topk_idx.shape, -1, np.int32),
        row_source=np.full((num_ranks, capacity), -1, np.int32),
        arrival_rows=np.full((num_ranks, capacity), -1, np.int32),
        rows_per_source=np.zeros((num_ranks, num_ranks), np.int32),
    )
    for source, expert in enumerate(topk_idx.reshape(-1)):
        if expert < 0:
            continue
        plan.tokens_per_expert[expert] += 1
        rank = expert // local
        if used[rank] == capacity:
            plan.overflow[rank] += 1
        else:
            used[rank] += 1
            received[rank][expert % local].append(source)
    for rank in range(num_ranks):
        row = 0
        for expert in range(local):
            plan.group_sizes[rank, expert] = len(received[rank][expert])
            for source in received[rank][expert]:
                at = np.unravel_index(source, topk_idx.shape)
                plan.dest_rank[at], plan.dest_row[at] = rank, row
                plan.row_source[rank, row] = source
                row += 1
        plan.num_rows[rank] = row
        order = np.argsort(plan.row_source[rank, :row])
        plan.arrival_rows[rank, :row] = order
        for source in plan.row_source[rank, :row]:
            plan.rows_per_source[rank, source // (tokens * top_k)] += 1
    return plan


def mask_ranks(topk_idx: np.ndarray, num_experts: int, masked) -> tuple[np.ndarray, np.ndarray]:
    """topk_idx with -1 for what a mask drops, [ranks, tokens, k], and how many that are on each rank."""
    rank_of_expert = np.repeat(np.arange(len(topk_idx)), num_experts // len(topk_idx))
    drops = (topk_idx >= 0) & np.isin(rank_of_expert[topk_idx], list(masked))
    drops[list(masked)] = topk_idx[list(masked)] >= 0
    return np.where(drops, -1, topk_idx), drops.sum(axis=(1, 2)).astype(np.int32)


def make_masked_plan(topk_idx: np.ndarray, num_experts: int, capacity: int, masked) -> Plan:
    """The plan under a mask; `tokens_per_expert` is [ranks, experts]."""
    kept, dropped = mask_ranks(topk_idx, num_experts, masked)
    plan = make_plan(kept, num_experts, capacity)
    taking_part = [rank for rank in range(len(topk_idx)) if rank not in masked]
    selected = topk_idx[taking_part]
    plan.tokens_per_expert = np.zeros((len(topk_idx), num_experts), np.int32)
    plan.tokens_per_expert[taking_part] = np.bincount(selected[selected >= 0], minlength=num_experts)
    plan.overflow += dropped
    return plan


def dispatch(x: np.ndarray, weights: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    num_ranks, capacity = plan.row_source.shape
    top_k = weights.shape[2]
    rows = np.zeros((num_ranks, capacity, x.shape[2]), x.dtype)
    row_weights = np.zeros((num_ranks, capacity), weights.dtype)
    for rank in range(num_ranks):
        for row, source in enumerate(plan.row_source[rank]):
            if source >= 0:
                rows[rank, row] = x.reshape(-1, x.shape[2])[source // top_k]
                row_weights[rank, row] = weights.reshape(-1)[source]
    return rows, row_weights


def combine(y: np.ndarray, row_weights: np.ndarray, plan: Plan) -> np.ndarray:
    num_ranks, tokens, top_k = plan.dest_rank.shape
    out = np.zeros((num_ranks, tokens, y.shape[2]), np.float64)
    for at in np.ndindex(num_ranks, tokens, top_k):
        rank, row = plan.dest_rank[at], plan.dest_row[at]
        if rank >= 0:
            out[at[:2]] += np.float64(row_weights[rank, row]) * y[rank, row].astype(np.float64)
    return out


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By ml_dtypes, in float32 as the wire format defines it."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 128)
    amax = np.maximum(np.abs(blocks).max(axis=-1), np.float32(1e-30))
    scales = amax * (np.float32(1) / np.float32(448))
    q = (blocks * (np.float32(1) / scales)[..., None]).astype(ml_dtypes.float8_e4m3fn)
    return q.reshape(x.shape), scales


def dequantize(q: np.ndarray, scales: np.ndarray, dtype) -> np.ndarray:
    blocks = q.astype(np.float32).reshape(*scales.shape, 128) * scales[..., None]
    return blocks.reshape(q.shape).astype(dtype)


def dense_moe(x, topk_idx, topk_weights, wi, wo, activate):
    """Every expert on every token, in JAX so that it can be differentiated; flat over ranks."""
    experts = jax.numpy.arange(wi.shape[0])
    weight = jax.numpy.where(topk_idx[:, :, None] == experts, topk_weights[:, :, None], 0).sum(axis=1)
    outs = jax.vmap(lambda wi, wo: activate(x @ wi) @ wo)(wi, wo)
    return jax.numpy.einsum("te,eth->th", weight, outs, precision="highest")


def on_ranks(group, function, *, out_specs=None, **jit_options):
    """`function` on every rank's shard (leading axis split), jitted."""
    spec = PartitionSpec(group.axis)
    return jax.jit(
        jax.shard_map(
            function, mesh=group.mesh, in_specs=spec, out_specs=spec if out_specs is None else out_specs
        ),
        **jit_options,
    )


def random_topk(rng, num_ranks, tokens, num_experts, top_k, *, kind="uniform", masked=0.0, distinct=True):
    """[ranks, tokens, k] int32: "uniform", "zipf", "hot" (expert 0 in every token) or "empty" (all masked)."""
    shape = (num_ranks, tokens)
    if kind == "empty":
        return np.full((*shape, top_k), -1, np.int32)
    skew = 1.2 if kind == "zipf" else 0.0
    load = -skew * np.log(np.arange(1, num_experts + 1)) + rng.gumbel(size=(*shape, num_experts))
    if kind == "hot":
        load[..., 0] = np.inf
    idx = np.argsort(-load, axis=-1)[..., :top_k].astype(np.int32)
    if not distinct:
        idx = rng.integers(0, num_experts, idx.shape).astype(np.int32)
    idx[rng.random(idx.shape) < masked] = -1
    return idx
