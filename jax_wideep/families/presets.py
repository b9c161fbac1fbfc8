"""Presets: the settings with which `jax_wideep.flax.MoE` is the MoE layer of a published family of models.

preset = mixtral(hidden=4096, ffn=14336, num_experts=8, top_k=2)      # or PUBLISHED["mixtral-8x7b"]
preset = from_config("folder/config.json")                            # as Hugging Face writes it
with preset.make_group(mesh) as group:
    layer = preset.make_layer(group, rngs=nnx.Rngs(0))
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax

from jax_wideep._swiglu import ClampedSwiGLU
from jax_wideep.group import ExpertGroup
from jax_wideep.moe import Activation
from jax_wideep.routing import RouterConfig

Family = Literal["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A family, and its layer's settings at one size; hashable. `dataclasses.replace` changes settings.

    Attributes:
      family: decides the names and the layout of tensors in checkpoints.
      hidden: hidden size.
      ffn: inner size of an expert.
      router: how experts are chosen and weighted.
      activation: of the experts.
      shared_ffn: inner size of the shared expert; 0 for none.
      shared_gate: whether a learned score of the token gates the shared expert.
      use_bias: whether experts have biases.
      weigh_input: whether gate weights multiply the experts' inputs.
    """

    family: Family
    hidden: int
    ffn: int
    router: RouterConfig
    activation: Activation = "swiglu"
    shared_ffn: int = 0
    shared_gate: bool = False
    use_bias: bool = False
    weigh_input: bool = False

    def layer_settings(self) -> dict[str, Any]:
        """Arguments of `jax_wideep.flax.MoE` and `jax_wideep.flax.linen.MoE`."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del settings["family"]
        return settings | {"num_experts": self.router.num_experts, "top_k": self.router.top_k}

    def make_group(
        self, mesh: jax.sharding.Mesh, axis: str | tuple[str, ...] | None = None, **settings: Any
    ) -> ExpertGroup:
        """The ExpertGroup that such a layer needs.

        Args:
          mesh: mesh of the devices.
          axis: mesh axes that experts are spread over; None is all of them.
          **settings: further arguments of ExpertGroup.
        """
        return ExpertGroup(
            mesh,
            axis=tuple(mesh.axis_names) if axis is None else axis,
            num_experts=self.router.num_experts,
            top_k=self.router.top_k,
            hidden=self.hidden,
            **settings,
        )

    def make_layer(self, group: ExpertGroup, *, rngs: Any, **settings: Any) -> Any:
        """A `jax_wideep.flax.MoE` with these settings and those given, such as `dtype` and `param_dtype`."""
        flax = importlib.import_module("jax_wideep.flax")
        return flax.MoE(group=group, rngs=rngs, **(self.layer_settings() | settings))


def mixtral(hidden: int, ffn: int, num_experts: int = 8, top_k: int = 2) -> Preset:
    """Mixtral (arXiv:2401.04088): softmax over the chosen experts' logits, SwiGLU experts."""
    return Preset("mixtral", hidden, ffn, RouterConfig(num_experts, top_k))


def qwen2_moe(
    hidden: int, ffn: int, num_experts: int, top_k: int, shared_ffn: int, renormalize: bool = False
) -> Preset:
    """Qwen2-MoE (arXiv:2407.10671): softmax over all experts, and a shared expert with a gate of its own."""
    router = RouterConfig(num_experts, top_k, renormalize=renormalize)
    return Preset("qwen2_moe", hidden, ffn, router, shared_ffn=shared_ffn, shared_gate=True)


def qwen3_moe(hidden: int, ffn: int, num_experts: int, top_k: int, renormalize: bool = True) -> Preset:
    """Qwen3-MoE (arXiv:2505.09388): softmax over all experts, renormalised over the chosen, no shared expert."""
    return Preset("qwen3_moe", hidden, ffn, RouterConfig(num_experts, top_k, renormalize=renormalize))


def deepseek_v3(
    hidden: int,
    ffn: int,
    num_experts: int,
    top_k: int,
    *,
    num_groups: int,
    group_top_k: int,
    num_shared: int = 1,
    scaling_factor: float = 2.5,
    renormalize: bool = True,
) -> Preset:
    """DeepSeek-V3 and R1 (arXiv:2412.19437, equations 12 to 16): sigmoid scores, experts from the `group_top_k` best
    groups, a selection bias in place of an auxiliary loss, scaled weights, `num_shared` shared experts as one."""
    router = RouterConfig(
        num_experts,
        top_k,
        score="sigmoid",
        renormalize=renormalize,
        num_groups=num_groups,
        group_top_k=group_top_k,
        use_selection_bias=True,
        scaling_factor=scaling_factor,
    )
    return Preset("deepseek_v3", hidden, ffn, router, shared_ffn=num_shared * ffn)


