"""Parameter trees of MaxText and Transformer Engine, built from a layer's own arrays, give the same layer again."""

import dataclasses

import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, FFN, HIDDEN, PRESETS, draw_checkpoint

from jax_wideep import families

NUM_LAYERS = 3


class Box:
    """What Flax wraps arrays in."""

    def __init__(self, value):
        self.value = value


def maxtext_tree(params, wrap=lambda array: array):
    """[..., gate | up] as two arrays, and so on; shapes as MaxText's sources declare them."""
    block = {
        "gate": {"kernel": wrap(params["gate.kernel"])},
        "wi_0": wrap(params["wi"][..., :FFN]),
        "wi_1": wrap(params["wi"][..., FFN:]),
        "wo": wrap(params["wo"]),
    }
    for bias in ("gate.bias", "gate.selection_bias"):
        if bias in params:
            block["gate"]["bias"] = wrap(params[bias])
    if "bi" in params:
        block |= {"wi_0_bias": wrap(params["bi"][:, :FFN]), "wi_1_bias": wrap(params["bi"][:, FFN:])}
        block["wo_bias"] = wrap(params["bo"])
    if "shared_wi" not in params:
        return block
    gate, up = np.split(params["shared_wi"], 2, axis=1)
    shared = {"wi_0": gate, "wi_1": up, "wo": params["shared_wo"]}
    return {
        "MoeBlock_0": block,
        "shared_experts": {name: {"kernel": wrap(array)} for name, array in shared.items()},
    }


def check(layer, want):
    for name, value in want.items():
        np.testing.assert_array_equal(layer.parameter(name)[...], value, name)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"])
@pytest.mark.parametrize("scan_axis", [None, 0, 1])
def test_maxtext(family, scan_axis, family_group):
    preset = PRESETS[family]
    layer = nnx.eval_shape(lambda: preset.make_layer(family_group(preset), rngs=nnx.Rngs(0)))
    stack = [draw_checkpoint(family, seed=seed)[1] for seed in range(NUM_LAYERS)]
    if scan_axis is None:
        families.assign(layer, families.from_maxtext(maxtext_tree(stack[2], Box), preset))
    else:
        trees = [maxtext_tree(params) for params in stack]

        def join(*leaves):
            if isinstance(leaves[0], dict):
                return {name: join(*(leaf[name] for leaf in leaves)) for name in leaves[0]}
            return np.stack(leaves, axis=scan_axis)

        tree = join(*trees)
        families.assign(layer, families.from_maxtext(tree, preset, number=2, scan_axis=scan_axis))
    check(layer, stack[2])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("fused", [True, False])
def test_transformer_engine(family, fused, family_group):
    preset = PRESETS[family]
    _, params = draw_checkpoint(family)
    tree = {"gate_kernel": params["gate.kernel"], "wo": params["wo"]}
    if fused:
        tree["wi"] = Box(params["wi"])
    else:
        tree |= {"wi_0": params["wi"][..., :FFN], "wi_1": params["wi"][..., FFN:]}
    layer = preset.make_layer(family_group(preset, backend="xla"), rngs=nnx.Rngs(0))
    families.assign(layer, families.from_transformer_engine(tree, preset))
    check(layer, params)


def test_transformer_engine_biases():
    """A router that chooses with a bias, and experts that have some; no family has both."""
    rng = np.random.default_rng(0)
    preset = families.deepseek_v3(HIDDEN, FFN, EXPERTS, 2, num_groups=4, group_top_k=2, num_shared=0)
    preset = dataclasses.replace(preset, use_bias=True)
    tree = {
        "gate_kernel": rng.normal(size=(HIDDEN, EXPERTS)),
        "expert_bias": rng.normal(size=EXPERTS),
        "wi": rng.normal(size=(EXPERTS, HIDDEN, 2 * FFN)),
        "wo": rng.normal(size=(EXPERTS, FFN, HIDDEN)),
        "wi_0_bias": rng.normal(size=(EXPERTS, FFN)),
        "wi_1_bias": rng.normal(size=(EXPERTS, FFN)),
        "wo_bias": rng.normal(size=(EXPERTS, HIDDEN)),
    }
    params = families.from_transformer_engine(tree, preset)
    np.testing.assert_array_equal(params["gate.selection_bias"], tree["expert_bias"])
    np.testing.assert_array_equal(
        params["bi"], jnp.concatenate([tree["wi_0_bias"], tree["wi_1_bias"]], axis=1)
    )
    np.testing.assert_array_equal(params["bo"], tree["wo_bias"])


def test_errors():
    preset = PRESETS["deepseek_v3"]
    _, params = draw_checkpoint("deepseek_v3")
    tree = maxtext_tree(params)
    del tree["MoeBlock_0"]["wi_1"]
    with pytest.raises(
        ValueError, match="from_maxtext: tree: expected an array at 'MoeBlock_0/wi_1', got none"
    ):
        families.from_maxtext(tree, preset)
    tree = maxtext_tree(params)
    tree["MoeBlock_0"]["wo"] = tree["MoeBlock_0"]["wo"][1:]
    with pytest.raises(ValueError, match=r"'MoeBlock_0/wo': expected shape \[8, 10, 24\], got \[7, 10, 24\]"):
        families.from_maxtext(tree, preset)
    with pytest.raises(ValueError, match=r"expected shape \[24, 'layers', 8\] with layer 1, got \(24, 8\)"):
        families.from_maxtext(maxtext_tree(params), preset, number=1)
    with pytest.raises(
        ValueError, match="from_transformer_engine: preset: expected a layer without 'shared_wi'"
    ):
        families.from_transformer_engine(
            {
                "gate_kernel": params["gate.kernel"],
                "expert_bias": params["gate.selection_bias"],
                "wi": params["wi"],
                "wo": params["wo"],
            },
            preset,
        )
