"""What the benchmarks feed in: routing decisions and activations, drawn anew for every repeat."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jax_wideep._types import Float32, Int32

RoutingKind = Literal["uniform", "zipf", "hot"]


@dataclasses.dataclass(frozen=True)
class Routing:
    """A distribution over experts; a token's experts are drawn without replacement.

    Attributes:
      kind: "uniform"; "zipf", expert e with probability proportional to (e + 1)^-exponent, so that the low
        ranks host the hot experts; "hot", expert 0 in every token and the others uniform.
      exponent: of "zipf".
    """

    kind: RoutingKind = "uniform"
    exponent: float = 1.2

    def __str__(self) -> str:
        return f"zipf({self.exponent:g})" if self.kind == "zipf" else self.kind


def draw_topk_idx(
    rng: np.random.Generator, routing: Routing, tokens: int, num_experts: int, top_k: int
) -> Int32[np.ndarray, "tokens k"]:
    """Distinct experts for each token, the most wanted one first.

    Adding Gumbel noise to log-probabilities and taking the largest draws without replacement
    (arXiv:1903.06059).
    """
    preference = rng.gumbel(size=(tokens, num_experts)).astype(np.float32)
    if routing.kind == "zipf":
        preference -= np.float32(routing.exponent) * np.log(np.arange(1, num_experts + 1, dtype=np.float32))
    elif routing.kind == "hot":
        preference[:, 0] = np.inf
    return np.argsort(-preference, axis=1)[:, :top_k].astype(np.int32)


def draw_weights(rng: np.random.Generator, tokens: int, top_k: int) -> Float32[np.ndarray, "tokens k"]:
    """Gate weights that are positive and sum to 1 for each token."""
    weights = rng.random((tokens, top_k), dtype=np.float32) + np.float32(1e-3)
    return weights / weights.sum(axis=1, keepdims=True)


def rows_per_rank(topk_idx: np.ndarray, num_ranks: int, num_experts: int) -> np.ndarray:
    """[ranks] rows that each rank receives, from everybody's [ranks * tokens, k] selections."""
    return np.bincount(topk_idx.reshape(-1) // (num_experts // num_ranks), minlength=num_ranks)


def rows_per_pair(topk_idx: np.ndarray, num_ranks: int, num_experts: int) -> np.ndarray:
    """[source rank, destination rank] rows, from everybody's [ranks * tokens, k] selections."""
    by_source = topk_idx.reshape(num_ranks, -1)
    return np.stack([rows_per_rank(part, num_ranks, num_experts) for part in by_source])