def gpt_oss(
    hidden: int, ffn: int, num_experts: int, top_k: int = 4, *, alpha: float = 1.702, limit: float = 7.0
) -> Preset:
    """GPT-OSS (arXiv:2508.10925): a router with a bias, softmax over the chosen logits, experts with biases, and a
    clamped SwiGLU, see ClampedSwiGLU."""
    router = RouterConfig(num_experts, top_k, use_logit_bias=True)
    return Preset("gpt_oss", hidden, ffn, router, activation=ClampedSwiGLU(alpha, limit), use_bias=True)


def llama4(hidden: int, ffn: int, num_experts: int, top_k: int = 1) -> Preset:
    """Llama 4 (model cards of Scout and Maverick): the sigmoid of a chosen expert's logit multiplies the expert's
    input; a shared expert of the same size without weight."""
    router = RouterConfig(num_experts, top_k, score="sigmoid", renormalize=False)
    return Preset("llama4", hidden, ffn, router, shared_ffn=ffn, weigh_input=True)


#: Published models, sizes as in the config.json that comes with their weights.
PUBLISHED: Mapping[str, Preset] = {
    "mixtral-8x7b": mixtral(4096, 14336),
    "mixtral-8x22b": mixtral(6144, 16384),
    "qwen3-30b-a3b": qwen3_moe(2048, 768, 128, 8),
    "qwen3-235b-a22b": qwen3_moe(4096, 1536, 128, 8),
    "deepseek-v3": deepseek_v3(7168, 2048, 256, 8, num_groups=8, group_top_k=4),
    "gpt-oss-20b": gpt_oss(2880, 2880, 32),
    "gpt-oss-120b": gpt_oss(2880, 2880, 128),
    "llama4-scout": llama4(5120, 8192, 16),
    "llama4-maverick": llama4(5120, 8192, 128),
}


def from_config(config: Mapping[str, Any] | str | os.PathLike) -> Preset:
    """The preset of a model from its config.json, as Hugging Face's `transformers` writes it.

    Args:
      config: the file, the folder it lies in, or its contents.

    Raises:
      ValueError: the family is none of those known, a setting is missing, or one asks for what the family's preset
        does not do.
    """
    if isinstance(config, Mapping):
        read = config
    else:
        path = os.fspath(config)
        with open(
            os.path.join(path, "config.json") if os.path.isdir(path) else path, encoding="utf-8"
        ) as file:
            read = json.load(file)
    read = read.get("text_config", read)  # Llama 4 is published as the text part of a larger model
    family = str(read.get("model_type", "")).removesuffix("_text")
    if family not in _FROM_CONFIG:
        raise ValueError(
            f"from_config: model_type: expected one of {tuple(_FROM_CONFIG)}, got {read.get('model_type')!r}; build "
            "a Preset with a known family's layout"
        )
    # GPT-OSS says "silu" too and means its own activation.
    if read.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(
            f"from_config: hidden_act: expected 'silu', which {family} was published with, got "
            f"{read['hidden_act']!r}; replace the preset's activation"
        )
    return _FROM_CONFIG[family](_Settings(read))


class _Settings:
    """A config by name, under any of the names that a setting has had."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def __call__(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        if default is None:
            raise ValueError(
                f"from_config: {names[0]}: expected a value, got none; is this the config.json of a model?"
            )
        return default


def _deepseek_v3_from(get: _Settings) -> Preset:
    for name, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if get(name, default=known) != known:
            raise ValueError(
                f"from_config: {name}: expected {known!r} as DeepSeek-V3 has, got {get(name)!r}; replace the "
                "preset's router"
            )
    return deepseek_v3(
        get("hidden_size"),
        get("moe_intermediate_size"),
        get("n_routed_experts", "num_local_experts"),
        get("num_experts_per_tok"),
        num_groups=get("n_group"),
        group_top_k=get("topk_group"),
        num_shared=get("n_shared_experts"),
        scaling_factor=get("routed_scaling_factor"),
        renormalize=get("norm_topk_prob", default=True),
    )


_EXPERTS = ("num_experts", "num_local_experts")

_FROM_CONFIG = {
    "mixtral": lambda get: mixtral(
        get("hidden_size"), get("intermediate_size"), get("num_local_experts"), get("num_experts_per_tok")
    ),
    "qwen2_moe": lambda get: qwen2_moe(
        get("hidden_size"),
        get("moe_intermediate_size"),
        get(*_EXPERTS),
        get("num_experts_per_tok"),
        get("shared_expert_intermediate_size"),
        get("norm_topk_prob", default=False),
    ),
    "qwen3_moe": lambda get: qwen3_moe(
        get("hidden_size"),
        get("moe_intermediate_size"),
        get(*_EXPERTS),
        get("num_experts_per_tok"),
        get("norm_topk_prob", default=False),
    ),
    "deepseek_v3": _deepseek_v3_from,
    "gpt_oss": lambda get: gpt_oss(
        get("hidden_size"),
        get("intermediate_size"),
        get("num_local_experts"),
        get("num_experts_per_tok", "experts_per_token"),
        alpha=get("swiglu_alpha", default=1.702),
        limit=get("swiglu_limit", default=7.0),
    ),
    "llama4": lambda get: llama4(
        get("hidden_size"), get("intermediate_size"), get("num_local_experts"), get("num_experts_per_tok")
    ),
}
