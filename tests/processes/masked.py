"""One process of a job whose ranks are masked: planned, all processes being there, or after the last one has ended.

    masked.py planned|killed

Every process computes what all ranks should get and compares its own.
"""

from __future__ import annotations

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.sharding import NamedSharding, PartitionSpec
from leaving import leave

import jax_wideep as wep
from jax_wideep import launch

TOKENS, TOP_K, LOCAL_EXPERTS, HIDDEN = 5, 3, 2, 128
SPEC = PartitionSpec("expert")
PLAN = ("num_rows", "overflow", "tokens_per_expert", "dest_rank", "dest_row", "row_source", "arrival_rows")


class Ranks:
    def __init__(self) -> None:
        self.devices = jax.devices()
        self.number = len(self.devices)
        self.mesh = jax.make_mesh((self.number,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        self.experts = LOCAL_EXPERTS * self.number

    def put(self, array):
        flat = array.reshape(-1, array.shape[-1])
        return jax.make_array_from_callback(
            flat.shape, NamedSharding(self.mesh, SPEC), lambda at: np.asarray(flat[at])
        )

    def check(self, name, array, want, tolerance=0.0):
        """This process's shards against `want`, [ranks, ..]."""
        for shard in array.addressable_shards:
            rank = self.devices.index(shard.device)
            got = np.asarray(shard.data, np.float64).reshape(want[rank].shape)
            np.testing.assert_allclose(
                got, want[rank], rtol=tolerance, atol=tolerance, err_msg=f"{name} of rank {rank}"
            )


def ops(group):
    """Both shapes, forward and backward."""

    def body(x, weights, topk_idx, cotangent):
        def throughput(x, weights):
            plan = wep.make_plan(topk_idx, group)
            rows, row_weights = wep.dispatch(x, weights, plan)
            return wep.combine(2 * rows, row_weights, plan), (rows, plan)

        def low_latency(x, weights):
            recv = wep.ll_dispatch(x, topk_idx, group, quantize=None)
            return wep.ll_combine(2 * recv.rows, weights, recv), recv.counts

        out, backward, (rows, plan) = jax.vjp(throughput, x, weights, has_aux=True)
        dx, dweights = backward(cotangent)
        quick_out, quick_backward, counts = jax.vjp(low_latency, x, weights, has_aux=True)
        quick_dx, quick_dweights = quick_backward(cotangent)
        plan = {name: jnp.atleast_1d(getattr(plan, name)) for name in PLAN}
        return {
            "rows": rows,
            "plan": plan,
            "counts": counts,
            "results": [(out, dx, dweights), (quick_out, quick_dx, quick_dweights)],
        }

    return jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=SPEC, out_specs=SPEC))


def run_and_check(ranks, step, masked, seed):
    rng = np.random.default_rng(seed)
    x, cotangent = rng.normal(size=(2, ranks.number, TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.normal(size=(ranks.number, TOKENS, TOP_K)).astype(np.float32)
    topk_idx = oracle.random_topk(rng, ranks.number, TOKENS, ranks.experts, TOP_K, kind="zipf", masked=0.1)
    got = step(*map(ranks.put, (x, weights, topk_idx, cotangent)))

    plan = oracle.make_masked_plan(topk_idx, ranks.experts, ranks.number * TOKENS * TOP_K, masked)
    for name, array in got["plan"].items():
        ranks.check(name, array, [np.atleast_1d(of_rank) for of_rank in getattr(plan, name)])
    ranks.check("rows", got["rows"], oracle.dispatch(x, weights, plan)[0])
    ranks.check("counts", got["counts"], plan.group_sizes)
    kept, _ = oracle.mask_ranks(topk_idx, ranks.experts, masked)
    total = np.where(kept >= 0, weights, 0).sum(axis=2)[..., None]
    dot = np.where(kept >= 0, 2 * (x * cotangent).sum(axis=2)[..., None], 0)
    for shape, results in zip(("throughput", "low latency"), got["results"], strict=True):
        for name, array, want in zip(
            ("out", "dx", "dweights"), results, (2 * total * x, 2 * total * cotangent, dot), strict=True
        ):
            ranks.check(f"{name}, {shape}", array, want, 1e-4)


def main() -> None:
    wep.use_cpu_devices(int(os.environ["WIDEEP_DEVICES"]))
    launch.initialize()
    ranks = Ranks()
    of_last = [rank for rank, d in enumerate(ranks.devices) if d.process_index == jax.process_count() - 1]
    settings = {"num_experts": ranks.experts, "top_k": TOP_K, "hidden": HIDDEN, "chunk": TOKENS}
    with wep.ExpertGroup(ranks.mesh, **settings, deadline_s=60) as group:
        assert group.backend == "cpu", group.backend
        step = ops(group)
        run_and_check(ranks, step, [], 0)
        if sys.argv[1] == "planned":
            try:
                group.mask_ranks([jax.process_index()])
            except ValueError as error:
                assert "process 0 has [0], process 1 has [1]" in str(error), error
            else:
                raise AssertionError("expected an error")
            assert group.masked_ranks == ()
            # A rank of a process, all of a process, others, nobody.
            for seed, masked in enumerate([[1], of_last, [0, *of_last], []]):
                group.mask_ranks(masked)
                for repeat in range(2):
                    run_and_check(ranks, step, masked, 10 * seed + repeat)
            print("ok", flush=True)
            return
        if of_last[0] in [
            rank for rank, d in enumerate(ranks.devices) if d.process_index == jax.process_index()
        ]:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            run_and_check(ranks, step, [], 1)
        except jax.errors.JaxRuntimeError as error:
            assert "will not come" in str(error), error
        else:
            raise AssertionError("expected an error")
        group.mask_ranks(of_last)
        for seed in range(3):
            run_and_check(ranks, step, of_last, 2 + seed)
    print("ok")
    leave()


if __name__ == "__main__":
    main()
