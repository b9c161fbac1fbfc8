"""Small randomly initialised models of the `transformers` package, and their MoE blocks' outputs and gradients.

Nothing here knows how jax_wideep maps names: gradients are rearranged by the shapes that the modules declare.
"""

import functools

import numpy as np
import torch
import transformers

torch.set_num_threads(1)  # tests run side by side

HIDDEN, FFN = 64, 24
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 32,
}
NUMBER = 1  # the layer that is compared


def _mixtral():
    config = transformers.MixtralConfig(
        **COMMON, intermediate_size=FFN, num_local_experts=8, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def _qwen3_moe(renormalize=True):
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=FFN,
        num_experts=16,
        num_experts_per_tok=3,
        norm_topk_prob=renormalize,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=FFN,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _deepseek_v3():
    config = transformers.DeepseekV3Config(
        **COMMON,
        moe_intermediate_size=FFN,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        first_k_dense_replace=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _gpt_oss():
    # A low limit, so that it clamps.
    config = transformers.GptOssConfig(
        **COMMON, intermediate_size=FFN, num_local_experts=8, num_experts_per_tok=4, swiglu_limit=1.5
    )
    return transformers.GptOssForCausalLM(config)


def _llama4(top_k=1):
    config = transformers.Llama4TextConfig(
        **COMMON,
        intermediate_size=FFN,
        intermediate_size_mlp=FFN,
        num_local_experts=8,
        num_experts_per_tok=top_k,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


MODELS = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_moe, not renormalised": functools.partial(_qwen3_moe, renormalize=False),
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "llama4, top-2": functools.partial(_llama4, top_k=2),
}


@functools.cache
def model(name):
    """The model, with weights that give every part of it something to do."""
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for tensor_name, tensor in [*block_of(made).named_parameters(), *block_of(made).named_buffers()]:
            bias = tensor.ndim == 1 or tensor_name.endswith("_bias")
            scale = 0.3 if bias else tensor.shape[-1] ** -0.5 * (3 if "experts" in tensor_name else 2)
            tensor.copy_(torch.randn(tensor.shape) * scale)
    return made


def block_of(model):
    layer = model.model.layers[NUMBER]
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def run(name, x, pull):
    """The block's output, and the gradients of sum(output * pull): of x, and of all parameters by their names."""
    block = block_of(model(name))
    block.zero_grad()
    x = torch.tensor(x, requires_grad=True)
    out = block(x)
    out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
    (out * torch.tensor(pull)).sum().backward()
    gradients = {key: parameter.grad.numpy() for key, parameter in block.named_parameters()}
    return out.detach().numpy(), x.grad.numpy(), {key: np.array(value) for key, value in gradients.items()}


def chosen(name, x):
    """[tokens, experts]: the gate weight of every chosen expert, NaN elsewhere."""
    block = block_of(model(name))
    tokens = torch.tensor(x.reshape(-1, HIDDEN))
    with torch.no_grad():
        router = block.router if hasattr(block, "router") else block.gate
        outputs = router(tokens)
        if name.startswith("llama4"):
            scores = outputs[0].numpy()
            return np.where(scores > 0, scores, np.nan)
        logits, weights, indices = outputs
        found = torch.full_like(logits, torch.nan, dtype=weights.dtype)
        return found.scatter_(1, indices, weights).numpy()


def as_layer_has_them(name, arrays):
    """A module's arrays by its own names, as arrays of jax_wideep's layer by name."""
    family = name.split(",")[0]
    router = "router" if family in ("gpt_oss", "llama4") else "gate"
    found = {"gate.kernel": arrays[f"{router}.weight"].T}
    up, down = arrays["experts.gate_up_proj"], arrays["experts.down_proj"]
    if family == "gpt_oss":
        bias = arrays["experts.gate_up_proj_bias"]
        found["wi"] = np.concatenate([up[..., ::2], up[..., 1::2]], axis=-1)
        found["bi"] = np.concatenate([bias[..., ::2], bias[..., 1::2]], axis=-1)
        found |= {"wo": down, "bo": arrays["experts.down_proj_bias"], "gate.bias": arrays["router.bias"]}
    elif family == "llama4":
        found |= {"wi": up, "wo": down}
    else:
        found |= {"wi": up.swapaxes(1, 2), "wo": down.swapaxes(1, 2)}
    for shared in ("shared_expert", "shared_experts"):
        if f"{shared}.up_proj.weight" in arrays:
            halves = [arrays[f"{shared}.{half}_proj.weight"].T for half in ("gate", "up")]
            found["shared_wi"] = np.concatenate(halves, axis=1)
            found["shared_wo"] = arrays[f"{shared}.down_proj.weight"].T
    if "shared_expert_gate.weight" in arrays:
        found["shared_gate"] = arrays["shared_expert_gate.weight"].T
    return found
