"""Expert-parallel communication for Mixture-of-Experts models in JAX."""

from jax_wideep.exchange import combine, dispatch
from jax_wideep.group import ExpertGroup, use_cpu_devices
from jax_wideep.low_latency import (
    Received,
    ll_combine,
    ll_combine_recv,
    ll_combine_send,
    ll_dispatch,
    ll_dispatch_recv,
    ll_dispatch_send,
)
from jax_wideep.plan import DispatchPlan, make_plan

__version__ = "0.1.0"
