"""Routers: which experts a token goes to, and with what gate weights.

Pure JAX on one rank's tokens; nothing here communicates except the two losses, when given mesh axes.

    logits = router_logits(x, kernel, config)                 # [tokens, experts], float32
    topk_idx, topk_weights, scores = route(logits, config)    # what make_plan and dispatch take
    aux = load_balance_loss(scores, topk_idx, config.num_experts, axis_name=("data", "expert"))

How published models are written with `RouterConfig`:

- Switch Transformer (arXiv:2101.03961): `top_k=1, renormalize=False, jitter=1e-2`.
- Mixtral (arXiv:2401.04088), Qwen3-MoE (arXiv:2505.09388): the defaults; see `RouterConfig.renormalize`.
- GPT-OSS (arXiv:2508.10925): `use_logit_bias=True`.
- Llama 4: `top_k=1, score="sigmoid", renormalize=False`; it weighs the experts' inputs, see `moe_ffn`.
- DeepSeek-V2 (arXiv:2405.04434):
  `renormalize=False, num_groups=8, group_top_k=3, group_score="max", scaling_factor=16.0`.
- DeepSeek-V3 (arXiv:2412.19437):
  `score="sigmoid", num_groups=8, group_top_k=4, use_selection_bias=True, scaling_factor=2.5`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray, Real

# Stands in for a log-score of -inf: its exponential is 0 too, but a row of nothing else is uniform, not NaN.
_LOG_ZERO = -1e30

# Smallest divisor of scores. The derivative squares its inverse, which must not overflow float32.
_MIN_TOTAL = 1e-15

AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Static settings of a router; hashable, so that it may be closed over or passed as a static argument.

    Attributes:
        num_experts: E, the number of experts over all ranks.
        top_k: K, the experts chosen for each token, 1 <= K <= E.
        score: What turns logits into scores: "softmax" over all experts, or "sigmoid" of each alone.
        renormalize: Divide the chosen experts' scores by their sum, so that a token's weights sum to
            `scaling_factor`. A softmax over the chosen logits only (Mixtral, GPT-OSS) is the same thing:
            the softmax over all experts divides both numerator and denominator of the ratio by the same
            sum, and choosing by score is choosing by logit. With `top_k=1` the weight is then constant and
            the router gets no gradient through it.
        num_groups: G; the experts are split into G runs of E / G consecutive experts each. 1 means no
            groups.
        group_top_k: Groups in which a token may find its experts, 1 <= group_top_k <= G: the best by
            `group_score` (arXiv:2405.04434 section 2.2.2, arXiv:2412.19437 section 2.1.2).
        group_score: What ranks the groups: the sum of a group's two best scores ("top2", DeepSeek-V3), or
            its best score ("max", DeepSeek-V2). The selection bias, where there is one, counts here too.
        use_logit_bias: Whether the router is an affine map, with a bias that is learned (GPT-OSS).
        use_selection_bias: Whether `route` takes a bias that is added to the scores for choosing only
            (arXiv:2408.15664).
        scaling_factor: Multiplies the weights, after renormalisation.
        jitter: eps; while training, `router_logits` multiplies its input by noise uniform in
            [1 - eps, 1 + eps] (arXiv:2101.03961 appendix C).

    Raises:
        ValueError: A setting is out of range or contradicts another; the message names it and what to
            change.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    group_top_k: int = 1
    group_score: Literal["top2", "max"] = "top2"
    use_logit_bias: bool = False
    use_selection_bias: bool = False
    scaling_factor: float = 1.0
    jitter: float = 0.0

    def __post_init__(self):
        for name in ("num_experts", "top_k", "num_groups", "group_top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"RouterConfig: {name} must be a positive int, got {value!r}; use 1 or more")
        for name, choices in (("score", ("softmax", "sigmoid")), ("group_score", ("top2", "max"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"RouterConfig: {name} must be one of {choices}, "
                    f"got {getattr(self, name)!r}; use one of them"
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"RouterConfig: top_k must be at most num_experts = {self.num_experts}, got {self.top_k}; "
                f"lower top_k or add experts"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"RouterConfig: num_groups must divide num_experts = {self.num_experts}, "
                f"got {self.num_groups}; use a divisor of num_experts, or 1 for no groups"
            )
        if self.group_top_k > self.num_groups:
            raise ValueError(
                f"RouterConfig: group_top_k must be at most num_groups = {self.num_groups}, "
                f"got {self.group_top_k}; lower group_top_k or raise num_groups"
            )
        if self.top_k > self.group_top_k * self.group_size:
            raise ValueError(
                f"RouterConfig: top_k must be at most group_top_k * (num_experts / num_groups) = "
                f"{self.group_top_k} * {self.group_size} experts a token may choose from, got {self.top_k}; "
                f"raise group_top_k or lower top_k"
            )
        if self.num_groups > 1 and self.group_score == "top2" and self.group_size < 2:
            raise ValueError(
                f'RouterConfig: group_score "top2" needs groups of at least 2 experts, got groups of 1 '
                f'({self.num_experts} experts in {self.num_groups} groups); use "max" or fewer groups'
            )
        if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise ValueError(
                f"RouterConfig: scaling_factor must be finite and positive, got {self.scaling_factor}; "
                f"use 1.0 for no scaling"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(
                f"RouterConfig: jitter must be in [0, 1), got {self.jitter}; use 0.0 for no noise"
            )

    @property
    def group_size(self) -> int:
        """Experts in a group."""
        return self.num_experts // self.num_groups


class Routing(NamedTuple):
    """What `route` decides; a pytree of arrays.

    Attributes:
        topk_idx: The chosen experts, best first, all different; -1 throughout for a masked token.
        topk_weights: Their gate weights; 0 for a masked token. Differentiable with respect to the logits.
        scores: Every expert's score, without selection bias; what `load_balance_loss` takes. A masked token's
            are those of logits 0.
    """

    topk_idx: Int32[Array, "tokens k"]
    topk_weights: Float32[Array, "tokens k"]
    scores: Float32[Array, "tokens experts"]


def router_logits(
    x: Float[Array, "tokens hidden"],
    kernel: Float[Array, "hidden experts"],
    config: RouterConfig,
    *,
    bias: Float[Array, " experts"] | None = None,
    jitter_rng: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float32[Array, "tokens experts"]:
    """Router logits `x @ kernel + bias`, accumulated and returned in float32, with input noise while training.

    Args:
        x: Tokens, any float dtype.
        kernel: The router's weights, any float dtype.
        config: Only `num_experts`, `use_logit_bias` and `jitter` are used.
        bias: Added to every token's logits, any float dtype. Required if and only if `config.use_logit_bias`.
        jitter_rng: Key of the noise (arXiv:2101.03961 appendix C); None, as in evaluation, gives none. The
            noise is drawn and applied in float32. Under `shard_map` fold the rank into the key, or every
            rank draws the same noise.
        precision: Of the product. The default matters for float32 operands only, which would otherwise be
            rounded to TF32 on a GPU: enough to change which expert wins.

    Raises:
        ValueError: The shapes of `x`, `kernel`, `bias` and `config.num_experts` disagree, or `bias` contradicts
            the config.
    """
    if x.ndim != 2 or not _is_float(x):
        raise ValueError(
            f"router_logits: x must be a float array [tokens, hidden], got {_describe(x)}; "
            f"flatten leading dimensions into tokens"
        )
    if kernel.shape != (x.shape[1], config.num_experts) or not _is_float(kernel):
        raise ValueError(
            f"router_logits: kernel must be a float array [hidden, num_experts] = "
            f"[{x.shape[1]}, {config.num_experts}], got {_describe(kernel)}; check its orientation"
        )
    _check_bias("router_logits", "bias", bias, config.num_experts, "use_logit_bias", config.use_logit_bias)
    if jitter_rng is not None and config.jitter > 0:
        noise = jax.random.uniform(
            jitter_rng, x.shape, jnp.float32, minval=1.0 - config.jitter, maxval=1.0 + config.jitter
        )
        x = x.astype(jnp.float32) * noise
    logits = jnp.matmul(x, kernel, precision=precision, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def route(
    logits: Float[Array, "tokens experts"],
    config: RouterConfig,
    *,
    selection_bias: Float[Array, " experts"] | None = None,
    token_mask: Bool[Array, " tokens"] | None = None,
) -> Routing:
    """Chooses each token's experts and their gate weights, in float32.

    Experts are chosen by score plus selection bias, among the groups kept; a tie, of experts or of groups,
    goes to the lower index. Weights come from the scores alone: neither the choice nor the bias carries a
    gradient.

    Numbers that are not finite never produce an index out of range, nor one twice. A logit of -inf is a
    score of 0. A NaN score is the last to be chosen, and a chosen one gives NaN weights, so that it is not
    hidden: with "softmax", one NaN or +inf logit, or nothing but -inf, makes all scores of a token NaN;
    with "sigmoid", a NaN logit makes only its own.

    Args:
        logits: Any float dtype.
        config: Static settings.
        selection_bias: Added to the scores for choosing only; see `update_selection_bias`. Finite, or -inf
            to take an expert out; at least `top_k` experts must be left, in the groups kept if there are
            groups. Required if and only if `config.use_selection_bias`.
        token_mask: False marks padding: index -1 and weight 0, whatever its logits, NaN included, and no
            gradient.

    Raises:
        ValueError: An argument's shape or dtype is wrong, or `selection_bias` contradicts the config.
    """
    if logits.ndim != 2 or logits.shape[1] != config.num_experts or not _is_float(logits):
        raise ValueError(
            f"route: logits must be a float array [tokens, num_experts] = [tokens, {config.num_experts}], "
            f"got {_describe(logits)}; flatten leading dimensions into tokens, or correct num_experts"
        )
    _check_bias(
        "route",
        "selection_bias",
        selection_bias,
        config.num_experts,
        "use_selection_bias",
        config.use_selection_bias,
    )
    _check_token_mask("route", token_mask, logits.shape[0])

    logits = logits.astype(jnp.float32)
    if token_mask is not None:
        # Before any arithmetic: a cotangent of 0 through the derivative at a NaN logit would still be NaN.
        logits = jnp.where(token_mask[:, None], logits, 0.0)
    scores = jax.nn.softmax(logits, axis=-1) if config.score == "softmax" else jax.nn.sigmoid(logits)

    topk_idx = _choose(scores, config, selection_bias)
    if config.renormalize:
        # A softmax of the chosen log-scores is the quotient by their sum, without 0 / 0 where all underflow.
        log_score = jax.nn.log_softmax if config.score == "softmax" else jax.nn.log_sigmoid
        chosen = jnp.take_along_axis(log_score(logits), topk_idx, axis=-1)
        topk_weights = jax.nn.softmax(jnp.maximum(chosen, _LOG_ZERO), axis=-1)
    else:
        topk_weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    topk_weights = topk_weights * config.scaling_factor

    if token_mask is not None:
        topk_idx = jnp.where(token_mask[:, None], topk_idx, -1)
        topk_weights = jnp.where(token_mask[:, None], topk_weights, 0.0)
    return Routing(topk_idx, topk_weights, scores)


def update_selection_bias(
    bias: Float[Array, " experts"],
    tokens_per_expert: Real[Array, " experts"],
    rate: float = 1e-3,
) -> Float[Array, " experts"]:
    """One step of load balancing without an auxiliary loss: `bias + rate * sign(mean load - load)`.

    Algorithm 1 of arXiv:2408.15664. Call it once per training step, outside the gradient.

    Args:
        bias: The selection bias; keep it in float32, since bfloat16 cannot hold steps of 1e-3 near 1.
        tokens_per_expert: Load of each expert over the whole batch, on all ranks
            (`plan.tokens_per_expert`): the bias must stay equal on all ranks.
        rate: Step size.

    Returns:
        The new bias, of the dtype of `bias`.

    Raises:
        ValueError: The two arrays are not of one shape [experts], or `bias` is not of a float dtype.
    """
    if bias.ndim != 1 or not _is_float(bias):
        raise ValueError(
            f"update_selection_bias: bias must be a float array [experts], got {_describe(bias)}; "
            f"it is one bias per expert"
        )
    if tokens_per_expert.shape != bias.shape:
        raise ValueError(
            f"update_selection_bias: tokens_per_expert must be [experts] = [{bias.shape[0]}] as bias is, "
            f"got {_describe(tokens_per_expert)}; count over all experts, not one rank's"
        )
    load = tokens_per_expert.astype(jnp.float32)
    return bias + (rate * jnp.sign(jnp.mean(load) - load)).astype(bias.dtype)


def load_balance_loss(
    scores: Float[Array, "tokens experts"],
    topk_idx: Int32[Array, "tokens k"],
    num_experts: int,
    *,
    axis_name: AxisName | None = None,
    token_mask: Bool[Array, " tokens"] | None = None,
) -> Float32[Array, ""]:
    """Auxiliary loss that pulls the experts' loads together: `E * sum_e f_e P_e`.

    Equations 4 to 6 of arXiv:2101.03961, generalised to top-k: f_e is the fraction of all selections that
    went to expert e (they sum to 1), P_e the mean over tokens of e's score divided by the token's sum of
    scores (which is 1 for a softmax; for sigmoid scores as in arXiv:2412.19437, equations 17 to 20). It is
    1 when both are uniform, whatever E and K, and E when one expert has it all. The coefficient is the
    caller's. The gradient flows through P alone.

    Tokens that `route` masked (all indices -1) are left out; no token at all gives 0.

    Args:
        scores: `Routing.scores`.
        topk_idx: `Routing.topk_idx`.
        num_experts: E.
        axis_name: Mesh axes, inside `shard_map`, over which to take the means: the loss is then that of all
            ranks' tokens taken together, equal on every rank, not the mean of their losses. Differentiating
            it inside `shard_map` needs `check_vma=True`; without, JAX multiplies the gradient by the number
            of ranks.
        token_mask: False leaves a token out; only needed where `topk_idx` does not say so already.

    Raises:
        ValueError: An argument's shape or dtype is wrong.
    """
    if scores.ndim != 2 or scores.shape[1] != num_experts or not _is_float(scores):
        raise ValueError(
            f"load_balance_loss: scores must be a float array [tokens, num_experts] = "
            f"[tokens, {num_experts}], got {_describe(scores)}; pass Routing.scores and its num_experts"
        )
    if (
        topk_idx.ndim != 2
        or topk_idx.shape[0] != scores.shape[0]
        or not jnp.issubdtype(topk_idx.dtype, jnp.integer)
    ):
        raise ValueError(
            f"load_balance_loss: topk_idx must be an integer array [tokens, k] = [{scores.shape[0]}, k], "
            f"got {_describe(topk_idx)}; pass the Routing.topk_idx that goes with scores"
        )
    _check_token_mask("load_balance_loss", token_mask, scores.shape[0])

    counted = jnp.any(topk_idx >= 0, axis=-1)
    if token_mask is not None:
        counted &= token_mask
    # Masked rows are replaced before the division, so that padding may hold anything (see route).
    scores = jnp.where(counted[:, None], scores.astype(jnp.float32), 1.0)
    share = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), _MIN_TOTAL)
    selected = (topk_idx[:, :, None] == jnp.arange(num_experts)) & counted[:, None, None]

    selections_per_expert = jnp.sum(selected, axis=(0, 1), dtype=jnp.float32)
    share_per_expert = jnp.sum(jnp.where(counted[:, None], share, 0.0), axis=0)
    num_tokens = jnp.sum(counted, dtype=jnp.float32)
    if axis_name is not None:
        selections_per_expert, share_per_expert, num_tokens = jax.lax.psum(
            (selections_per_expert, share_per_expert, num_tokens), axis_name
        )
    fraction = selections_per_expert / jnp.maximum(jnp.sum(selections_per_expert), 1.0)
    mean_share = share_per_expert / jnp.maximum(num_tokens, 1.0)
    return num_experts * jnp.sum(fraction * mean_share)


def z_loss(
    logits: Float[Array, "tokens experts"],
    *,
    axis_name: AxisName | None = None,
    token_mask: Bool[Array, " tokens"] | None = None,
) -> Float32[Array, ""]:
    """Router z-loss, which keeps logits small: the mean over tokens of `logsumexp(logits)²`.

    Equation 5 of arXiv:2202.08906. The coefficient (there 1e-3) is the caller's. No token at all gives 0.

    Args:
        logits: Any float dtype; computed in float32.
        axis_name: Mesh axes of the mean, as in `load_balance_loss`.
        token_mask: False leaves a token out, whatever its logits.

    Raises:
        ValueError: An argument's shape or dtype is wrong.
    """
    if logits.ndim != 2 or not _is_float(logits):
        raise ValueError(
            f"z_loss: logits must be a float array [tokens, experts], got {_describe(logits)}; "
            f"flatten leading dimensions into tokens"
        )
    _check_token_mask("z_loss", token_mask, logits.shape[0])

    logits = logits.astype(jnp.float32)
    counted = jnp.ones(logits.shape[0], bool) if token_mask is None else token_mask
    log_z = jax.nn.logsumexp(jnp.where(counted[:, None], logits, 0.0), axis=-1)
    total = jnp.sum(jnp.where(counted, jnp.square(log_z), 0.0))
    num_tokens = jnp.sum(counted, dtype=jnp.float32)
    if axis_name is not None:
        total, num_tokens = jax.lax.psum((total, num_tokens), axis_name)
    return total / jnp.maximum(num_tokens, 1.0)


def _choose(
    scores: Float32[Array, "tokens experts"],
    config: RouterConfig,
    selection_bias: Float[Array, " experts"] | None,
) -> Int32[Array, "tokens k"]:
    """The `top_k` experts of each token, best first; integers, so nothing here carries a gradient."""
    if selection_bias is not None:
        scores = scores + selection_bias.astype(jnp.float32)
    # NaN compares differently from backend to backend: rank it below everything before it is compared.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    if config.group_top_k < config.num_groups:
        grouped = scores.reshape(scores.shape[0], config.num_groups, config.group_size)
        if config.group_score == "top2":
            group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        else:
            group_scores = jnp.max(grouped, axis=-1)
        kept_idx = jax.lax.top_k(group_scores, config.group_top_k)[1]
        kept = jnp.any(kept_idx[:, :, None] == jnp.arange(config.num_groups), axis=1)
        scores = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, config.top_k)[1].astype(jnp.int32)


def _check_bias(
    op: str, name: str, bias: Float[Array, " experts"] | None, num_experts: int, setting: str, wanted: bool
) -> None:
    if wanted != (bias is not None):
        expected, got = ("an array", "None") if wanted else ("None", "an array")
        raise ValueError(
            f"{op}: {name} must be {expected} with {setting}={wanted}, got {got}; pass both or neither"
        )
    if bias is not None and (bias.shape != (num_experts,) or not _is_float(bias)):
        raise ValueError(
            f"{op}: {name} must be a float array [num_experts] = [{num_experts}], "
            f"got {_describe(bias)}; it is one bias per expert, shared by all tokens"
        )


def _check_token_mask(op: str, token_mask: Bool[Array, " tokens"] | None, num_tokens: int) -> None:
    if token_mask is not None and (token_mask.shape != (num_tokens,) or token_mask.dtype != jnp.bool_):
        raise ValueError(
            f"{op}: token_mask must be a bool array [tokens] = [{num_tokens}], got {_describe(token_mask)}; "
            f"True marks a real token"
        )


def _is_float(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _describe(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"
