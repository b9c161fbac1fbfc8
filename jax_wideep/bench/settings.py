"""Options that the benchmarks share, and what follows from them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, Literal

import jax
import numpy as np

from jax_wideep.bench import draws, measure
from jax_wideep.group import Backend

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclasses.dataclass(frozen=True)
class Output:
    """Where results go."""

    json: str = "-"
    """File for the JSON lines; "-" is stdout, "" is none."""
    plot: pathlib.Path | None = None
    """File for a plot (PNG)."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes of one program; see jax.distributed.initialize.

    Defaults: the environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
    """

    coordinator: str | None = dataclasses.field(
        default_factory=lambda: os.environ.get("JAX_COORDINATOR_ADDRESS")
    )
    """host:port of process 0."""
    num_processes: int | None = dataclasses.field(
        default_factory=lambda: _number_of_environment("JAX_NUM_PROCESSES")
    )
    """How many there are."""
    process_id: int | None = dataclasses.field(
        default_factory=lambda: _number_of_environment("JAX_PROCESS_ID")
    )
    """Which one this is."""


def _number_of_environment(name: str) -> int | None:
    text = os.environ.get(name)
    return None if text is None else int(text)


@dataclasses.dataclass(frozen=True)
class ExchangeSettings:
    """Sizes and routing of an exchange."""

    tokens: int = 1024
    """Tokens per rank."""
    hidden: int = 1024
    """Hidden size."""
    experts: int = 64
    """Experts over all ranks."""
    top_k: int = 8
    """Experts per token."""
    dtype: Dtype = "bfloat16"
    """Of the rows."""
    routing: draws.RoutingKind = "zipf"
    """How tokens choose experts."""
    zipf_exponent: float = 1.2
    """Of --routing zipf: expert e is drawn with probability proportional to (e + 1)^-exponent."""
    capacity: str = "fit"
    """Rows a rank can receive: "fit" is the largest load of this run's draws; "worst" is ranks * tokens * top_k,
    which can lose nothing; or a number."""
    backend: Backend = "auto"
    """Of the library."""
    devices: int | None = None
    """Ranks; default: 8 on CPU, otherwise all devices."""
    repeats: int = 10
    """Timed calls of each candidate; the candidates take turns."""
    baselines: bool = True
    """Whether to time XLA's own collectives as well."""
    seed: int = 0
    """Of all draws."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    output: Output = dataclasses.field(default_factory=Output)

    @property
    def routing_law(self) -> draws.Routing:
        return draws.Routing(self.routing, self.zipf_exponent)

    @property
    def row_bytes(self) -> int:
        return self.hidden * np.dtype(jax.numpy.dtype(self.dtype)).itemsize

    def record(self) -> dict[str, Any]:
        """The sizes, for a JSON line."""
        names = ("tokens", "hidden", "experts", "top_k", "dtype", "repeats", "seed")
        return {name: getattr(self, name) for name in names} | {"routing": str(self.routing_law)}


class Draws:
    """The inputs of every repeat: routing drawn beforehand, so that a capacity that fits is known; activations
    when asked for."""

    def __init__(self, settings: ExchangeSettings, mesh: jax.sharding.Mesh, *, warmup: int = 1):
        self._settings, self._mesh = settings, mesh
        self._rng = np.random.default_rng(settings.seed)
        self._drawn = 0
        self.num_ranks = mesh.size
        self.topk_idx = [
            draws.draw_topk_idx(
                self._rng,
                settings.routing_law,
                self.num_ranks * settings.tokens,
                settings.experts,
                settings.top_k,
            )
            for _ in range(settings.repeats + warmup)
        ]
        sizes = (self.num_ranks, settings.experts)
        pairs = [draws.rows_per_pair(idx, *sizes) for idx in self.topk_idx]
        self.largest_load = int(max(pair.sum(axis=0).max() for pair in pairs))
        self.largest_pair = int(max(pair.max() for pair in pairs))
        # Of the last draw; others differ little.
        self.rows = int(pairs[-1].sum())
        self.rows_that_cross = int(pairs[-1].sum() - np.trace(pairs[-1]))

    def capacity(self) -> int:
        """Rows per rank as `settings.capacity` says.

        Raises:
          ValueError: it is none of the forms, or smaller than this run's largest load.
        """
        wanted = self._settings.capacity
        if wanted == "worst":
            return self.num_ranks * self._settings.tokens * self._settings.top_k
        if wanted == "fit":
            return -(-self.largest_load // 256) * 256
        if not wanted.isdecimal() or int(wanted) < self.largest_load:
            raise ValueError(
                f"bench: capacity: expected 'fit', 'worst' or at least {self.largest_load} rows, the largest load of "
                f"this run's draws, got {wanted!r}"
            )
        return int(wanted)

    def activations(self, *shape: int) -> jax.Array:
        """Normal values in the rows' dtype, split over the ranks by their first axis; drawn where they lie."""
        self._drawn += 1
        key = jax.random.fold_in(jax.random.key(self._settings.seed), self._drawn)
        return measure.draw_normal(self._mesh, key, shape, self._settings.dtype)

    def tokens(self) -> jax.Array:
        """[ranks * tokens, hidden]."""
        return self.activations(self.num_ranks * self._settings.tokens, self._settings.hidden)

    def routed(self, repeat: int) -> tuple[jax.Array, jax.Array]:
        """topk_idx and topk_weights of a repeat, split over the ranks."""
        idx = self.topk_idx[repeat]
        weights = draws.draw_weights(self._rng, *idx.shape)
        return measure.put(self._mesh, idx), measure.put(self._mesh, weights)
