"""ll_dispatch, ll_combine, their halves and gradients on the ranks of world.py, against loops over NumPy arrays.

    python tests/gpu/launch.py 8 tests/gpu/low_latency_suite.py [check ..]
    WIDEEP_CPU_RANKS=4 python tests/gpu/low_latency_suite.py values loop

Every process computes what all ranks should get and compares its own. `bad_index` ends the group, not the job;
`killed_then_masked`, which is not among the default checks, ends processes and is the last of its job.
"""

from __future__ import annotations

import contextlib
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from launch import PLANNED_DEATH
from leaving import leave
from world import World

import jax_wideep as wep

EPS = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}
CHUNK, TOP_K, LOCAL_EXPERTS, HIDDEN = 16, 4, 4, 256
SCALE = 1.5


def settings(world: World, **more):
    return {
        "num_experts": LOCAL_EXPERTS * world.num_ranks,
        "top_k": TOP_K,
        "hidden": HIDDEN,
        "chunk": CHUNK,
        **more,
    }


def draw(world, seed, dtype, tokens, **routing):
    """x, weights, topk_idx, cotangent of all ranks, the same in every process."""
    rng = np.random.default_rng(seed)
    shape = (world.num_ranks, tokens)
    x, cotangent = (np.asarray(rng.normal(size=(*shape, HIDDEN))).astype(jnp.dtype(dtype)) for _ in range(2))
    weights = rng.normal(size=(*shape, TOP_K)).astype(np.float32)
    experts = LOCAL_EXPERTS * world.num_ranks
    return x, weights, oracle.random_topk(rng, world.num_ranks, tokens, experts, TOP_K, **routing), cotangent


def exchange(group, quantize, halves, zero_tail=True):
    """One layer with a made-up expert, forward and backward."""

    def forward(x, weights, topk_idx, scale):
        options = {"quantize": quantize, "zero_tail": zero_tail}
        if not halves:
            recv = wep.ll_dispatch(x, topk_idx, group, **options)
            y = recv.rows * scale.astype(x.dtype)
            return wep.ll_combine(y, weights, recv, zero_tail=zero_tail), recv
        recv = wep.ll_dispatch_recv(wep.ll_dispatch_send(x, topk_idx, group, **options))
        y = recv.rows * scale.astype(x.dtype)
        return wep.ll_combine_recv(wep.ll_combine_send(y, weights, recv, zero_tail=zero_tail)), recv

    return forward


def whole_call(world, group, quantize_wire, halves):
    forward = exchange(group, quantize_wire, halves)

    def body(x, weights, topk_idx, cotangent, scale):
        out, backward, recv = jax.vjp(
            lambda x, weights: forward(x, weights, topk_idx, scale), x, weights, has_aux=True
        )
        dx, dweights = backward(cotangent)
        received = {"rows": recv.rows, "counts": recv.counts, "row_source": recv.row_source}
        return {"out": out, "dx": dx, "dweights": dweights, **received}

    return world.on_ranks(body)


