"""Checkpoints of every family, written by the `safetensors` package from tensors that are listed here by hand."""

import numpy as np

from jax_wideep import families

HIDDEN, FFN, EXPERTS = 24, 10, 8
PRESETS = {
    "mixtral": families.mixtral(HIDDEN, FFN, EXPERTS),
    "qwen2_moe": families.qwen2_moe(HIDDEN, FFN, EXPERTS, 2, 14),
    "qwen3_moe": families.qwen3_moe(HIDDEN, FFN, EXPERTS, 2),
    "deepseek_v3": families.deepseek_v3(HIDDEN, FFN, EXPERTS, 2, num_groups=4, group_top_k=2, num_shared=3),
    "gpt_oss": families.gpt_oss(HIDDEN, FFN, EXPERTS, 2),
    "llama4": families.llama4(HIDDEN, FFN, EXPERTS),
}
PREFIXES = {
    "mixtral": "model.layers.{}.block_sparse_moe.",
    "gpt_oss": "model.layers.{}.mlp.",
    "llama4": "language_model.model.layers.{}.feed_forward.",
}


def draw_checkpoint(family, number=5, seed=0, dtype=np.float32):
    """Tensors by their names in the family's checkpoints, and what the layer's parameters then are.

    Values are integers that every dtype holds.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.integers(-128, 128, shape).astype(dtype)

    shared = {"qwen2_moe": 14, "deepseek_v3": 3 * FFN, "llama4": FFN}.get(family)
    router = "router" if family in ("gpt_oss", "llama4") else "gate"
    tensors = {f"{router}.weight": draw(EXPERTS, HIDDEN)}
    params = {"gate.kernel": tensors[f"{router}.weight"].T}
    if family == "deepseek_v3":
        tensors["gate.e_score_correction_bias"] = draw(EXPERTS).astype(np.float32)
        params["gate.selection_bias"] = tensors["gate.e_score_correction_bias"]
    gate, up, down = draw(EXPERTS, HIDDEN, FFN), draw(EXPERTS, HIDDEN, FFN), draw(EXPERTS, FFN, HIDDEN)
    params |= {"wi": np.concatenate([gate, up], axis=-1), "wo": down}
    if family == "llama4":
        tensors |= {"experts.gate_up_proj": params["wi"], "experts.down_proj": down}
    elif family == "gpt_oss":
        gate_bias, up_bias, down_bias = draw(EXPERTS, FFN), draw(EXPERTS, FFN), draw(EXPERTS, HIDDEN)
        tensors |= {
            "router.bias": draw(EXPERTS),
            "experts.gate_up_proj": np.stack([gate, up], axis=-1).reshape(EXPERTS, HIDDEN, 2 * FFN),
            "experts.gate_up_proj_bias": np.stack([gate_bias, up_bias], axis=-1).reshape(EXPERTS, 2 * FFN),
            "experts.down_proj": down,
            "experts.down_proj_bias": down_bias,
        }
        params |= {
            "gate.bias": tensors["router.bias"],
            "bi": np.concatenate([gate_bias, up_bias], axis=-1),
            "bo": down_bias,
        }
    else:
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e in range(EXPERTS):
            for name, stack in zip(names, (gate, up, down), strict=True):
                tensors[f"experts.{e}.{name}.weight"] = stack[e].T.copy()
    if shared:
        folder = "shared_experts" if family == "deepseek_v3" else "shared_expert"
        gate, up, down = draw(shared, HIDDEN), draw(shared, HIDDEN), draw(HIDDEN, shared)
        for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            tensors[f"{folder}.{name}.weight"] = matrix
        params |= {"shared_wi": np.concatenate([gate, up]).T, "shared_wo": down.T}
    if family == "qwen2_moe":
        tensors["shared_expert_gate.weight"] = draw(1, HIDDEN)
        params["shared_gate"] = tensors["shared_expert_gate.weight"].T
    prefix = PREFIXES.get(family, "model.layers.{}.mlp.").format(number)
    return {prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, params
