"""One of two processes of test_processes.py: loads a layer, saves it, and prints what it read and holds.

python load_and_save.py folder family process coordinator
"""

import json
import os
import sys

import jax
import numpy as np
from checkpoints import PRESETS

import jax_wideep as wep
from jax_wideep import families

folder, family, process, coordinator = sys.argv[1:]
wep.use_cpu_devices(2)
jax.distributed.initialize(coordinator, 2, int(process))

preset = PRESETS[family]
mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
with preset.make_group(mesh, backend="xla") as group:
    checkpoint = families.Checkpoint(f"{folder}/theirs")
    params = families.load_params(checkpoint, preset, group, 5, progress=False)
    mine = {shard.index[0].start: np.asarray(shard.data).sum() for shard in params["wo"].addressable_shards}
    prefix = "language_model.model.layers.{number}.feed_forward." if family == "llama4" else None
    families.save_layers(
        f"{folder}/ours", {5: params}, preset, prefix=prefix, max_file_bytes=9000, progress=False
    )
    written = sorted(os.listdir(f"{folder}/ours"))
sums = {str(start): float(total) for start, total in sorted(mine.items())}
print(json.dumps([checkpoint.bytes_read, sums, written]))
jax.distributed.shutdown()
