"""How long an exchange between many nodes should take, and what memory it needs: arithmetic only.

Everything counts bytes per link and divides by the link's speed; the slowest link decides. `expected_*` give means
under uniform routing in closed form, `count_links` counts a drawing. docs/scaling.md states the assumptions.

Links of a rank: NVLink out and in, its NIC out and in. A token for another node crosses to the rank of the same
index there, so that every NIC speaks only to NICs of its own rail.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

HEADER_ENTRY_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds in bytes per second, times in seconds; where each comes from is in docs/scaling.md."""

    name: str
    nvlink: float
    nic: float
    hbm: float = 4232e9
    # Bytes read plus written by one SM that copies rows.
    per_sm: float = 66e9
    # Fixed time of a low-latency exchange, and of a throughput exchange beside its plan.
    fixed_ll: float = 30e-6
    fixed_two_hop: float = 40e-6
    # The plan: a kernel, then its counts across and inside nodes.
    plan_kernel: float = 25.5e-6
    rdma_latency: float = 5e-6


H800 = Machine("H800, CX7", nvlink=160e9, nic=46e9)
H200 = Machine("H200, CX7", nvlink=340e9, nic=46e9)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One layer's exchange. Sizes in tokens, bytes and ranks."""

    ranks: int
    tokens: int
    node_size: int = 8
    num_experts: int = 256
    top_k: int = 8
    hidden: int = 7168
    fp8_dispatch: bool = True
    # Experts of a token lie in at most this many of `num_groups` equal groups of experts.
    num_groups: int = 1
    top_groups: int = 1
    num_sms: int = 16

    def __post_init__(self) -> None:
        for name, parts in (("ranks", self.ranks), ("num_groups", self.num_groups)):
            if self.num_experts % parts:
                raise ValueError(
                    f"num_experts: expected a multiple of {name}={parts}, got {self.num_experts}"
                )
        if self.ranks % self.node_size:
            raise ValueError(f"ranks: expected a multiple of node_size={self.node_size}, got {self.ranks}")

    @property
    def nodes(self) -> int:
        return self.ranks // self.node_size

    @property
    def dispatch_row(self) -> int:
        """Bytes of a token's row on its way to the experts."""
        return self.hidden + self.hidden // 128 * 4 if self.fp8_dispatch else 2 * self.hidden

    @property
    def combine_row(self) -> int:
        return 2 * self.hidden


# ---- counts under uniform routing, in closed form ----


def expected_distinct(parts: int, num_experts: int, top_k: int) -> float:
    """Mean number of `parts` equal parts of the experts that hold some of `top_k` distinct experts."""
    per_part = num_experts // parts
    none_there = math.comb(num_experts - per_part, top_k) / math.comb(num_experts, top_k)
    return parts * (1 - none_there)


