"""What a run knows about its experts' load: averages to place experts by, and records for JSON lines.

The numbers come from `MoEStats`, which the exchange counts anyway; nothing here makes another pass over tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_wideep._types import Array, Float32, Num
from jax_wideep.moe import MoEStats


def update_average(
    average: Float32[Array, "*layers experts"], tokens_per_expert: Num[Array, "*layers experts"], decay: float
) -> Float32[Array, "*layers experts"]:
    """One step of the exponential average of the load, `decay * average + (1 - decay) * tokens_per_expert`.

    It starts at zeros, so it is small at first, by the same factor for all experts: a placement does not depend on it.
    """
    return decay * average + (1 - decay) * tokens_per_expert.astype(jnp.float32)


def imbalance(loads: Any) -> Any:
    """The largest load as a multiple of the mean, over the last axis; 1 where nothing was counted."""
    loads = np.asarray(loads, np.float64)
    mean = loads.mean(axis=-1)
    return np.where(mean > 0, loads.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)


def layer_records(stats: MoEStats) -> list[dict[str, Any]]:
    """The load of each layer in one step, as `metrics.jsonl` keeps it and `jax_wideep.report` reads it.

    Args:
      stats: of the layers, each array with a leading axis of layers (of one layer: without it).

    Returns:
      One record a layer: `tokens_per_expert` [experts], `rows_per_rank` [ranks], and the numbers of selections that
      were `dropped` and, where further rounds served some, `spilled`.
    """
    # Field of MoEStats -> name in the record.
    fields = {
        "tokens_per_expert": "tokens_per_expert",
        "rows_per_rank": "rows_per_rank",
        "overflow": "dropped",
        "spilled": "spilled",
    }
    known = {fields[name]: value for name, value in stats._asdict().items() if name in fields}
    host = {name: np.asarray(value) for name, value in jax.device_get(known).items() if value is not None}
    if host["tokens_per_expert"].ndim == 1:
        host = {name: value[None] for name, value in host.items()}
    return [
        {name: value[layer].tolist() for name, value in host.items()}
        for layer in range(len(host["tokens_per_expert"]))
    ]
