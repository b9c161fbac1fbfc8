"""The layer of each model family on the ranks of world.py, forward and backward, against every expert on every token.

    python tests/gpu/launch.py 8 tests/gpu/families_suite.py [family ..]
    WIDEEP_CPU_RANKS=4 python tests/gpu/families_suite.py gpt_oss

Ranks that share a GPU have no collectives of XLA's, so every rank has its own copy of what a layer holds whole, and its
own gradient of it. Every process computes what all ranks should get and compares its own.
"""

from __future__ import annotations

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from world import World

import jax_wideep as wep
from jax_wideep import families
from jax_wideep.families.mapping import OF_EXPERTS, parameter_shapes
from jax_wideep.moe import activate

TOKENS, LOCAL_EXPERTS, HIDDEN, FFN, CHUNK = 37, 4, 128, 64, 16
# Largest difference, relative to the largest value: products of bfloat16 sum rounding over hidden and ffn.
TOLERANCE = {jnp.float32: 1e-4, jnp.bfloat16: 4e-2}
# Decisions that hold although logits change by this, on any backend.
MARGIN = 1e-3
CASES = (("throughput", jnp.float32), ("throughput", jnp.bfloat16), ("low_latency", jnp.bfloat16))


def preset_of(family: str, experts: int, dtype) -> families.Preset:
    # So low that it clamps; but where its derivative jumps, rounding to bfloat16 decides which side a value is on.
    limit = 1.0 if dtype == jnp.float32 else 7.0
    make = {
        "mixtral": families.mixtral,
        "qwen2_moe": functools.partial(families.qwen2_moe, shared_ffn=96),
        "qwen3_moe": families.qwen3_moe,
        "deepseek_v3": functools.partial(families.deepseek_v3, num_groups=experts // 2, group_top_k=2),
        "gpt_oss": functools.partial(families.gpt_oss, limit=limit),
        "llama4": families.llama4,
    }[family]
    return make(HIDDEN, FFN, experts, 1 if family == "llama4" else 2)


def draw(world, preset, dtype, seed):
    """x, parameters by name, the cotangent: of all ranks, the same in every process; what is whole is per rank."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {}
    for name, shape in parameter_shapes(preset).items():
        value = normal(*shape) * (0.3 if len(shape) == 1 or name in ("bi", "bo") else shape[-2] ** -0.5)
        if name in OF_EXPERTS:
            value = value.reshape(world.num_ranks, LOCAL_EXPERTS, *shape[1:])
        else:
            value = np.broadcast_to(value, (world.num_ranks, *shape)).copy()
        params[name] = value if name.startswith("gate.") else value.astype(jnp.dtype(dtype))
    candidates = normal(world.num_ranks, 3 * TOKENS, HIDDEN).astype(jnp.dtype(dtype))
    logits = candidates.astype(np.float32) @ params["gate.kernel"][0] + params.get("gate.bias", [0.0])[0]
    decide = jax.jit(
        lambda logits: wep.routing.route(logits, preset.router, selection_bias=bias_of(params)).topk_idx
    )
    experts = preset.router.num_experts
    first = decide(logits.reshape(-1, experts))
    firm = np.ones(first.shape[0], bool)
    for _ in range(4):
        noise = rng.choice([-MARGIN, MARGIN], size=logits.shape).astype(np.float32)
        again = decide((logits + noise).reshape(-1, experts))
        firm &= (np.sort(again, axis=1) == np.sort(first, axis=1)).all(axis=1)
    firm = firm.reshape(world.num_ranks, -1)
    x = np.stack([rank[is_firm][:TOKENS] for rank, is_firm in zip(candidates, firm, strict=True)])
    return x, params, normal(*x.shape).astype(jnp.dtype(dtype))


def bias_of(params):
    bias = params.get("gate.selection_bias")
    return None if bias is None else jnp.asarray(bias[0])


def differentiable(params):
    return {name: value for name, value in params.items() if name != "gate.selection_bias"}


def step_of(world, preset, group, mode):
    """Output and gradients of the layer on every rank's shards."""
    settings = {"mode": mode, "quantize": None}
    layer = nnx.eval_shape(lambda: preset.make_layer(group, rngs=nnx.Rngs(0), **settings))
    graph, state = nnx.split(layer)
    variables = {".".join(path): leaf for path, leaf in nnx.to_flat_state(state)}

    def body(x, params, pull):
        def forward(x, trained):
            values = params | trained
            filled = [
                (tuple(name.split(".")), leaf.replace(values[name])) for name, leaf in variables.items()
            ]
            return nnx.merge(graph, nnx.from_flat_state(filled))(x)

        out, backward = jax.vjp(forward, x, differentiable(params))
        return out, *backward(pull)

    return world.on_ranks(body)


def dense_step(preset, x, params, pull):
    """The same in float32, by every expert on every token."""
    bias, experts = bias_of(params), preset.router.num_experts

    def of_rank(x, own, of_experts):
        logits = wep.routing.router_logits(x, own["gate.kernel"], preset.router, bias=own.get("gate.bias"))
        routing = wep.routing.route(logits, preset.router, selection_bias=bias)
        out = jnp.zeros_like(x)
        for idx, weights in zip(routing.topk_idx.T, routing.topk_weights.T, strict=True):
            rows = x * weights[:, None] if preset.weigh_input else x
            hidden = jnp.einsum("th,ehf->etf", rows, of_experts["wi"])
            hidden = activate(hidden + of_experts["bi"][:, None], preset.activation)
            y = jnp.einsum("etf,efh->eth", hidden, of_experts["wo"]) + of_experts["bo"][:, None]
            y = jnp.einsum("et,eth->th", jax.nn.one_hot(idx, experts).T, y)
            out += y if preset.weigh_input else y * weights[:, None]
        if preset.shared_ffn:
            shared = activate(x @ own["shared_wi"], preset.activation) @ own["shared_wo"]
            out += shared * (jax.nn.sigmoid(x @ own["shared_gate"]) if preset.shared_gate else 1)
        return out

    def forward(x, trained):
        own = {name: value for name, value in trained.items() if name not in OF_EXPERTS}
        of_experts = {
            name: value.reshape(experts, *value.shape[2:])
            for name, value in trained.items()
            if name in OF_EXPERTS
        }
        of_experts.setdefault("bi", jnp.zeros((experts, of_experts["wi"].shape[-1])))
        of_experts.setdefault("bo", jnp.zeros((experts, HIDDEN)))
        return jax.vmap(of_rank, in_axes=(0, 0, None))(x, own, of_experts)

    @jax.jit
    def step(x, trained, pull):
        out, backward = jax.vjp(forward, x, trained)
        return out, *backward(pull)

    wide = functools.partial(jax.tree.map, lambda array: jnp.asarray(array, jnp.float32))
    return step(wide(x), wide(differentiable(params)), wide(pull))


def check(world, family):
    for seed, (mode, dtype) in enumerate(CASES):
        preset = preset_of(family, LOCAL_EXPERTS * world.num_ranks, dtype)
        x, params, pull = draw(world, preset, dtype, seed)
        with (
            preset.make_group(world.mesh, backend=world.backend, chunk=CHUNK) as group,
            jax.default_matmul_precision("highest"),
        ):
            got = step_of(world, preset, group, mode)(*jax.tree.map(world.put, (x, params, pull)))
            want = dense_step(preset, x, params, pull)
            compare(world, got, want, TOLERANCE[dtype], f"{family}, {mode}, {jnp.dtype(dtype).name}")
            group.check()


def compare(world, got, want, tolerance, what):
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(got)]
    for name, mine, expected in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        expected = np.asarray(expected)
        largest = np.abs(expected).max()
        assert largest > 0, f"{what}, {name}: nothing to compare"
        for rank, array in world.local(mine).items():
            worst = np.abs(array.astype(np.float32).reshape(expected[rank].shape) - expected[rank]).max()
            assert worst <= tolerance * largest, (
                f"{what}: result{name} of rank {rank} differs by {worst / largest:.1e}"
            )


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4")


def main() -> None:
    world = World()
    for family in sys.argv[1:] or FAMILIES:
        began = time.monotonic()
        check(world, family)
        world.say(f"{family}: ok, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
