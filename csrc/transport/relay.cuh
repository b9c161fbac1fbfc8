// RelayKernel: from the mirrors to the arenas of ranks that have no address here.
//
// It runs after the kernel that wrote the mirrors has ended, so it asks no flags: everything is
// there. Data goes first, then a fence, then the flags, which the receivers wait for:
//
//   control   `done` words and the abort word, which vouch for what earlier kernels of this rank
//   did tokens    a warp for each token: its entries and its row, fence, its flags. The counts
//   vouch for
//             nothing else and go without a fence.
//   outputs   a warp for each row of a rank without address: the row, fence, its flags
//   dots      words that carry their own epoch
//
// Offsets are the same in every arena, so the address at the target is the own arena's. `Net`:
//
//   void PutWarp(int rank, int64_t offset, const char* from, int64_t bytes)   all lanes; later
//   void Fence()                                       all lanes: puts before it come before later
//   void Put32(int rank, int64_t offset, uint32_t v)   one thread
//   void Put64(int rank, int64_t offset, uint64_t v)   one thread
#pragma once

#include "csrc/core/error_record.h"
#include "csrc/core/launch.cuh"
#include "csrc/core/ptx.h"
#include "csrc/transport/relay.h"

namespace wideep {

constexpr int kRelayWarps = 16;

template <typename Net>
struct RelayParams {
  RelayCall call;
  Net net;
  ArenaLayout layout;
  char* arena = nullptr;          // this rank's
  char* mirrors[kMaxRanks] = {};  // of ranks without an address; null: the rank has one
  int32_t rank = 0;
  int32_t num_ranks = 0;
};

template <typename Net>
class RelayBlock {
 public:
  __device__ explicit RelayBlock(const RelayParams<Net>& p)
      : p_(p),
        net_(p.net),
        low_(p.layout.low_latency),
        epoch_(p.call.ticket != nullptr ? *p.call.ticket : 0),
        masked_(reinterpret_cast<const wideep::Control*>(p.arena)->masked),
        lane_(threadIdx.x % 32),
        warp_(static_cast<int>(blockIdx.x * kRelayWarps + threadIdx.x / 32)),
        num_warps_(static_cast<int>(gridDim.x * kRelayWarps)),
        thread_(static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x)),
        num_threads_(static_cast<int>(gridDim.x * blockDim.x)) {}

  __device__ void Control() {
    const auto* control = reinterpret_cast<const wideep::Control*>(p_.arena);
    const uint32_t abort = ptx::ld_relaxed_sys_u32(&control->abort);
    for (int i = thread_; i < 5 * p_.num_ranks; i += num_threads_) {
      const int peer = i / 5;
      const int word = i % 5;
      if (!Reaches(peer)) continue;
      if (word < 4) {
        net_.Put32(peer, low_.Done(word, p_.num_ranks) + int64_t{p_.rank} * 4,
                   control->ll_received[word]);
      } else if (abort != 0) {
        net_.Put32(peer, static_cast<int64_t>(offsetof(wideep::Control, abort)), abort);
      }
    }
  }

  __device__ void Tokens() {
    const int local_experts = p_.call.num_experts / p_.num_ranks;
    const int64_t buffer = low_.Buffer(epoch_);
    const int words = local_experts + 1;
    for (int i = thread_; i < words * p_.num_ranks; i += num_threads_) {
      const int peer = i / words;
      const int word = i % words;
      if (!Reaches(peer)) continue;
      const int64_t offset =
          buffer + (word < local_experts
                        ? low_.expert_counts + (int64_t{word} * p_.num_ranks + p_.rank) * 8
                        : low_.token_counts + int64_t{p_.rank} * 8);
      const uint64_t count = *Mirror<uint64_t>(peer, offset);
      // Of a call that failed there may be none.
      if (CountWord::IsOf(count, epoch_)) net_.Put64(peer, offset, count);
    }
    const auto chunk = static_cast<int>(low_.chunk);
    for (int item = warp_; item < chunk * p_.num_ranks; item += num_warps_) {
      const int peer = item % p_.num_ranks;
      const int place = item / p_.num_ranks;
      if (!Reaches(peer)) continue;
      const uint64_t count =
          *Mirror<uint64_t>(peer, buffer + low_.token_counts + int64_t{p_.rank} * 8);
      if (!CountWord::IsOf(count, epoch_) ||
          static_cast<uint32_t>(place) >= CountWord::Count(count)) {
        continue;
      }
      const int64_t slot = p_.rank * low_.chunk + place;
      const int64_t entry_bytes = int64_t{kMaxPieces} * low_.entries_per_slot * 16;
      SendFrom(peer, buffer + low_.arrival_entries + slot * entry_bytes, entry_bytes);
      SendFrom(peer, buffer + low_.arrival_rows + slot * low_.row_stride, p_.call.row_bytes);
      __syncwarp();
      net_.Fence();
      if (lane_ < kMaxPieces) {
        const int64_t flag = buffer + low_.arrival_flags + (slot * kMaxPieces + lane_) * 8;
        const uint64_t word = *Mirror<uint64_t>(peer, flag);
        if (CountWord::IsOf(word, epoch_)) net_.Put64(peer, flag, word);
      }
      __syncwarp();
    }
  }

