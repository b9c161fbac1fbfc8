"""One process of a job that makes a group, in the way that its argument says, and exchanges tokens over it.

meeting.py exchange              prints the backend, and "exchanged" if every token came back
meeting.py hidden=128 versions   settings of process 1, which differ from those of process 0
"""

from __future__ import annotations

import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from leaving import leave

import jax_wideep as wep
from jax_wideep import _bootstrap, launch


def main() -> None:
    wep.use_cpu_devices(int(os.environ.get("WIDEEP_DEVICES", 1)))
    if not launch.initialize():
        sys.exit("the processes were not found")
    settings = {"num_experts": 4 * jax.device_count(), "top_k": 2, "hidden": 256, "deadline_s": 60.0}
    if jax.process_index() == 1:
        for change in sys.argv[1:]:
            if change == "versions":
                other = _bootstrap.versions() | {"jax": "0.0.1"}
                _bootstrap.versions = lambda other=other: other
            elif change != "exchange":
                name, value = change.split("=")
                settings[name] = value if name == "backend" else int(value)
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            group = wep.ExpertGroup(mesh, **settings)
        except ValueError as error:
            print(f"refused: {error}")
            leave()
    print(f"backend {group.backend}; warned: {[str(w.message) for w in seen]}", flush=True)
    with group:
        exchange(group)
    print("exchanged", flush=True)


def exchange(group: wep.ExpertGroup) -> None:
    """Every token comes back as the sum of its weights times itself."""
    spec, rng = PartitionSpec("expert"), np.random.default_rng(0)
    tokens = 4 * group.num_ranks
    x = rng.normal(size=(tokens, group.hidden)).astype(np.float32)
    weights = rng.random((tokens, group.top_k)).astype(np.float32)
    noise = rng.random((tokens, group.num_experts))
    topk_idx = np.argsort(noise, axis=1)[:, : group.top_k].astype(np.int32)

    def body(x, weights, topk_idx):
        plan = wep.make_plan(topk_idx, group)
        rows, row_weights = wep.dispatch(x, weights, plan)
        out = wep.combine(rows, row_weights, plan)
        return jnp.max(jnp.abs(out - x * weights.sum(axis=1, keepdims=True)))[None]

    place = NamedSharding(group.mesh, spec)
    arrays = [
        jax.make_array_from_callback(a.shape, place, lambda at, a=a: a[at]) for a in (x, weights, topk_idx)
    ]
    error = jax.jit(jax.shard_map(body, mesh=group.mesh, in_specs=spec, out_specs=spec))(*arrays)
    for shard in error.addressable_shards:
        assert np.asarray(shard.data).max() < 1e-5


if __name__ == "__main__":
    main()
