// PlanKernel: from this rank's choice of experts to every row's final place, on all ranks at once.
//
//   1. Every block counts its share of the selections, per expert and per destination rank.
//   2. Barrier of the rank's blocks; block 0 writes the rank's counts into every peer's arena.
//   3. Every block reads all ranks' counts and computes where each (source, expert) block of rows
//      begins. If some rank's capacity is too small (which all ranks see alike), selections are
//      counted again without those that are dropped, and the accepted counts are exchanged too.
//   4. Every block walks its selections once more and writes each one's place: dest_rank and
//      dest_row here, row_source and arrival_rows in the outputs of the destination rank. If those
//      are not mapped, the places go through the rings (ring.cuh).
//
// Counts need no flag: each is one word with the epoch beside it (CountWord).
#pragma once

#include "csrc/ep/plan_block.cuh"
#include "csrc/ep/ring.cuh"

namespace wideep {

/// Every rank's counts in every rank's arena, written there by their owner.
class PeerCounts {
 public:
  __device__ PeerCounts(Exchange& exchange, int num_experts)
      : exchange_(exchange), num_experts_(num_experts) {}

  __device__ void Send(bool accepted, const int32_t* totals) {
    const int64_t words = int64_t{exchange_.num_ranks()} * num_experts_;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) {
      const int peer = static_cast<int>(i / num_experts_);
      const int expert = static_cast<int>(i % num_experts_);
      if (peer == exchange_.rank() || exchange_.IsMasked(peer)) continue;
      ptx::st_relaxed_sys_u64(
          exchange_.In<uint64_t>(peer, Place(accepted, exchange_.rank(), expert)),
          CountWord::Pack(exchange_.epoch(), totals[expert]));
    }
  }
  __device__ bool Await(bool, uint32_t*) const { return true; }
  __device__ uint64_t Look(bool accepted, int src, int expert) const {
    return ptx::ld_relaxed_sys_u64(
        reinterpret_cast<const uint64_t*>(exchange_.arena() + Place(accepted, src, expert)));
  }
  __device__ bool Wait(bool accepted, int src, int expert, uint64_t& word) {
    if (CountWord::IsOf(word, exchange_.epoch())) return true;
    return exchange_.Wait(
        [&] {
          word = Look(accepted, src, expert);
          return CountWord::IsOf(word, exchange_.epoch());
        },
        accepted ? Phase::kAccepted : Phase::kCounts, src);
  }

 private:
  /// In any rank's arena.
  __device__ int64_t Place(bool accepted, int src, int expert) const {
    const ArenaLayout& layout = exchange_.layout();
    return (accepted ? layout.accepted : layout.counts) +
           (int64_t{src} * num_experts_ + expert) * 8;
  }

  Exchange& exchange_;
  const int num_experts_;
};

/// The places of this rank's selections, through the rings: tokens that carry no row.
__device__ inline bool PlaceThroughRings(const PlanParams& p, Exchange& exchange,
                                         const PlanShared& shared) {
  const RingTokens tokens{p.num_tokens, p.top_k, p.dest_rank, p.dest_row, nullptr, 0, nullptr};
  const int lane = threadIdx.x % 32;
  return SendTokensThroughRings(
      exchange, tokens, shared.first_arrival, nullptr,
      [&](const RingHeader& header, const char*, int src, auto free_slot) {
        // Selections of one token for this rank arrive one after the other, in order of k.
        if (lane < header.num_rows) {
          const int32_t row = header.words()[lane];
          const int32_t k = header.words()[p.top_k + lane];
          const int64_t token = src * p.num_tokens + header.token;
          p.row_source[row] = static_cast<int32_t>(token * p.top_k + k);
          p.arrival_rows[header.arrival + lane] = row;
        }
        free_slot();
      });
}

__global__ void __launch_bounds__(kPlanThreads, 1)
    PlanKernel(const __grid_constant__ PlanParams p) {
  PlanShared& shared = *reinterpret_cast<PlanShared*>(DynamicShared());
  Exchange exchange(p.peers, ExchangeOp::kPlan);
  if (!exchange.takes_part()) return WriteEmptyPlan(p, exchange.num_ranks());
  const void* mine[2] = {p.row_source, p.arrival_rows};
  bool all_mapped;
  if (!exchange.Begin(mine, shared.here, shared.flags, all_mapped)) return;
  PeerCounts counts(exchange, p.num_experts);
  PlanBlock block(p, exchange, counts, shared);
  if (!block.PlaceBlocks()) return;
  block.PlaceSelections(/*reached=*/all_mapped ? ~0u : 0u);
  block.WriteSummary();
  if (!all_mapped) {
    // The tokens of a channel were placed by any of this rank's blocks.
    if (!exchange.BlockBarrier(shared.flags)) return;
    if (!PlaceThroughRings(p, exchange, shared)) return;
  }
  exchange.Finish(shared.flags);
}

}  // namespace wideep
