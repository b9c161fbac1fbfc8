// Low-latency calls of ranks on virtual nodes: peers on other nodes are reached through mirrors and
// a relay (csrc/transport/relay.cuh) over a network that copies.
#pragma once

#include "csrc/ep/low_latency_relayed.h"
#include "csrc/transport/relay.cuh"
#include "tests/kernels/low_latency_cases.h"

namespace wideep {
namespace testing {

/// Puts are stores of the calling threads; only Fence orders them.
struct CopyNet {
  char* arenas[kMaxRanks];

  __device__ void PutWarp(int rank, int64_t offset, const char* from, int64_t num_bytes) const {
    for (int64_t at = threadIdx.x % 32 * 4; at < num_bytes; at += 32 * 4) {
      *reinterpret_cast<uint32_t*>(arenas[rank] + offset + at) =
          *reinterpret_cast<const uint32_t*>(from + at);
    }
  }
  __device__ void Fence() const { ptx::fence_acq_rel_sys(); }
  __device__ void Put32(int rank, int64_t offset, uint32_t v) const {
    ptx::st_relaxed_sys_u32(reinterpret_cast<uint32_t*>(arenas[rank] + offset), v);
  }
  __device__ void Put64(int rank, int64_t offset, uint64_t v) const {
    ptx::st_relaxed_sys_u64(reinterpret_cast<uint64_t*>(arenas[rank] + offset), v);
  }
};

class CopyRelay : public Relay {
 public:
  CopyRelay(const RelayParams<CopyNet>& params, uint32_t* tickets)
      : params_(params), tickets_(tickets) {}
  Status Launch(const RelayCall& call, cudaStream_t stream) override {
    RelayParams<CopyNet> p = params_;
    p.call = call;
    return LaunchRelay(p, 2, stream);
  }
  uint32_t* Ticket(LowLatencyKind kind) override { return tickets_ + static_cast<int>(kind); }

 private:
  const RelayParams<CopyNet> params_;
  uint32_t* const tickets_;
};

/// Makes `ranks` see each other only within nodes of `node_size`; a relay for each.
template <typename Machine>
std::vector<std::unique_ptr<Relay>> SplitIntoVirtualNodes(VirtualRanks<Machine>& ranks,
                                                          int node_size) {
  std::vector<std::unique_ptr<Relay>> relays;
  // Now: a first launch may wait for kernels that wait for this one.
  CHECK(LoadKernels<RelayParams<CopyNet>>({RelayKernel<CopyNet>}, "relay").ok());
  CopyNet net{};
  for (int rank = 0; rank < ranks.num_ranks(); ++rank) net.arenas[rank] = ranks.context(rank).arena;
  for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
    const PeerContext& context = ranks.context(rank);
    const ArenaLayout& layout = context.layout;
    RelayParams<CopyNet> params;
    params.net = net;
    params.layout = layout;
    params.arena = context.arena;
    params.rank = rank;
    params.num_ranks = ranks.num_ranks();
    PeerTable table;
    ranks.machine().CopyOut(&table, context.arena + layout.peer_table, sizeof(table));
    for (int peer = 0; peer < ranks.num_ranks(); ++peer) {
      if (peer / node_size == rank / node_size) continue;
      char* mirror = static_cast<char*>(ranks.machine().Allocate(rank, layout.num_bytes));
      ranks.machine().Fill(mirror, 0, layout.num_bytes);
      table.arena[peer] = params.mirrors[peer] = mirror;
    }
    ranks.machine().CopyIn(context.arena + layout.peer_table, &table, sizeof(table));
    auto* tickets = static_cast<uint32_t*>(ranks.machine().Allocate(rank, 8));
    ranks.machine().Fill(tickets, 0, 8);
    relays.push_back(std::make_unique<CopyRelay>(params, tickets));
  }
  return relays;
}

/// Every wire and gradients, then overlapped halves, on nodes of `node_size`; several calls each.
template <typename Machine>
void RunVirtualNodes(const GroupSettings& group, int node_size, uint64_t seed) {
  const check::Context context(Labelled("nodes of", node_size) + ", " +
                               Labelled("seed", static_cast<int64_t>(seed)));
  Random random(seed);
  VirtualRanks<Machine> ranks(group, seed);
  const auto relays = SplitIntoVirtualNodes(ranks, node_size);
  LowLatencyCase c;
  for (const auto& relay : relays) c.relays.push_back(relay.get());
  for (const DType dtype : kFloatDTypes) {
    for (int wire = 0; wire < 3; ++wire) {
      c.dtype = dtype;
      c.quantize = wire > 0;
      c.dequantize = wire == 1;
      c.routing = wire == 1 ? Routing::kUniform : Routing::kOneHotExpert;
      if (!RunLowLatencyCase(ranks, c, random)) return;
    }
  }
  if (!RunOverlappedHalves(ranks, c, 3, random)) return;
  if (!RunDispatchHalvesAlone(ranks, c, 3, random)) return;
  // A rank is left out, of which the mirrors still hold something, and taken back.
  for (const uint32_t masked : {2u, 0u}) {
    c.masked = masked;
    c.masked_run = masked == 0;
    if (!RunLowLatencyCase(ranks, c, random)) return;
  }
}

}  // namespace testing
}  // namespace wideep
