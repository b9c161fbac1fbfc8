"""Expert-parallel communication for Mixture-of-Experts models in JAX."""

import importlib
from typing import Any

from jax_wideep import routing
from jax_wideep._microbatches import CHECKPOINT_NAMES
from jax_wideep._swiglu import ClampedSwiGLU
from jax_wideep.exchange import combine, dispatch
from jax_wideep.group import ExpertGroup, use_cpu_devices
from jax_wideep.grouped_matmul import grouped_matmul, grouped_matmul_weight_grad
from jax_wideep.low_latency import (
    Received,
    ll_combine,
    ll_combine_recv,
    ll_combine_send,
    ll_dispatch,
    ll_dispatch_recv,
    ll_dispatch_send,
)
from jax_wideep.moe import MoEStats, moe_ffn
from jax_wideep.placement import Placement, compute_placement, make_placement
from jax_wideep.plan import DispatchPlan, make_plan
from jax_wideep.replicas import move_experts, replica_weights, sum_replica_gradients
from jax_wideep.routing import RouterConfig

__all__ = [
    "CHECKPOINT_NAMES",
    "ClampedSwiGLU",
    "DispatchPlan",
    "ExpertGroup",
    "MoEStats",
    "Placement",
    "Received",
    "RouterConfig",
    "combine",
    "compute_placement",
    "dispatch",
    "grouped_matmul",
    "grouped_matmul_weight_grad",
    "ll_combine",
    "ll_combine_recv",
    "ll_combine_send",
    "ll_dispatch",
    "ll_dispatch_recv",
    "ll_dispatch_send",
    "make_placement",
    "make_plan",
    "moe_ffn",
    "move_experts",
    "replica_weights",
    "routing",
    "sum_replica_gradients",
    "use_cpu_devices",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`jax_wideep.flax` is imported on first use, so that Flax stays optional; `jax_wideep.families` likewise."""
    if name in ("families", "flax"):
        return importlib.import_module(f"jax_wideep.{name}")
    raise AttributeError(f"module 'jax_wideep' has no attribute {name!r}")
