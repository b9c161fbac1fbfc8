"""Every op under JAX's transformations, on both backends, against a dense layer under the same ones."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec

import jax_wideep as wep
from jax_wideep.quantize import dequantize, quantize

RANKS, EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 8, 2, 128, 3
SPEC = PartitionSpec("expert")


@pytest.fixture(scope="module")
def groups():
    mesh = jax.make_mesh(
        (RANKS,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:RANKS]
    )
    made = {
        backend: wep.ExpertGroup(
            mesh, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, backend=backend, chunk=TOKENS + 1
        )
        for backend in ("cpu", "xla")
    }
    yield made
    for group in made.values():
        group.close()


@pytest.fixture(params=["cpu", "xla"])
def group(groups, request):
    return groups[request.param]


# Every expert computes factor[expert] * tanh(row), by the ops of one mode.


def throughput(group, x, weights, factor, topk_idx):
    plan = wep.make_plan(topk_idx, group, capacity=RANKS * TOKENS * TOP_K)
    rows, row_weights = wep.dispatch(x, weights, plan)
    expert = jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(plan.capacity), side="right")
    y = jnp.tanh(rows) * factor[jnp.minimum(expert, group.local_experts - 1), None]
    return wep.combine(y, row_weights, plan)


def low_latency(group, x, weights, factor, topk_idx):
    recv = wep.ll_dispatch_recv(wep.ll_dispatch_send(x, topk_idx, group))
    y = jnp.tanh(recv.rows) * factor[:, None, None]
    return wep.ll_combine_recv(wep.ll_combine_send(y, weights, recv))


MODES = {"throughput": throughput, "low_latency": low_latency}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def dense(mode, x, weights, factor, topk_idx):
    """The same without an exchange, on all ranks' tokens; an FP8 wire has a straight-through gradient."""
    if mode == "low_latency":
        x = x + jax.lax.stop_gradient(dequantize(*quantize(x), x.dtype) - x)
    weight = jnp.where(topk_idx >= 0, weights * factor[topk_idx], 0).sum(axis=1)
    return weight[:, None] * jnp.tanh(x)


def spread(group, function, in_specs=SPEC, out_specs=SPEC, **options):
    """`function` on every rank's shard."""
    return jax.shard_map(function, mesh=group.mesh, in_specs=in_specs, out_specs=out_specs, **options)


def exchanged(group, mode, **options):
    return spread(group, functools.partial(MODES[mode], group), **options)


def inputs(seed=0, masked=0.1):
    rng = np.random.default_rng(seed)
    topk_idx = oracle.random_topk(rng, RANKS, TOKENS, EXPERTS, TOP_K, kind="zipf", masked=masked)
    return (
        jnp.asarray(rng.normal(size=(RANKS * TOKENS, HIDDEN)), jnp.float32),
        jnp.asarray(rng.normal(size=(RANKS * TOKENS, TOP_K)), jnp.float32),
        jnp.asarray(rng.normal(size=EXPERTS), jnp.float32),
        jnp.asarray(topk_idx.reshape(-1, TOP_K)),
    )