def check_case(world, call, dtype, quantize_wire, tokens, seed, masked_ranks=(), **routing):
    x, weights, topk_idx, cotangent = draw(world, seed, dtype, tokens, **routing)
    scale = np.full((world.num_ranks, 1), SCALE, np.float32)
    got = call(*(world.put(array) for array in (x, weights, topk_idx, cotangent, scale)))

    topk_idx, _ = oracle.mask_ranks(topk_idx, LOCAL_EXPERTS * world.num_ranks, masked_ranks)
    sent = x
    if quantize_wire == "fp8":
        sent = oracle.dequantize(*oracle.quantize(x), x.dtype)
    experts = LOCAL_EXPERTS * world.num_ranks
    rows = np.zeros((experts, world.num_ranks * CHUNK, HIDDEN), x.dtype)
    row_source = np.full(rows.shape[:2], -1, np.int32)
    counts = np.zeros(experts, np.int32)
    for source, expert in enumerate(topk_idx.reshape(-1)):
        if expert < 0:
            continue
        rows[expert, counts[expert]] = sent.reshape(-1, HIDDEN)[source // TOP_K]
        row_source[expert, counts[expert]] = source
        counts[expert] += 1
    exact = {"rows": rows, "row_source": row_source, "counts": counts}
    for name, want in exact.items():
        for rank, mine in world.local(got[name]).items():
            own = want[rank * LOCAL_EXPERTS : (rank + 1) * LOCAL_EXPERTS]
            np.testing.assert_array_equal(mine, own, f"{name} of rank {rank}")

    eps = EPS[dtype]
    kept = np.where(topk_idx >= 0, weights, 0).astype(np.float64)
    y = (sent.astype(np.float32) * np.float32(SCALE)).astype(x.dtype).astype(np.float64)
    wide = cotangent.astype(np.float64)
    dot = (y * wide).sum(axis=2)[..., None]
    near = {
        "out": (kept.sum(axis=2)[..., None] * y, 2 * eps, 4 * eps),
        "dx": (SCALE * kept.sum(axis=2)[..., None] * wide, 8 * eps, 16 * eps),
        "dweights": (
            np.where(topk_idx >= 0, dot, 0),
            1e-5,
            1e-6 * np.abs(y * wide).sum(axis=2).max(initial=1),
        ),
    }
    for name, (want, rtol, atol) in near.items():
        for rank, mine in world.local(got[name]).items():
            np.testing.assert_allclose(
                mine.astype(np.float64), want[rank], rtol=rtol, atol=atol, err_msg=f"{name} of rank {rank}"
            )


def check_values(world):
    """Every dtype, wire and routing, whole and in halves, with gradients."""
    routings = [{}, {"kind": "zipf", "masked": 0.3}, {"kind": "hot"}, {"kind": "empty"}]
    with world.group(**settings(world)) as group:
        seed = 0
        for dtype in EPS:
            for wire in ("fp8", None):
                for halves in (False, True):
                    for tokens, routing in zip((1, 5, CHUNK, 3), routings, strict=True):
                        seed += 1
                        call = whole_call(world, group, wire, halves)
                        check_case(world, call, dtype, wire, tokens, seed, **routing)


def check_masked(world):
    """Ranks are masked and taken back, all processes being there; nothing is compiled again."""
    if world.num_ranks == 1 or world.backend == "xla":
        return
    last = world.num_ranks - 1
    masks = [[last], [0, last] if last > 1 else [0], [], list(range(1, world.num_ranks)), []]
    with world.group(**settings(world)) as group:
        for wire, halves in (("fp8", False), (None, True)):
            call = whole_call(world, group, wire, halves)
            for seed, masked in enumerate(masks):
                group.mask_ranks(masked)
                for repeat in range(3):
                    check_case(
                        world, call, jnp.bfloat16, wire, CHUNK, 10 * seed + repeat, masked, kind="zipf"
                    )
                group.check()
                world.barrier()  # results of all ranks are ready


def check_killed_then_masked(world):
    """A process ends between two calls; the others leave its rank out and go on. The last check of a job."""
    if world.num_processes < 3:
        return
    victim = world.num_ranks - 1
    group = world.group(**settings(world), deadline_s=world.deadline_s)
    x, weights, topk_idx, cotangent = map(world.put, draw(world, 0, jnp.bfloat16, CHUNK))
    scale = world.put(np.full((world.num_ranks, 1), SCALE, np.float32))
    call = world.compile(whole_call(world, group, "fp8", False), x, weights, topk_idx, cotangent, scale)
    check_case(world, call, jnp.bfloat16, "fp8", CHUNK, 1)
    world.barrier()
    if world.process == victim:
        os._exit(PLANNED_DEATH)
    try:
        # On a GPU what it returns is unspecified, until an op or check() raises.
        with contextlib.suppress(AssertionError):
            check_case(world, call, jnp.bfloat16, "fp8", CHUNK, 2)
        group.check()
    except jax.errors.JaxRuntimeError as error:
        assert world.missing(victim) in str(error), error
    else:
        raise AssertionError("expected an error")
    group.mask_ranks([victim])
    for seed in range(4):
        check_case(world, call, jnp.bfloat16, "fp8", CHUNK, seed, [victim], kind="zipf")
    group.check()
    group.close()
    world.say("killed_then_masked: ok")
    leave()


def check_kept(world):
    """Rows that stay FP8 are those of quantize, bit for bit."""
    x, _, topk_idx, _ = draw(world, 99, jnp.bfloat16, CHUNK)
    with world.group(**settings(world)) as group:

        def body(x, topk_idx):
            recv = wep.ll_dispatch(x, topk_idx, group, dequantize=False)
            return jax.lax.bitcast_convert_type(recv.rows, jnp.uint8), recv.scales, recv.row_source

        rows, scales, row_source = (
            world.local(a) for a in world.on_ranks(body)(world.put(x), world.put(topk_idx))
        )
    q, want_scales = oracle.quantize(x.reshape(-1, HIDDEN))
    for rank, source in row_source.items():
        filled = source >= 0
        np.testing.assert_array_equal(rows[rank][filled], q.view(np.uint8)[source[filled] // TOP_K])
        np.testing.assert_array_equal(scales[rank][filled], want_scales[source[filled] // TOP_K])
        assert not rows[rank][~filled].any()


def check_loop(world):
    """Many layers in one compiled loop, two microbatches in flight, new routing each time."""
    steps, tokens = 200, 8
    experts = LOCAL_EXPERTS * world.num_ranks
    with world.group(**settings(world)) as group:

        def body(x, keys):
            def layer(carry, key):
                batches = jnp.split(carry, 2)
                scores = jax.random.uniform(jax.random.wrap_key_data(key), (2, tokens, experts))
                topk_idx = jax.lax.top_k(scores, TOP_K)[1]
                weights = jnp.full((tokens, TOP_K), 1 / TOP_K, jnp.float32)
                sent = [
                    wep.ll_dispatch_send(b, i, group, quantize=None, zero_tail=False)
                    for b, i in zip(batches, topk_idx, strict=True)
                ]
                recv = [wep.ll_dispatch_recv(s) for s in sent]
                home = [wep.ll_combine_send(r.rows, weights, r, zero_tail=False) for r in recv]
                return jnp.concatenate([wep.ll_combine_recv(h) for h in home]) + 1, None

            return jax.lax.scan(layer, x, keys)[0]

        x = np.zeros((world.num_ranks, 2 * tokens, HIDDEN), np.float32)
        keys = np.random.default_rng(0).integers(0, 2**32, (world.num_ranks, steps, 2), np.uint32)
        for rank, mine in world.local(world.on_ranks(body)(world.put(x), world.put(keys))).items():
            # The experts do nothing and the weights sum to one: every layer adds one.
            np.testing.assert_array_equal(mine, np.full_like(mine, steps), f"rank {rank}")


def check_bad_index(world):
    """A repeated expert is an error, and it names the token."""
    x, _, topk_idx, _ = draw(world, 7, jnp.bfloat16, 4)
    topk_idx[world.num_ranks - 1, 2] = 1
    with world.group(**settings(world, deadline_s=5.0)) as group:
        run = world.on_ranks(lambda x, topk_idx: wep.ll_dispatch(x, topk_idx, group).rows)
        try:
            for _ in range(3):
                jax.block_until_ready(run(world.put(x), world.put(topk_idx)))
        except jax.errors.JaxRuntimeError as error:
            assert "twice" in str(error), error
            return
        raise AssertionError("a repeated expert went through")


CHECKS = {
    "values": check_values,
    "kept": check_kept,
    "masked": check_masked,
    "loop": check_loop,
    "bad_index": check_bad_index,
    "killed_then_masked": check_killed_then_masked,
}


def main():
    names = sys.argv[1:] or [name for name in CHECKS if name != "killed_then_masked"]
    world = World()
    for name in names:
        CHECKS[name](world)
        world.barrier()
        world.say(f"ok {name}")


if __name__ == "__main__":
    main()
