"""Drop-in MoE layers: `MoE` for nnx; `linen.MoE` for linen. The only package here that needs Flax."""

from jax_wideep.flax import linen, placing
from jax_wideep.flax.nnx import MoE

__all__ = ["MoE", "linen", "placing"]