  __device__ void Outputs() {
    const int local_experts = p_.call.num_experts / p_.num_ranks;
    const int64_t buffer = low_.Buffer(epoch_);
    const auto rows_per_expert = static_cast<int32_t>(p_.num_ranks * low_.chunk);
    const auto selections = static_cast<int32_t>(p_.call.num_tokens * p_.call.top_k);
    for (int32_t i = warp_; i < local_experts * rows_per_expert; i += num_warps_) {
      if (i % rows_per_expert >= p_.call.counts[i / rows_per_expert]) continue;
      const int32_t source = p_.call.row_source[i];
      // Of another call, which combine reports.
      if (source < 0 || source >= p_.num_ranks * selections) continue;
      const int home = source / selections;
      if (!Reaches(home)) continue;
      const int64_t selection = source % selections;
      SendFrom(home, buffer + low_.home_rows + selection * low_.row_stride, p_.call.row_bytes);
      __syncwarp();
      net_.Fence();
      if (lane_ < kMaxPieces) {
        const int64_t flag = buffer + low_.home_flags + (selection * kMaxPieces + lane_) * 4;
        const uint32_t word = *Mirror<uint32_t>(home, flag);
        if (word == epoch_) net_.Put32(home, flag, word);
      }
      __syncwarp();
    }
  }

  __device__ void Dots() {
    const int64_t buffer = low_.Buffer(epoch_);
    const auto chunk = static_cast<int>(low_.chunk);
    for (int item = warp_; item < chunk * p_.num_ranks; item += num_warps_) {
      const int src = item % p_.num_ranks;
      const int place = item / p_.num_ranks;
      if (!Reaches(src)) continue;
      const uint64_t count =
          ptx::ld_relaxed_sys_u64(Own<uint64_t>(buffer + low_.token_counts + int64_t{src} * 8));
      if (!CountWord::IsOf(count, epoch_) ||
          static_cast<uint32_t>(place) >= CountWord::Count(count)) {
        continue;
      }
      const int64_t slot_piece = (src * low_.chunk + place) * kMaxPieces;
      // Acquire: the entries of the first piece.
      const uint64_t flag =
          ptx::ld_acquire_sys_u64(Own<uint64_t>(buffer + low_.arrival_flags + slot_piece * 8));
      const auto num_rows = CountWord::IsOf(flag, epoch_) ? CountWord::Count(flag) : 0;
      const auto* entries = Own<ArrivalEntry>(buffer + low_.arrival_entries +
                                              slot_piece * low_.entries_per_slot * 16);
      for (uint32_t i = lane_; i < num_rows * kMaxPieces; i += 32) {
        const int64_t selection = entries[i / kMaxPieces].selection;
        const int64_t dot = buffer + low_.home_dots + (selection * kMaxPieces + i % kMaxPieces) * 8;
        const uint64_t word = *Mirror<uint64_t>(src, dot);
        if (CountWord::IsOf(word, epoch_)) net_.Put64(src, dot, word);
      }
    }
  }

 private:
  /// Whether the relay is the way to a rank. What a masked one's mirror holds is old.
  __device__ bool Reaches(int peer) const {
    return p_.mirrors[peer] != nullptr && (masked_ >> peer & 1) == 0;
  }
  template <typename T>
  __device__ const T* Mirror(int peer, int64_t offset) const {
    return reinterpret_cast<const T*>(p_.mirrors[peer] + offset);
  }
  template <typename T>
  __device__ const T* Own(int64_t offset) const {
    return reinterpret_cast<const T*>(p_.arena + offset);
  }
  __device__ void SendFrom(int peer, int64_t offset, int64_t num_bytes) {
    net_.PutWarp(peer, offset, p_.mirrors[peer] + offset, num_bytes);
  }

  const RelayParams<Net>& p_;
  const Net& net_;
  const LowLatencyLayout& low_;
  const uint32_t epoch_;
  const uint32_t masked_;
  const int lane_;
  const int warp_;
  const int num_warps_;
  const int thread_;
  const int num_threads_;
};

template <typename Net>
__global__ void __launch_bounds__(32 * kRelayWarps)
    RelayKernel(const __grid_constant__ RelayParams<Net> p) {
  RelayBlock<Net> block(p);
  switch (p.call.what) {
    case Relayed::kControl:
      return block.Control();
    case Relayed::kTokens:
      return block.Tokens();
    case Relayed::kOutputs:
      return block.Outputs();
    case Relayed::kDots:
      return block.Dots();
  }
}

/// One kernel; `num_blocks` for what carries rows.
template <typename Net>
Status LaunchRelay(const RelayParams<Net>& p, int num_blocks, cudaStream_t stream) {
  const int blocks = p.call.what == Relayed::kControl ? 1 : num_blocks;
  return Launch(RelayKernel<Net>, blocks, 32 * kRelayWarps, 0, stream, p, "low-latency relay");
}

}  // namespace wideep