def expected_spread(e: Exchange, parts: int) -> float:
    """The same for an exchange whose tokens may be limited to some groups of experts.

    Groups are drawn uniformly, then experts uniformly among theirs. `parts` and groups nest.
    """
    if e.top_groups == e.num_groups:
        return expected_distinct(parts, e.num_experts, e.top_k)
    allowed = e.num_experts // e.num_groups * e.top_groups
    if parts >= e.num_groups:  # parts lie inside groups
        return expected_distinct(parts // e.num_groups * e.top_groups, allowed, e.top_k)
    groups_per_part = e.num_groups // parts
    per_group = e.num_experts // e.num_groups
    mean = 0.0
    for chosen in range(min(groups_per_part, e.top_groups) + 1):
        ways = math.comb(groups_per_part, chosen) * math.comb(
            e.num_groups - groups_per_part, e.top_groups - chosen
        )
        none_there = math.comb(allowed - chosen * per_group, e.top_k) / math.comb(allowed, e.top_k)
        mean += ways / math.comb(e.num_groups, e.top_groups) * (1 - none_there)
    return parts * mean


@dataclasses.dataclass(frozen=True)
class Links:
    """Rows over each rank's links, out and in, in the direction of dispatch; combine goes the other way.

    Either means (floats) or one number a rank (arrays [ranks]).
    """

    nvlink_out: float | np.ndarray
    nvlink_in: float | np.ndarray
    nic_out: float | np.ndarray
    nic_in: float | np.ndarray
    # Rows of expert order that a rank receives.
    rows: float | np.ndarray

    def slowest(self) -> dict[str, float]:
        return {field.name: float(np.max(getattr(self, field.name))) for field in dataclasses.fields(self)}


def expected_links(e: Exchange, *, two_hop: bool) -> Links:
    """Means under uniform routing."""
    nodes = expected_spread(e, e.nodes)
    ranks = expected_spread(e, e.ranks)
    away = 1 - 1 / e.nodes
    if two_hop:
        # A forwarder has 1 of node_size hosts to itself.
        nvlink = e.tokens * ranks * (1 - 1 / e.node_size)
        nic = e.tokens * nodes * away
    else:
        nvlink = e.tokens * ranks * (1 / e.nodes - 1 / e.ranks)
        nic = e.tokens * ranks * away
    return Links(nvlink, nvlink, nic, nic, e.tokens * e.top_k)


# ---- counts of a drawing ----


def count_links(e: Exchange, topk_idx_of_rank, *, two_hop: bool) -> Links:
    """Counts rows per link.

    Args:
      topk_idx_of_rank: rank -> [tokens, top_k] distinct experts; called once for each rank.
    """
    out = {
        name: np.zeros(e.ranks, np.int64) for name in ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "rows")
    }
    per_rank = e.num_experts // e.ranks
    for source in range(e.ranks):
        hosts = np.sort(topk_idx_of_rank(source) // per_rank, axis=1)
        out["rows"] += np.bincount(hosts.reshape(-1), minlength=e.ranks)
        first = np.ones(hosts.shape, bool)
        first[:, 1:] = hosts[:, 1:] != hosts[:, :-1]
        to_rank = np.bincount(hosts[first], minlength=e.ranks)
        node_of = hosts // e.node_size
        first[:, 1:] = node_of[:, 1:] != node_of[:, :-1]
        to_node = np.bincount(node_of[first], minlength=e.nodes)

        node, index = divmod(source, e.node_size)
        to_node[node] = 0
        own = slice(node * e.node_size, (node + 1) * e.node_size)
        if two_hop:
            forwarders = np.arange(e.nodes) * e.node_size + index
            out["nic_out"][source] += to_node.sum()
            out["nic_in"][forwarders] += to_node
            to_rank[forwarders] = 0  # a forwarder's own rows do not travel on
            out["nvlink_out"][forwarders] += to_rank.reshape(e.nodes, e.node_size).sum(axis=1)
            out["nvlink_in"] += to_rank
        else:
            to_rank[source] = 0
            inside = np.zeros(e.ranks, np.int64)
            inside[own] = to_rank[own]
            out["nvlink_out"][source] += inside.sum()
            out["nvlink_in"] += inside
            out["nic_out"][source] += (to_rank - inside).sum()
            out["nic_in"] += to_rank - inside
    return Links(**out)


def draw_topk_idx(rng: np.random.Generator, e: Exchange, zipf: float = 0.0) -> np.ndarray:
    """[tokens, top_k] distinct experts: uniform, or expert i drawn in proportion to (i + 1)^-zipf, without replacement.

    Groups, where tokens are limited, are those of the highest score, as in group-limited routing.
    """
    scores = rng.gumbel(size=(e.tokens, e.num_experts)).astype(np.float32)
    if zipf:
        # Hot experts anywhere: a placement is a permutation, the same for all ranks.
        order = np.random.default_rng(0).permutation(e.num_experts)
        scores -= np.float32(zipf) * np.log(1.0 + order.astype(np.float32))
    if e.top_groups < e.num_groups:
        best = scores.reshape(e.tokens, e.num_groups, -1).max(axis=2)
        kept = np.argpartition(-best, e.top_groups - 1, axis=1)[:, : e.top_groups]
        allowed = np.zeros(best.shape, bool)
        np.put_along_axis(allowed, kept, True, axis=1)
        scores[~np.repeat(allowed, e.num_experts // e.num_groups, axis=1)] = -np.inf
    return np.argpartition(-scores, e.top_k - 1, axis=1)[:, : e.top_k]


# ---- time ----


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one exchange, and what takes that long: "nvlink", "nic", "hbm" or "sms"."""

    seconds: float
    limit: str


def time_of(e: Exchange, machine: Machine, links: Links, *, two_hop: bool, row_bytes: int) -> Time:
    """Dispatch (or combine, which sends the same rows the other way): fixed time plus the slowest resource."""
    slowest = links.slowest()
    header = HEADER_ENTRY_BYTES * (1 + e.top_k)
    wire = row_bytes + header
    # Read once at the source; written and read once at a forwarder; written to every row in bf16.
    crossings = slowest["nic_in"] if two_hop else slowest["nic_in"] + slowest["nvlink_in"]
    touched = e.tokens * row_bytes + 2 * crossings * wire + slowest["rows"] * 2 * e.hidden
    seconds = {
        "nvlink": max(slowest["nvlink_out"], slowest["nvlink_in"]) * wire / machine.nvlink,
        "nic": max(slowest["nic_out"], slowest["nic_in"]) * wire / machine.nic,
        "hbm": touched / machine.hbm,
        "sms": touched / (e.num_sms * machine.per_sm),
    }
    limit = max(seconds, key=lambda name: seconds[name])
    fixed = machine.fixed_two_hop if two_hop else machine.fixed_ll
    return Time(fixed + seconds[limit], limit)


def plan_seconds(e: Exchange, machine: Machine) -> float:
    """Counts of all ranks to all: [experts] int32 each, across, then inside the node."""
    counts = e.num_experts * 4
    across = (e.nodes - 1) * counts / machine.nic
    inside = e.nodes * (e.node_size - 1) * counts / machine.nvlink
    return machine.plan_kernel + 2 * machine.rdma_latency + across + inside


def layer_seconds(
    e: Exchange, machine: Machine, *, two_hop: bool, links: Links | None = None, chunk: int = 128
) -> float:
    """Dispatch and combine of one layer. Low latency takes a call for every `chunk` tokens."""
    links = links or expected_links(e, two_hop=two_hop)
    dispatch = time_of(e, machine, links, two_hop=two_hop, row_bytes=e.dispatch_row)
    combine = time_of(e, machine, links, two_hop=two_hop, row_bytes=e.combine_row)
    if two_hop:
        return plan_seconds(e, machine) + dispatch.seconds + combine.seconds
    calls = -(-e.tokens // chunk)
    return dispatch.seconds + combine.seconds + (calls - 1) * 2 * machine.fixed_ll


def crossover_tokens(e: Exchange, machine: Machine, most: int = 1 << 16) -> int | None:
    """Fewest tokens a rank from which on the two-hop shape takes less time; None: above `most`."""

    def gain(tokens: int) -> float:
        at = dataclasses.replace(e, tokens=tokens)
        return layer_seconds(at, machine, two_hop=False) - layer_seconds(at, machine, two_hop=True)

    low, high = 0, most
    if gain(high) <= 0:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return high


# ---- memory of a rank ----


def aligned(num_bytes: int, to: int = 128) -> int:
    return -(-num_bytes // to) * to


def two_hop_arena_bytes(e: Exchange, *, channels: int = 8, across_slots: int = 8, node_slots: int = 0) -> int:
    """`Layout::num_bytes` of csrc/ep/two_hop_layout.h, for equal nodes: rings both ways, staging, counts."""
    slot = aligned(HEADER_ENTRY_BYTES * (1 + e.top_k)) + 2 * e.hidden
    across = e.nodes * channels
    total = 0
    for rings, slots, staged in (
        (across, across_slots, True),
        (across * e.node_size if node_slots else 0, node_slots, False),
    ):
        copies = 2 if staged else 1
        total += 2 * (
            copies * aligned(rings * slots * slot) + aligned(rings * slots * 8) + 3 * aligned(rings * 8)
        )
    return total + aligned(2 * e.ranks * aligned(e.num_experts * 4, 16)) + aligned(2 * e.ranks * 8)


def low_latency_bytes(e: Exchange, *, chunk: int = 128, pieces: int = 8) -> int:
    """The low-latency part of an arena, both buffers (LowLatencyLayout of csrc/core/layout.h, once per rank)."""
    row = aligned(2 * e.hidden)
    slots = e.ranks * chunk
    selections = chunk * e.top_k
    local_experts = e.num_experts // e.ranks
    parts = (
        e.ranks * local_experts * 8,
        e.ranks * 8,
        slots * pieces * 8,
        slots * pieces * e.top_k * 16,
        slots * row,
        selections * pieces * 4,
        selections * pieces * 8,
        selections * row,
    )
    return aligned(4 * e.ranks * 4) + 2 * sum(aligned(part) for part in parts)


def throughput_rows_bytes(e: Exchange, capacity_factor: float | None) -> int:
    """Dispatch's output in bf16: capacity_factor times the mean, or None: room for all rows of all ranks."""
    rows = e.ranks * e.tokens * e.top_k if capacity_factor is None else capacity_factor * e.tokens * e.top_k
    return int(rows) * 2 * e.hidden


def low_latency_rows_bytes(e: Exchange, *, chunk: int = 128) -> int:
    """ll_dispatch's output in bf16: [local experts, ranks * chunk, hidden]."""
    return e.num_experts // e.ranks * e.ranks * chunk * 2 * e.hidden