def close(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def loss_of(run, topk_idx):
    return lambda x, weights, factor: jnp.sum(jnp.sin(run(x, weights, factor, topk_idx)))


# ---- jit, grad, value_and_grad, shard_map's type check ----


@pytest.mark.parametrize("check_vma", [True, False])
def test_value_and_grad(group, mode, check_vma):
    *floats, topk_idx = inputs()
    run = exchanged(group, mode, check_vma=check_vma)
    want = jax.value_and_grad(loss_of(functools.partial(dense, mode), topk_idx), argnums=(0, 1, 2))(*floats)
    step = jax.value_and_grad(loss_of(run, topk_idx), argnums=(0, 1, 2))
    close(jax.jit(step)(*floats), want)
    close(jax.jit(jax.grad(loss_of(run, topk_idx), argnums=(0, 1, 2)))(*floats), want[1])


def test_gradients_inside_shard_map_sum_over_replicas(group, mode):
    """Arguments that all ranks share get the sum of the ranks' gradients, by shard_map's type check."""
    *_, topk_idx = inputs()
    x, weights, factor = inputs(seed=1)[:3]
    x, weights = x[:TOKENS], weights[:TOKENS]  # the same tokens on every rank, routed differently

    def body(x, weights, factor, topk_idx):
        def loss(x, weights, factor):
            return jnp.sum(jnp.sin(MODES[mode](group, x, weights, factor, topk_idx)))

        return jax.grad(loss, argnums=(0, 1, 2))(x, weights, factor)

    specs = (PartitionSpec(), PartitionSpec(), SPEC)
    got = jax.jit(spread(group, body, in_specs=(*specs, SPEC), out_specs=specs))(x, weights, factor, topk_idx)

    def loss(x, weights, factor):
        everyone = jnp.tile(x, (RANKS, 1)), jnp.tile(weights, (RANKS, 1))
        return jnp.sum(jnp.sin(dense(mode, *everyone, factor, topk_idx)))

    close(got, jax.grad(loss, argnums=(0, 1, 2))(x, weights, factor))


def test_group_is_a_static_argument(group, mode):
    @functools.partial(jax.jit, static_argnums=0)
    def run(group, *arrays):
        return exchanged(group, mode)(*arrays)

    close(run(group, *inputs()), dense(mode, *inputs()))


# ---- control flow ----


def test_scan_of_hundreds_and_its_gradient(group, mode):
    *floats, topk_idx = inputs()
    steps = 300

    def many(run, x, weights, factor):
        def step(x, i):
            moved = run(x, weights, factor, jnp.roll(topk_idx, i, axis=0))
            return 0.9 * x + 0.1 * moved, None

        return jnp.sum(jax.lax.scan(step, x, jnp.arange(steps))[0] ** 2)

    def compare(run):
        return jax.jit(jax.value_and_grad(functools.partial(many, run), argnums=(0, 1, 2)))(*floats)

    if (
        mode == "low_latency"
    ):  # the wire's rounding makes long trajectories part: compare with itself unrolled
        first, again = compare(exchanged(group, mode)), compare(exchanged(group, mode))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        steps = 2
    close(compare(exchanged(group, mode)), compare(functools.partial(dense, mode)), 1e-4)


def test_cond_and_while_loop(group, mode):
    run = exchanged(group, mode)

    @jax.jit
    def loop(x, weights, factor, topk_idx):
        def body(state):
            i, x = state
            return i + 1, jax.lax.cond(i % 2 == 0, lambda x: run(x, weights, factor, topk_idx), jnp.sin, x)

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    x, *rest = inputs()
    want = dense(mode, jnp.sin(dense(mode, x, *rest)), *rest)
    close(loop(x, *rest), want, 1e-4 if mode == "throughput" else 0.05)


# ---- vmap ----


@pytest.mark.parametrize("where", ["inside shard_map", "around shard_map"])
def test_vmap(group, mode, where):
    """Every primitive has a batched operand, and some that are not; the batch axis need not be the first."""
    batch = [inputs(seed) for seed in range(3)]
    x, weights, factor, topk_idx = (jnp.stack(arrays) for arrays in zip(*batch, strict=True))
    x = jnp.moveaxis(x, 0, 1)
    axes = (1, 0, 0, 0)
    if where == "inside shard_map":
        specs = (SPEC, *[PartitionSpec(None, "expert")] * 3)
        run = spread(
            group,
            jax.vmap(functools.partial(MODES[mode], group), in_axes=axes),
            in_specs=specs,
            out_specs=specs[1],
        )
    else:
        run = jax.vmap(exchanged(group, mode), in_axes=axes)

    def step(run):
        return jax.value_and_grad(lambda *f: jnp.sum(jnp.sin(run(*f, topk_idx))), argnums=(0, 1, 2))

    want = step(jax.vmap(functools.partial(dense, mode), in_axes=axes))(x, weights, factor)
    close(jax.jit(step(run))(x, weights, factor), want)


def test_vmap_over_the_weights_alone(group, mode):
    x, weights, factor, topk_idx = inputs()
    many = jnp.stack([weights, -weights, 0 * weights])
    run = jax.jit(jax.vmap(exchanged(group, mode), in_axes=(None, 0, None, None)))
    want = dense(mode, x, weights, factor, topk_idx)
    close(run(x, many, factor, topk_idx), jnp.stack([want, -want, 0 * want]))


# ---- jax.checkpoint ----


def count(jaxpr, primitive):
    """Occurrences of a primitive in a jaxpr and in those that it calls."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == primitive
        found += sum(count(inner, primitive) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return found


EXPERT_OPS = ("wideep_plan", "wideep_dispatch", "wideep_combine")
ROWS, EXPERT_HIDDEN, OUTPUT, PLAN = wep.CHECKPOINT_NAMES


@pytest.mark.parametrize(
    ("names", "runs"),
    [
        # How often the forward and the backward pass together plan, dispatch and combine.
        (None, (1, 1, 1)),  # no checkpoint
        ((), (2, 2, 2)),  # nothing is saved
        ((PLAN,), (1, 2, 2)),
        ((PLAN, ROWS), (1, 1, 2)),
        ((PLAN, ROWS, OUTPUT), (1, 1, 1)),
        ((PLAN, ROWS, OUTPUT, EXPERT_HIDDEN), (1, 1, 1)),
    ],
)
def test_checkpoint_policies_by_name(groups, names, runs):
    traced, floats = checkpointed_step(groups["cpu"], names)
    assert tuple(count(traced.jaxpr.jaxpr, op) for op in EXPERT_OPS) == runs
    plain, _ = checkpointed_step(groups["cpu"], None)
    got, want = (step.lower().compile()(*floats) for step in (traced, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_saved_expert_hidden_is_not_multiplied_again(groups):
    without, having = (
        count(checkpointed_step(groups["cpu"], names)[0].jaxpr.jaxpr, "dot_general")
        for names in ((PLAN, ROWS, OUTPUT), (PLAN, ROWS, OUTPUT, EXPERT_HIDDEN))
    )
    assert having < without


def checkpointed_step(group, names):
    """value_and_grad of a layer that saves `names` (None: without jax.checkpoint), traced, and its arguments."""
    x, weights, _, topk_idx = inputs()
    rng = np.random.default_rng(2)
    wi = jnp.asarray(rng.normal(size=(EXPERTS, HIDDEN, 16)) / 12, jnp.float32)
    wo = jnp.asarray(rng.normal(size=(EXPERTS, 8, HIDDEN)) / 3, jnp.float32)

    def layer(x, weights, wi, wo, topk_idx):
        return jnp.sin(wep.moe_ffn(x, topk_idx, weights, wi, wo, group)[0])

    if names is not None:
        layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*names))

    def loss(x, weights, wi, wo):
        return jnp.sum(spread(group, layer)(x, weights, wi, wo, topk_idx))

    step = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    return jax.jit(step).trace(x, weights, wi, wo), (x, weights, wi, wo)


def test_checkpoint_of_the_ops(group, mode):
    """Nothing saved: the backward pass runs the exchange again, to the same bits."""
    *floats, topk_idx = inputs()
    plain = exchanged(group, mode)
    again = spread(group, jax.checkpoint(functools.partial(MODES[mode], group)))
    outside = jax.checkpoint(plain)
    want = jax.jit(jax.value_and_grad(loss_of(plain, topk_idx), argnums=(0, 1, 2)))(*floats)
    for run in (again, outside):
        got = jax.jit(jax.value_and_grad(loss_of(run, topk_idx), argnums=(0, 1, 2)))(*floats)
        jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- donation, export ----


def test_donated_buffers(group, mode):
    """Each step's output may take the place of its input, with many launches in flight."""
    x, weights, factor, topk_idx = inputs()
    place = jax.sharding.NamedSharding(group.mesh, SPEC)
    x, weights, factor, topk_idx = (jax.device_put(a, place) for a in (x, weights, factor, topk_idx))

    def step(x, weights, factor, topk_idx):
        return 0.5 * x + exchanged(group, mode)(x, weights, factor, topk_idx)

    kept, donated = x, x + 0
    for _ in range(30):
        kept = jax.jit(step)(kept, weights, factor, topk_idx)
    run = jax.jit(step, donate_argnums=0)
    for _ in range(30):
        before, donated = donated, run(donated, weights, factor, topk_idx)
        assert before.is_deleted()
    np.testing.assert_array_equal(kept, donated)


def test_export(group, mode):
    """Serialised and read back in the process that made the group, whose number is part of the program."""
    *floats, topk_idx = inputs()
    run = exchanged(group, mode)

    def step(x, weights, factor):
        return jax.value_and_grad(loss_of(run, topk_idx), argnums=(0, 1, 2))(x, weights, factor)

    place = jax.sharding.NamedSharding(group.mesh, SPEC)
    floats = [jax.device_put(a, place) for a in floats]
    ops = "plan dispatch dispatch_grad combine combine_grad quantize ll_dispatch ll_combine ll_combine_grad"
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"wideep_{op}") for op in ops.split()]
    exported = jax.export.export(jax.jit(step), disabled_checks=checks)(*floats)
    again = jax.export.deserialize(exported.serialize())
    close(jax.jit(again.call)(*floats), jax.jit(step)(*floats))
