"""plan, dispatch, combine and their gradients on the ranks of world.py, against the NumPy oracle.

    python tests/gpu/launch.py 8 tests/gpu/exchange_suite.py [check ..]

Every process computes what all ranks should get and compares its own. Default: all checks but `killed` and
`killed_then_masked`, which end processes on purpose: each is the last of its job. Run with
--xla-flag=--xla_gpu_graph_min_graph_size=1 and --dump=captured_step, XLA captures even single ops, and `captured` looks
for it.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from launch import PLANNED_DEATH
from leaving import leave
from world import World, group_settings

import jax_wideep as wep

EPS = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}
TOKENS, TOP_K, LOCAL_EXPERTS = 37, 4, 4
SCALE = 1.5

# Every form of every op: zero-copy in both directions, and through the rings.
PATHS = {
    "push-pull": {"dispatch_form": "push", "combine_form": "pull"},
    "pull-push": {"dispatch_form": "pull", "combine_form": "push"},
    "pull-reduce": {"dispatch_form": "pull", "combine_form": "reduce"},
    "rings": {"zero_copy": "off", "dispatch_form": "push", "combine_form": "push"},
}


def paths(*names: str) -> list[dict[str, str]]:
    """Settings of these paths, by default of all. A group over nodes (WIDEEP_GROUP, node_size) has one path."""
    if "node_size" in group_settings():
        return [{}]
    return [PATHS[name] for name in names or PATHS]


def settings(world: World, hidden: int = 256, **more):
    return {"num_experts": LOCAL_EXPERTS * world.num_ranks, "top_k": TOP_K, "hidden": hidden, **more}


def draw(world, seed, hidden, dtype, *, tokens=TOKENS, empty_rank=None, **routing):
    """x, weights, topk_idx of all ranks, the same in every process."""
    rng = np.random.default_rng(seed)
    shape = (world.num_ranks, tokens)
    x = np.asarray(rng.normal(size=(*shape, hidden))).astype(jnp.dtype(dtype))
    weights = rng.normal(size=(*shape, TOP_K)).astype(np.float32)
    experts = LOCAL_EXPERTS * world.num_ranks
    topk_idx = oracle.random_topk(rng, world.num_ranks, tokens, experts, TOP_K, **routing)
    if empty_rank is not None:
        topk_idx[empty_rank] = -1
    return x, weights, topk_idx


def plan_arrays(plan):
    names = "group_sizes num_rows overflow tokens_per_expert dest_rank dest_row row_source arrival_rows rows_per_source"
    return {name: jnp.atleast_1d(getattr(plan, name)) for name in names.split()}


def whole_step(world, group, capacity, like=None, **options):
    """Everything that one layer does, forward and backward, for a made-up expert; compiled for inputs `like` these."""

    def body(x, weights, topk_idx, cotangent, scale):
        def forward(x, weights):
            plan = wep.make_plan(topk_idx, group, capacity=capacity)
            rows, row_weights = wep.dispatch(x, weights, plan, **options)
            y = rows * scale.astype(rows.dtype)
            return wep.combine(y, row_weights, plan, **options), (rows, row_weights, plan_arrays(plan))

        out, backward, (rows, row_weights, plan) = jax.vjp(forward, x, weights, has_aux=True)
        dx, dweights = backward(cotangent)
        return {
            "out": out,
            "rows": rows,
            "row_weights": row_weights,
            "dx": dx,
            "dweights": dweights,
            "plan": plan,
        }

    step = world.on_ranks(body)
    scale = world.put(np.full((world.num_ranks, 1), SCALE, np.float32))
    if like is not None:
        x, weights, topk_idx = map(world.put, like)
        step = world.compile(step, x, weights, topk_idx, x, scale)
    return lambda *arrays: step(*arrays, scale)


def check_step(world, got, x, weights, topk_idx, cotangent, capacity, dtype, masked=()):
    plan = oracle.make_masked_plan(topk_idx, LOCAL_EXPERTS * world.num_ranks, capacity, masked)
    for name, array in got["plan"].items():
        want = getattr(plan, name)
        for rank, mine in world.local(array).items():
            np.testing.assert_array_equal(mine, np.atleast_1d(want[rank]), f"{name} of rank {rank}")
    rows, row_weights = oracle.dispatch(x, weights, plan)
    y = (rows.astype(np.float32) * np.float32(SCALE)).astype(x.dtype)
    kept = plan.dest_rank >= 0
    wide_x, wide_cotangent = x.astype(np.float64), cotangent.astype(np.float64)
    products = wide_x * wide_cotangent
    exact = {"rows": rows, "row_weights": row_weights}
    eps = EPS[dtype]
    # (expected, relative tolerance, absolute tolerance); push and reduce round each rank's sum too
    near = {
        "out": (oracle.combine(y, row_weights, plan), 2 * eps, 12 * eps),
        "dx": (SCALE * np.where(kept, weights, 0).sum(axis=2)[..., None] * wide_cotangent, 8 * eps, 16 * eps),
        "dweights": (
            np.where(kept, SCALE * products.sum(axis=2)[..., None], 0),
            8 * eps,
            eps * np.abs(products).sum(axis=2).max(initial=1),
        ),
    }
    for name, want in exact.items():
        for rank, mine in world.local(got[name]).items():
            np.testing.assert_array_equal(mine, want[rank], f"{name} of rank {rank}")
    for name, (want, rtol, atol) in near.items():
        for rank, mine in world.local(got[name]).items():
            assert mine.dtype == (np.float32 if name == "dweights" else x.dtype)
            np.testing.assert_allclose(
                mine.astype(np.float64), want[rank], rtol=rtol, atol=atol, err_msg=f"{name} of rank {rank}"
            )


def run_and_check(world, step, inputs, capacity, dtype, seed, masked=()):
    x, weights, topk_idx = inputs
    cotangent = np.random.default_rng(seed).normal(size=x.shape).astype(x.dtype)
    got = step(*(world.put(array) for array in (x, weights, topk_idx, cotangent)))
    check_step(world, got, x, weights, topk_idx, cotangent, capacity, dtype, masked)


# ---- values and gradients ----


def check_values(world):
    """Every path, dtype and routing; capacities that hold everything and that do not."""
    worst = world.num_ranks * TOKENS * TOP_K
    cases = [
        (path, dtype, hidden, capacity)
        for path in paths()
        for dtype, hidden, capacity in ((jnp.bfloat16, 256, worst), (jnp.float32, 136, TOKENS * TOP_K // 2))
    ] + [(path, jnp.float16, 264, worst + 3) for path in paths("push-pull")]
    routings = [
        {},
        {"kind": "zipf", "masked": 0.3},
        {"kind": "hot"},
        {"kind": "empty"},
        {"empty_rank": 0},
        {"distinct": False, "masked": 0.1},
    ]
    for path, dtype, hidden, capacity in cases:
        with world.group(**settings(world, hidden), **path) as group:
            step = whole_step(world, group, capacity)
            for seed, routing in enumerate(routings):
                inputs = draw(world, seed, hidden, dtype, **routing)
                run_and_check(world, step, inputs, capacity, dtype, seed)
            group.check()


def check_one_token(world):
    # Not none at all: XLA's compilers in jax 0.11.2 crash on a program whose inputs are all empty. test_exchange.py has
    # that, with tokens sliced away inside.
    capacity = world.num_ranks * TOP_K
    with world.group(**settings(world)) as group:
        step = whole_step(world, group, capacity)
        run_and_check(world, step, draw(world, 1, 256, jnp.bfloat16, tokens=1), capacity, jnp.bfloat16, 2)


def check_tail(world):
    """zero_tail=False leaves the tail alone and everything else as it was."""
    with world.group(**settings(world)) as group:
        capacity = world.num_ranks * TOKENS * TOP_K
        outputs = []
        x, weights, topk_idx = draw(world, 4, 256, jnp.bfloat16, kind="zipf")
        cotangent = np.random.default_rng(5).normal(size=x.shape).astype(x.dtype)
        arrays = [world.put(array) for array in (x, weights, topk_idx, cotangent)]
        for zero_tail in (True, False):
            outputs.append(whole_step(world, group, capacity, zero_tail=zero_tail)(*arrays))
        cleared, left = outputs
        for name in ("out", "dx", "dweights"):
            for rank, mine in world.local(cleared[name]).items():
                np.testing.assert_array_equal(mine, world.local(left[name])[rank], name)
        for rank, num_rows in world.local(cleared["plan"]["num_rows"]).items():
            head = slice(0, num_rows[0])
            np.testing.assert_array_equal(
                world.local(cleared["rows"])[rank][head], world.local(left["rows"])[rank][head]
            )


def check_fp8(world):
    for path in paths("push-pull", "pull-push", "rings"):
        for dtype, hidden in ((jnp.bfloat16, 384), (jnp.float32, 128)):
            with world.group(**settings(world, hidden), **path) as group:
                capacity = world.num_ranks * TOKENS * TOP_K

                def body(x, weights, topk_idx, group=group, capacity=capacity):
                    plan = wep.make_plan(topk_idx, group, capacity=capacity)
                    rows, row_weights = wep.dispatch(x, weights, plan, quantize="fp8")
                    (q, scales), _ = wep.dispatch(x, weights, plan, quantize="fp8", dequantize=False)
                    return rows, row_weights, q, scales

                inputs = draw(world, 6, hidden, dtype, kind="zipf", masked=0.2)
                got = world.on_ranks(body)(*map(world.put, inputs))
                x, weights, topk_idx = inputs
                plan = oracle.make_plan(topk_idx, LOCAL_EXPERTS * world.num_ranks, capacity)
                q, scales = oracle.quantize(x)
                want_q, want_weights = oracle.dispatch(q, weights, plan)
                want_scales, _ = oracle.dispatch(scales, weights, plan)
                want = (oracle.dequantize(want_q, want_scales, x.dtype), want_weights, want_q, want_scales)
                for array, expected in zip(got, want, strict=True):
                    for rank, mine in world.local(array).items():
                        np.testing.assert_array_equal(mine.view(np.uint8), expected[rank].view(np.uint8))


def check_masked(world):
    """Ranks are masked and taken back, all processes being there; nothing is compiled again."""
    if world.num_ranks == 1 or world.backend == "xla":
        return
    worst = world.num_ranks * TOKENS * TOP_K
    last = world.num_ranks - 1
    masks = [[last], [0, last] if last > 1 else [0], [], list(range(1, world.num_ranks)), []]
    cases = ((jnp.bfloat16, worst), (jnp.float32, TOKENS * TOP_K // 2))
    for number, path in enumerate(paths() * (2 if len(paths()) == 1 else 1)):
        dtype, capacity = cases[number % 2]
        with world.group(**settings(world), **path) as group:
            step = whole_step(world, group, capacity)
            for seed, masked in enumerate(masks):
                group.mask_ranks(masked)
                assert group.masked_ranks == tuple(masked)
                for routing in ({"masked": 0.1}, {"kind": "hot"}):
                    inputs = draw(world, seed, 256, dtype, **routing)
                    run_and_check(world, step, inputs, capacity, dtype, seed, masked)
                group.check()
                world.barrier()  # results of all ranks are ready


# ---- the same bits, under transformations ----


def check_repeats(world, repeats=200):
    """The same bits 200 times, whoever comes late."""
    rng = np.random.default_rng(100 + world.process)
    for path in paths("push-pull", "pull-reduce", "rings"):
        with world.group(**settings(world), **path) as group:
            capacity = world.num_ranks * TOKENS * TOP_K
            step = whole_step(world, group, capacity)
            x, weights, topk_idx = draw(world, 7, 256, jnp.bfloat16, kind="zipf", masked=0.1)
            cotangent = np.random.default_rng(8).normal(size=x.shape).astype(x.dtype)
            arrays = [world.put(array) for array in (x, weights, topk_idx, cotangent)]
            first = None
            for _ in range(repeats // 2):
                time.sleep(rng.exponential(0.001))
                leaves = [world.local(leaf) for leaf in jax.tree.leaves(step(*arrays))]
                got = [leaf[rank].tobytes() for leaf in leaves for rank in world.local_ranks]
                first = first or got
                assert got == first
            check_step(world, step(*arrays), x, weights, topk_idx, cotangent, capacity, jnp.bfloat16)


def layer(group, x, weights, topk_idx, capacity):
    plan = wep.make_plan(topk_idx, group, capacity=capacity)
    rows, row_weights = wep.dispatch(x, weights, plan)
    return wep.combine(jnp.tanh(rows), row_weights, plan)


def expected_layer(world, x, weights, topk_idx):
    kept = np.where(topk_idx >= 0, weights, 0).sum(axis=2)[..., None]
    return kept * np.tanh(x)


def check_transforms(world):
    """scan over layers, and gradients under remat: the same bits as without."""
    capacity = world.num_ranks * TOKENS * TOP_K
    with world.group(**settings(world, 128)) as group:
        x, weights, topk_idx = draw(world, 9, 128, jnp.float32, kind="zipf", masked=0.1)

        def scanned(x, weights, topk_idx):
            def one(carry, _):
                return layer(group, carry, weights, topk_idx, capacity), None

            return jax.lax.scan(one, x, None, length=5)[0]

        want = x.astype(np.float64)
        for _ in range(5):
            want = expected_layer(world, want, weights, topk_idx)
        arrays = [world.put(array) for array in (x, weights, topk_idx)]
        for rank, mine in world.local(world.on_ranks(scanned)(*arrays)).items():
            np.testing.assert_allclose(mine, want[rank], rtol=2e-4, atol=2e-5)

        def gradients(wrap):
            def body(x, weights, topk_idx):
                wrapped = wrap(lambda x, w: layer(group, x, w, topk_idx, capacity))

                def loss(x, w):
                    return jnp.sum(wrapped(x, w) ** 2)

                return jax.grad(loss, argnums=(0, 1))(x, weights)

            return [world.local(array) for array in world.on_ranks(body)(*arrays)]

        for plain, again in zip(gradients(lambda f: f), gradients(jax.checkpoint), strict=True):
            for rank, mine in plain.items():
                assert np.abs(mine).max() > 0
                np.testing.assert_array_equal(mine, again[rank])


def check_captured(world):
    """One compiled step over other data and buffers; XLA has captured it if it was told to."""
    capacity = world.num_ranks * TOKENS * TOP_K
    with world.group(**settings(world, 128)) as group:

        def captured_step(x, weights, topk_idx):
            return layer(group, x, weights, topk_idx, capacity)

        step = world.on_ranks(captured_step)  # the module is named after it
        kept = []
        for seed in range(6):
            inputs = draw(world, seed, 128, jnp.float32, kind="zipf" if seed % 2 else "uniform")
            arrays = [world.put(array) for array in inputs]
            want = expected_layer(world, *inputs)
            for _ in range(3):
                out = step(*arrays)
                kept.append((arrays, out))  # so that the next call gets other buffers
                for rank, mine in world.local(out).items():
                    np.testing.assert_allclose(mine, want[rank], rtol=1e-5, atol=1e-5)
        group.check()
    if world.backend != "cuda" or "graph_min_graph_size" not in os.environ.get("XLA_FLAGS", ""):
        return
    scratch = pathlib.Path(os.environ["WIDEEP_SCRATCH"]) / f"dump{world.process}"
    dumped = [path for path in scratch.rglob("*") if "captured_step" in str(path) and path.is_file()]
    captured = [path for path in dumped if b"kCommandBuffer" in path.read_bytes()]
    assert captured, f"no command buffer in {sorted(path.name for path in dumped)}"


def check_moe(world):
    """moe_ffn, forward and backward, against every expert on every token."""
    hidden, ffn = 128, 64
    experts = LOCAL_EXPERTS * world.num_ranks
    rng = np.random.default_rng(11)
    x, weights, topk_idx = draw(world, 12, hidden, jnp.float32, kind="zipf", masked=0.1)
    wi = (rng.normal(size=(world.num_ranks, LOCAL_EXPERTS, hidden, 2 * ffn)) / hidden**0.5).astype(np.float32)
    wo = (rng.normal(size=(world.num_ranks, LOCAL_EXPERTS, ffn, hidden)) / ffn**0.5).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)

    def swiglu(h):
        gate, up = jnp.split(h, 2, axis=-1)
        return jax.nn.silu(gate) * up

    with world.group(**settings(world, hidden)) as group, jax.default_matmul_precision("highest"):

        def body(x, weights, topk_idx, wi, wo, cotangent):
            def forward(x, weights, wi, wo):
                return wep.moe_ffn(x, topk_idx, weights, wi, wo, group, implementation="xla")[0]

            out, backward = jax.vjp(forward, x, weights, wi, wo)
            return out, *backward(cotangent)

        got = world.on_ranks(body)(*map(world.put, (x, weights, topk_idx, wi, wo, cotangent)))

        @jax.jit
        def dense(x, weights, wi, wo, cotangent):
            forward = lambda x, w, wi, wo: oracle.dense_moe(x, topk_idx.reshape(-1, TOP_K), w, wi, wo, swiglu)  # noqa: E731
            out, backward = jax.vjp(forward, x, weights, wi, wo)
            return out, *backward(cotangent)

        flat = [a.reshape(-1, a.shape[-1]) for a in (x, weights)]
        want = dense(
            *flat,
            wi.reshape(experts, hidden, -1),
            wo.reshape(experts, ffn, -1),
            cotangent.reshape(-1, hidden),
        )
        for name, array, expected in zip(("out", "dx", "dweights", "dwi", "dwo"), got, want, strict=True):
            expected = np.asarray(expected).reshape(world.num_ranks, -1, *array.shape[1:])
            for rank, mine in world.local(array).items():
                np.testing.assert_allclose(mine, expected[rank], rtol=2e-3, atol=2e-3, err_msg=name)


# ---- failures ----


def expect_failure(group, step, arrays, words, deadline_s):
    """`step` ends within the deadline and two seconds, and check() raises; so does the next step, unless XLA replays it
    from a command buffer, without asking anybody."""
    began = time.monotonic()
    try:
        jax.block_until_ready(step(*arrays))
    except jax.errors.JaxRuntimeError as error:
        assert words[0] in str(error), error  # a later op of the step raises, if the record is there by then
    took = time.monotonic() - began
    assert took < deadline_s + 2, f"took {took:.1f} s"
    raising = [group.check] if group.backend == "cuda" else []
    if group.backend == "cpu" or "--xla_gpu_enable_command_buffer= " in os.environ.get("XLA_FLAGS", "") + " ":
        raising.append(lambda: jax.block_until_ready(step(*arrays)))
    for raises in raising:
        try:
            raises()
        except jax.errors.JaxRuntimeError as error:
            for word in words:
                assert word in str(error), f"{word!r} not in {error}"
        else:
            raise AssertionError("expected an error")


def check_bad_index(world):
    if world.backend != "cuda":
        return
    with world.group(**settings(world), deadline_s=5.0) as group:
        step = world.on_ranks(lambda topk_idx: wep.make_plan(topk_idx, group).dest_row)
        _, _, topk_idx = draw(world, 13, 8, jnp.float32)
        bad = world.num_ranks - 1
        topk_idx[bad, 3, 1] = LOCAL_EXPERTS * world.num_ranks
        words = [f"topk_idx out of range on rank {bad}", "close it and make a new one"]
        expect_failure(group, step, [world.put(topk_idx)], words, 5.0)


def check_delayed(world):
    """A rank that comes after the deadline; then a new group."""
    if world.backend != "cuda" or world.num_processes == 1:
        return
    late = world.num_ranks - 1
    inputs = draw(world, 14, 256, jnp.bfloat16)
    capacity = world.num_ranks * TOKENS * TOP_K
    with world.group(**settings(world), deadline_s=world.deadline_s) as group:
        arrays = [world.put(array) for array in inputs]
        step = world.compile(world.on_ranks(lambda *arrays: layer(group, *arrays, capacity)), *arrays)
        jax.block_until_ready(step(*arrays))
        world.barrier()
        if world.process == late:
            time.sleep(world.deadline_s + 1)
        words = ["make_plan: ", f"waited longer than the deadline of {world.deadline_s:g} s for rank {late}"]
        if world.process == late:
            words = words[:1]  # what it is told by the others
        expect_failure(group, step, arrays, words, world.deadline_s)
        world.barrier()
    with world.group(**settings(world)) as group:
        step = whole_step(world, group, capacity)
        run_and_check(world, step, inputs, capacity, jnp.bfloat16, 15)


def check_killed(world):
    """A process that ends between two steps; the last check of a job, which its process cannot leave in good order."""
    if world.num_processes == 1:
        return
    victim = world.num_ranks - 1
    capacity = world.num_ranks * TOKENS * TOP_K
    group = world.group(**settings(world), deadline_s=world.deadline_s)
    arrays = [world.put(array) for array in draw(world, 16, 256, jnp.bfloat16)]
    step = world.compile(world.on_ranks(lambda *arrays: layer(group, *arrays, capacity)), *arrays)
    jax.block_until_ready(step(*arrays))
    world.barrier()
    if world.process == victim:
        os._exit(PLANNED_DEATH)
    words = ["make_plan: ", world.missing(victim)]
    expect_failure(group, step, arrays, words, world.deadline_s)
    group.close()
    world.say("killed: ok")
    leave()


def check_killed_then_masked(world):
    """A process ends between two steps; the others leave its rank out and go on, twice. The last check of a job."""
    if world.num_processes < 3:
        return
    victims = [world.num_ranks - 1, world.num_ranks - 2]
    capacity = world.num_ranks * TOKENS * TOP_K
    group = world.group(**settings(world), deadline_s=world.deadline_s)
    step = whole_step(world, group, capacity, like=draw(world, 17, 256, jnp.bfloat16))
    for number, victim in enumerate(victims[: world.num_ranks - 2]):
        masked = sorted(victims[:number])
        run_and_check(world, step, draw(world, 17, 256, jnp.bfloat16), capacity, jnp.bfloat16, 18, masked)
        world.barrier(absent=masked)
        if world.process == victim:
            os._exit(PLANNED_DEATH)
        x, weights, topk_idx = draw(world, 19, 256, jnp.bfloat16)
        cotangent = np.random.default_rng(20).normal(size=x.shape).astype(x.dtype)
        arrays = [world.put(array) for array in (x, weights, topk_idx, cotangent)]
        # Each of the step's five kernels finds out by itself, or is told.
        expect_failure(group, step, arrays, ["make_plan: ", world.missing(victim)], world.deadline_s)
        masked = sorted([*masked, victim])
        group.mask_ranks(masked)
        group.check()
        for seed in range(3):
            inputs = draw(world, seed, 256, jnp.bfloat16, kind="zipf" if seed else "uniform")
            run_and_check(world, step, inputs, capacity, jnp.bfloat16, seed, masked)
        group.check()
    group.close()
    world.say("killed_then_masked: ok")
    leave()


CHECKS = {
    "values": check_values,
    "one_token": check_one_token,
    "tail": check_tail,
    "fp8": check_fp8,
    "masked": check_masked,
    "repeats": check_repeats,
    "transforms": check_transforms,
    "captured": check_captured,
    "moe": check_moe,
    "bad_index": check_bad_index,
    "delayed": check_delayed,
    "killed": check_killed,
    "killed_then_masked": check_killed_then_masked,
}
# They end processes, and the job.
LAST = ("killed", "killed_then_masked")


def main() -> None:
    world = World()
    names = sys.argv[1:] or [name for name in CHECKS if name not in LAST]
    for name in names:
        began = time.monotonic()
        CHECKS[name](world)
        world.say(f"{name}: ok, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
