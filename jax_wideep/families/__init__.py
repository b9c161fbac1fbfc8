"""MoE layers of published model families: presets, and their weights.

preset = families.from_config(folder)                                   # or families.PUBLISHED["mixtral-8x7b"]
layer = preset.make_layer(group, rngs=nnx.Rngs(0))
families.load_layer(layer, families.Checkpoint(folder), preset, number=3)
families.save_layers(folder, {3: layer}, preset)
"""

from jax_wideep.families._safetensors import Checkpoint
from jax_wideep.families.loading import assign, load_layer, load_params
from jax_wideep.families.presets import (
    PUBLISHED,
    Preset,
    deepseek_v3,
    from_config,
    gpt_oss,
    llama4,
    mixtral,
    qwen2_moe,
    qwen3_moe,
)
from jax_wideep.families.saving import save_layers
from jax_wideep.families.trees import from_maxtext, from_transformer_engine

__all__ = [
    "PUBLISHED",
    "Checkpoint",
    "Preset",
    "assign",
    "deepseek_v3",
    "from_config",
    "from_maxtext",
    "from_transformer_engine",
    "gpt_oss",
    "llama4",
    "load_layer",
    "load_params",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "save_layers",
]
