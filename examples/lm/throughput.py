"""Floating-point operations of a training step, and what devices can do at most."""

from __future__ import annotations

import jax

from jax_wideep.flax.transformer import TransformerConfig
from jax_wideep.moe import inner_size

# Dense bf16 operations a second with float32 accumulation, from NVIDIA's data sheets (without sparsity).
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def flops_per_token(config: TransformerConfig, seq: int) -> float:
    """Operations of a token's forward and backward pass, 6 N + 12 L H Q T (arXiv:2204.02311, appendix B).

    N counts the weights that multiply a token: of the experts those of its top-k, and no embedding table, from which
    rows are only taken. L layers, H heads of size Q, T tokens of a sequence; that attention is causal is not used.
    Recomputed activations, gate weights and norms are not counted either.
    """
    hidden = config.hidden
    expert = hidden * inner_size(config.ffn, config.activation) + config.ffn * hidden
    shared = 0
    if config.shared_ffn:
        shared = hidden * inner_size(config.shared_ffn, config.activation) + config.shared_ffn * hidden
    layer = 4 * hidden * hidden + hidden * config.num_experts + config.top_k * expert + shared
    weights = config.num_layers * layer + hidden * config.vocab
    return 6 * weights + 12 * config.num_layers * hidden * seq


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 operations a second of a device at most; None where it is not known."""
    matching = [name for name in _PEAK_FLOPS if device.device_kind.startswith(name)]
    return _PEAK_FLOPS[max(matching, key=len)] if matching else None
