"""All ops and the layer on eight ranks, forward and backward: in the processes of a job, or in one process.

As a script, each process saves what its ranks hold; test_layouts.py compares that with `run` in its own process.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_wideep as wep
from jax_wideep import launch

RANKS, TOKENS, EXPERTS, TOP_K, HIDDEN = 8, 6, 16, 3, 128
CAPACITY = 15  # too few rows for some ranks
SPEC = PartitionSpec("expert")
PLAN = "group_sizes num_rows overflow tokens_per_expert dest_rank dest_row row_source arrival_rows rows_per_source"


def draw(seed: int, dtype: Any) -> dict[str, np.ndarray]:
    """Of all ranks, [ranks, tokens, ..]; the same in every process."""
    rng = np.random.default_rng(seed)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind="zipf", masked=0.2)
    topk_idx[5] = -1  # a rank without tokens
    return {
        "x": rng.normal(size=(RANKS, TOKENS, HIDDEN)).astype(jnp.dtype(dtype)),
        "weights": rng.normal(size=(RANKS, TOKENS, TOP_K)).astype(np.float32),
        "topk_idx": topk_idx,
        "cotangent": rng.normal(size=(RANKS, TOKENS, HIDDEN)).astype(jnp.dtype(dtype)),
    }


def run(mesh: Mesh) -> dict[str, Any]:
    """Every result by name, and what the test needs to know of the set-up."""
    results: dict[str, Any] = {}
    settings = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "chunk": TOKENS, "deadline_s": 120}
    with wep.ExpertGroup(mesh, **settings) as group:
        assert group.backend == "cpu", group.backend
        for seed, (dtype, capacity) in enumerate([(jnp.float32, None), (jnp.bfloat16, CAPACITY)]):
            arrays = draw(seed, dtype)
            for name, value in _ops(group, capacity)(*_put(mesh, arrays)).items():
                results[f"{name} {jnp.dtype(dtype).name}"] = value
        for name, value in _layer(mesh, group).items():
            results[f"layer {name}"] = value
        jax.block_until_ready(results)
    # Two groups side by side, each with every other device, so that both span all processes.
    both = Mesh(mesh.devices.reshape(-1, 2).T, ("replica", "expert"))
    with wep.ExpertGroup(both, **settings) as group:
        assert group.backend == "cpu" and group.num_ranks == RANKS // 2
        for name, value in _side_by_side(group).items():
            results[f"side by side {name}"] = jax.block_until_ready(value)
    return results


def _side_by_side(group: wep.ExpertGroup) -> dict[str, Any]:
    spec = PartitionSpec(("replica", "expert"))

    def body(x, weights, topk_idx, _):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(x, weights, plan)
        return {"out": wep.combine(2 * rows, row_weights, plan), "rows": rows, "dest_row": plan.dest_row}

    run = jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=spec, out_specs=spec))
    return run(*_put(group.mesh, draw(3, np.float32), spec))


def _put(mesh: Mesh, arrays: dict[str, np.ndarray], spec: PartitionSpec = SPEC) -> list[jax.Array]:
    place = NamedSharding(mesh, spec)
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays.values()]
    return [jax.make_array_from_callback(a.shape, place, lambda at, a=a: a[at]) for a in flat]


def _ops(group: wep.ExpertGroup, capacity: int | None):
    """Throughput and low latency, the latter exact and over the FP8 wire, in whole and in halves."""

    def body(x, weights, topk_idx, cotangent):
        results = {}

        def throughput(x, weights):
            plan = wep.make_plan(topk_idx, group, capacity=capacity)
            rows, row_weights = wep.dispatch(x, weights, plan)
            out = wep.combine(jnp.tanh(rows), row_weights, plan)
            return out, {
                "rows": rows,
                "row_weights": row_weights,
                **{n: getattr(plan, n) for n in PLAN.split()},
            }

        def low_latency(x, weights, quantize):
            sent = wep.ll_dispatch_send(x, topk_idx, group, quantize=quantize)
            recv = wep.ll_dispatch_recv(sent)
            out = wep.ll_combine_recv(wep.ll_combine_send(jnp.tanh(recv.rows), weights, recv))
            return out, {"rows": recv.rows, "counts": recv.counts, "row_source": recv.row_source}

        for name, forward in {
            "throughput": throughput,
            "exact": lambda x, w: low_latency(x, w, None),
            "fp8": lambda x, w: low_latency(x, w, "fp8"),
        }.items():
            out, backward, more = jax.vjp(forward, x, weights, has_aux=True)
            dx, dweights = backward(cotangent)
            for key, value in {"out": out, "dx": dx, "dweights": dweights, **more}.items():
                results[f"{name} {key}"] = jnp.atleast_1d(value)
        return results

    return jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC))


def _layer(mesh: Mesh, group: wep.ExpertGroup) -> dict[str, Any]:
    """The layer's output, and the loss's gradients, which are summed over the ranks by JAX's own collectives."""
    layer = wep.flax.MoE(
        hidden=HIDDEN, ffn=16, num_experts=EXPERTS, top_k=TOP_K, group=group, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    flat = nnx.to_flat_state(params)
    values = {".".join(path): leaf[...] for path, leaf in flat}

    def loss(values, x):
        state = [(path, leaf.replace(values[".".join(path)])) for path, leaf in flat]
        out = nnx.merge(graph, nnx.from_flat_state(state), rest)(x)
        return jnp.sum(jnp.sin(out)), out

    x = _put(mesh, {"x": draw(9, np.float32)["x"]})[0]
    (total, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(values, x)
    return {"loss": total, "out": out, **{f"d{name}": grad for name, grad in grads.items()}}


def shards(array: jax.Array) -> dict[int, np.ndarray]:
    """By the first row that each holds."""
    held = [((shard.index or (slice(0),))[0].start or 0, shard) for shard in array.addressable_shards]
    return {start: np.asarray(shard.data) for start, shard in held}


def main() -> None:
    wep.use_cpu_devices(int(os.environ["WIDEEP_DEVICES"]))
    launch.initialize()
    mesh = jax.make_mesh((RANKS,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    held = {
        f"{name}|{start}": value.view(np.uint8) if value.dtype == jnp.bfloat16 else value
        for name, array in run(mesh).items()
        for start, value in shards(array).items()
    }
    scratch = pathlib.Path(os.environ["WIDEEP_SCRATCH"])
    np.savez(scratch / f"results{jax.process_index()}.npz", **held)


if __name__ == "__main__":
    main()
