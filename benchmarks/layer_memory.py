"""Memory and time of MoE layers' training step: worst-case rows, bounded rows that drop or spill, chunks, remat.

    python benchmarks/layer_memory.py                                   # 8 CPU devices, one process for each variant
    python tests/gpu/launch.py 8 benchmarks/layer_memory.py --tokens 4096 --hidden 4096 ..       # 8 GPU ranks

Prints a table, and one JSON object per line to --json. A step is moe_ffn forward and backward, in several layers of
the same weights and routing; rows are counted as a multiple of tokens * top_k, the mean of a rank. `temporaries` are
what XLA sets aside for the step beside its arguments and results, on each rank (memory_analysis); on CPU also what it
would set aside if it ordered the step for memory, as compilers for GPUs do, and not for concurrency: what is to be
computed again is otherwise computed again as soon as it can be. `peak` is measured:
on CPU the growth of the process's largest resident size while the step runs, over all ranks; on GPU the allocator's
largest size (memory_stats), which only grows from one variant to the next in one process: there name one variant with
--only where it counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_wideep as wep
from jax_wideep.bench import draws, measure
from jax_wideep.bench.settings import Dtype, Processes
from jax_wideep.group import Backend
from jax_wideep.moe import inner_size

# name -> (rows as a multiple of the mean; None: the worst case, arguments of moe_ffn)
VARIANTS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "worst case": (None, {}),
    "worst case, remat hidden": (None, {"remat": "hidden"}),
    "worst case, remat all": (None, {"remat": "all"}),
    "worst case, chunks of the mean": (None, {"expert_chunk": 1.0}),
    "drop 1.5": (1.5, {"overflow": "drop"}),
    "spill 2": (2.0, {"overflow": "spill"}),
    "spill 1.5": (1.5, {"overflow": "spill"}),
    "spill 1.25": (1.25, {"overflow": "spill"}),
    "spill 1.5, remat hidden": (1.5, {"overflow": "spill", "remat": "hidden"}),
    "spill 1.5, remat all": (1.5, {"overflow": "spill", "remat": "all"}),
    "spill 1.5, chunks of 1/4": (1.5, {"overflow": "spill", "expert_chunk": 0.25}),
    "spill 0.5, remat all": (0.5, {"overflow": "spill", "remat": "all"}),
}

FOR_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and what to run.

    Attributes:
      layers: one after the other; the first layer's backward pass comes last.
      tokens: of each rank.
      hidden: hidden size.
      ffn: inner size of an expert (SwiGLU).
      experts: over all ranks.
      top_k: experts a token goes to.
      dtype: of everything.
      zipf_exponent: of the skewed routing.
      repeats: timed steps of each routing.
      backend: of the library.
      devices: ranks; none is 8 on CPU, otherwise all devices.
      only: this variant alone, in this process.
      json: file for JSON lines; "-" is stdout, "" is none.
    """

    layers: int = 4
    tokens: int = 256
    hidden: int = 512
    ffn: int = 256
    experts: int = 64
    top_k: int = 8
    dtype: Dtype = "float32"
    zipf_exponent: float = 1.2
    repeats: int = 5
    backend: Backend = "auto"
    devices: int | None = None
    only: str = ""
    json: str = ""
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure_variant(options: Options, mesh: jax.sharding.Mesh, name: str) -> dict[str, Any]:
    factor, settings = VARIANTS[name]
    mean = options.tokens * options.top_k
    if factor is not None:
        settings = settings | {"capacity": int(factor * mean)}
    if "expert_chunk" in settings:
        settings = settings | {"expert_chunk": int(settings["expert_chunk"] * mean)}
    dtype, rng = jnp.dtype(options.dtype), np.random.default_rng(0)
    inner = inner_size(options.ffn, "swiglu")

    def normal(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5
        return measure.put(mesh, values.astype(dtype))

    wi, wo = (
        normal(options.experts, options.hidden, inner),
        normal(options.experts, options.ffn, options.hidden),
    )
    x, dout = (normal(mesh.size * options.tokens, options.hidden) for _ in range(2))
    routings = {
        "uniform": draws.Routing("uniform", 0.0),
        "zipf": draws.Routing("zipf", options.zipf_exponent),
    }
    routed = {}
    for kind, law in routings.items():
        idx = draws.draw_topk_idx(rng, law, mesh.size * options.tokens, options.experts, options.top_k)
        weights = draws.draw_weights(rng, *idx.shape)
        routed[kind] = measure.put(mesh, idx), measure.put(mesh, weights)
    with measure.make_group(mesh, options) as group:

        def step(x, idx, weights, wi, wo, dout):
            def layers(x, weights, wi, wo):
                for _ in range(options.layers):
                    out, stats = wep.moe_ffn(x, idx, weights, wi, wo, group, **settings)
                    x = x + out
                return x, measure.stack((stats.spilled, stats.overflow, stats.rows_per_rank))

            out, backward, stats = jax.vjp(layers, x, weights, wi, wo, has_aux=True)
            return out, backward(dout), stats

        arguments = {kind: (x, *arrays, wi, wo, dout) for kind, arrays in routed.items()}
        lowered = measure.on_ranks(mesh, step).lower(*arguments["uniform"])
        compiled = lowered.compile()
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        ordered = lowered.compile(FOR_MEMORY) if on_cpu else compiled
        record: dict[str, Any] = {
            "variant": name,
            "ranks": mesh.size,
            "device": mesh.devices.flat[0].device_kind,
            **{
                field: getattr(options, field)
                for field in ("layers", "tokens", "hidden", "ffn", "experts", "top_k", "dtype")
            },
            "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
            "temporaries_for_memory_mb": ordered.memory_analysis().temp_size_in_bytes / 1e6,
        }
        resident = peak_resident_bytes()
        for kind, inputs in arguments.items():
            spilled, dropped, rows = jax.block_until_ready(compiled(*inputs))[2]
            shown = {"spilled": spilled, "dropped": dropped, "largest": rows}
            for field, array in shown.items():
                value = np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])
                record[f"{field}_{kind}"] = int(value.max() if field == "largest" else value.sum())
            times = measure.Times()
            for _ in range(options.repeats):
                began, cpu_began = time.perf_counter(), time.process_time()
                jax.block_until_ready(compiled(*inputs))
                times.wall.append(time.perf_counter() - began)
                times.cpu.append(time.process_time() - cpu_began)
            record |= {f"{key}_{kind}": value for key, value in times.record().items()}
        if on_cpu:
            record["peak_mb"] = (peak_resident_bytes() - resident) / 1e6
        else:
            record["peak_mb"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 1e6
    return record


def in_own_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--json", "-"]
    # Small blocks are given back to the system as large ones are, so that the resident size follows the step.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def show(records: list[dict[str, Any]]) -> None:
    mean = records[0]["tokens"] * records[0]["top_k"]
    print(
        "| | temporaries, MB a rank | ordered for memory | peak, MB | uniform, ms (CPU ms) | zipf | spilled |"
    )
    print("|---|---|---|---|---|---|---|")
    for record in records:
        shares = [record[f"spilled_{kind}"] / (mean * record["ranks"]) for kind in ("uniform", "zipf")]
        print(
            f"| {record['variant']} | {record['temporaries_mb']:,.0f} | "
            f"{record['temporaries_for_memory_mb']:,.0f} | {record['peak_mb']:,.0f} | "
            f"{record['median_ms_uniform']:.0f} ({record['cpu_ms_uniform']:.0f}) | "
            f"{record['median_ms_zipf']:.0f} ({record['cpu_ms_zipf']:.0f}) | {shares[0]:.0%} / {shares[1]:.0%} |",
            flush=True,
        )


def main(options: Options) -> None:
    names = [options.only] if options.only else list(VARIANTS)
    apart = not options.only and (options.processes.num_processes or 1) == 1
    if apart:
        records = [in_own_process(name) for name in names]
    else:
        measure.start_processes(**dataclasses.asdict(options.processes))
        mesh = measure.make_mesh(options.devices, options.backend)
        records = [measure_variant(options, mesh, name) for name in names]
    if not apart and jax.process_index() != 0:
        return
    if options.json != "-":
        show(records)
    if options.json:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        if options.json == "-":
            print(lines, end="")
        else:
            pathlib.Path(options.json).write_text(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
