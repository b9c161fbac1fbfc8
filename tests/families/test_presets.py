"""Presets: what config.json gives, what is refused, what the published ones are."""

import json

import pytest

import jax_wideep as wep
from jax_wideep import families

# The settings of the MoE layers in the config.json of published models.
PUBLISHED_CONFIGS = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
        "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4, "swiglu_limit": 7.0,
    },
    "llama4-scout": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 8192,
            "intermediate_size_mlp": 16384, "num_local_experts": 16, "num_experts_per_tok": 1,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_models(name, tmp_path):
    config = PUBLISHED_CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert families.from_config(config) == families.PUBLISHED[name]
    assert families.from_config(tmp_path) == families.PUBLISHED[name]
    assert families.from_config(str(tmp_path / "config.json")) == families.PUBLISHED[name]


def test_routers():
    """What tells the families apart, said once more."""
    config = wep.RouterConfig
    assert families.PUBLISHED["mixtral-8x7b"].router == config(8, 2)
    assert families.PUBLISHED["llama4-maverick"].router == config(128, 1, score="sigmoid", renormalize=False)
    assert families.PUBLISHED["gpt-oss-120b"].router == config(128, 4, use_logit_bias=True)
    assert families.PUBLISHED["deepseek-v3"].router == config(
        256, 8, score="sigmoid", num_groups=8, group_top_k=4, use_selection_bias=True, scaling_factor=2.5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, r"model_type: expected one of \('mixtral', .*got 'bert'"),
        (
            {"hidden_act": "gelu"},
            "hidden_act: expected 'silu', which deepseek_v3 was published with, got 'gelu'",
        ),
        ({"n_group": None}, "n_group: expected a value, got none"),
        ({"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid' as DeepSeek-V3 has, got 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method: expected 'noaux_tc'"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        families.from_config(PUBLISHED_CONFIGS["deepseek-v3"] | change)


def test_an_abstract_layer_of_a_published_size_allocates_nothing(make_group):
    from flax import nnx

    preset = families.PUBLISHED["deepseek-v3"]
    group = make_group(8, num_experts=256, top_k=8, hidden=7168, backend="xla")
    layer = nnx.eval_shape(lambda: preset.make_layer(group, rngs=nnx.Rngs(0)))
    assert layer.wi.shape == (256, 7168, 4096) and layer.shared_wi.shape == (7168, 4096)
    assert layer.gate.selection_bias.shape == (256,)
