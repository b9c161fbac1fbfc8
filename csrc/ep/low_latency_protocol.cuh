// What every low-latency kernel does around its own work. Nobody asks and nobody waits for another
// rank to be ready: a sender knows every address by a formula (LowLatencyLayout), and a receiver
// waits for the data only.
//
// Calls of a kind (dispatch with combine's gradient; combine) are numbered on each rank: the epoch.
// All ranks make the same calls in the same order, so their epochs agree. Every flag carries the
// epoch of its call, so nothing is cleared and a captured graph replays correctly.
//
//   dispatch  who writes: the source's warps. Counts first: each is one word with its epoch, it
//             says how much comes and vouches for nothing else. Then pieces of rows, each with a
//             flag of its own, so that a warp of the receiver waits for its own piece only.
//   combine   who writes: the expert's rank, each row to the slot of its selection at the token's
//             home, again with a flag for each piece. The home knows from topk_idx which selections
//             have a row.
//
// Memory order. A piece: stores of the warp's lanes, warp barrier, release of its flag at system
// scope by a lane; acquire of the flag by a lane there, warp barrier, loads.
//
// Two buffers for each kind are enough, whatever the order of the halves. Call e writes the buffer
// that call e - 2 used, so its sender first waits until every rank, itself too, has said `done`
// with e - 2. A rank says so at the start of its next low-latency kernel, when the one that read
// the buffer has ended (kernels of a rank run in order), whether or not it was sent anything:
// release by a thread of block 0, acquire by the sender. The wait cannot close a circle: on every
// rank the receive half of e - 2 comes before the send half of e (two calls under way at most),
// and the next kernel after it is that send half at the latest, which says `done` before it waits.
// In one stream of whole calls it is over at once: every peer's call e - 1, which this rank has
// received, began by saying so. Ops of the throughput shape and of the other kind use other memory
// and may come in between.
//
// Masked ranks (exchange_protocol.cuh): nothing is sent to them, nobody waits for them, and their
// counts are taken to be zero. What is received belongs to the mask that it was dispatched under:
// a combine or gradient under another mask waits in vain, or finds other rows.
//
// The epoch is counted up by the last block that comes to CountCall, at a place where its last warp
// has time: all threads of all blocks have read it by then.
#pragma once

#include "csrc/ep/exchange_protocol.cuh"
#include "csrc/ep/low_latency.h"

namespace wideep {

/// The part of a row's `num_units` units that is piece `piece`.
struct PieceRange {
  int begin;
  int end;
};
__device__ __forceinline__ PieceRange RangeOfPiece(int num_units, int piece, int pieces) {
  return {num_units * piece / pieces, num_units * (piece + 1) / pieces};
}

/// Block barriers of a call at which its threads agree whether to go on.
constexpr int kMaxMeetings = 6;

struct LowLatencyBase {
  char* arena[kMaxRanks];
  uint32_t failed[kMaxMeetings];  // 1: a thread gave up before that meeting
  uint32_t aborted;               // 1: a rank had given up when the call began
};

/// One thread's view of a low-latency call.
class LowLatencyCall {
 public:
  /// `ticket` null: the next call of the kind.
  __device__ LowLatencyCall(const PeerContext& peers, ExchangeOp op, LowLatencyKind kind,
                            LowLatencyPart part, uint32_t* ticket, LowLatencyBase& shared)
      : kind_(kind),
        part_(part),
        ticket_(ticket),
        shared_(shared),
        layout_(peers.layout.low_latency),
        epoch_(part == LowLatencyPart::kReceive
                   ? *ticket
                   : ptx::ld_relaxed_gpu_u32(&ControlOf(peers)->ll_sent[Index(kind)]) + 1),
        exchange_(peers, op, epoch_) {}

  __device__ Exchange& exchange() { return exchange_; }
  __device__ const LowLatencyLayout& layout() const { return layout_; }
  __device__ uint32_t epoch() const { return epoch_; }
  __device__ int rank() const { return exchange_.rank(); }
  __device__ int num_ranks() const { return exchange_.num_ranks(); }
  __device__ bool IsMasked(int rank) const { return exchange_.IsMasked(rank); }
  /// Whether this rank is not masked. Otherwise its calls are not numbered: a ticket is any number.
  __device__ bool TakesPart() const {
    if (exchange_.takes_part()) return true;
    if (sends() && ticket_ != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *ticket_ = 0;
    return false;
  }
  __device__ bool sends() const { return part_ != LowLatencyPart::kReceive; }
  __device__ bool receives() const { return part_ != LowLatencyPart::kSend; }

  /// This call's buffer of a rank's arena; after Begin.
  __device__ char* Buffer(int rank) const { return shared_.arena[rank] + layout_.Buffer(epoch_); }
  template <typename T>
  __device__ T* In(int rank, int64_t offset) const {
    return reinterpret_cast<T*>(Buffer(rank) + offset);
  }

  /// Begins: all threads of the block, which then Meet. Warps share the work, so that no load
  /// waits for another one.
  __device__ void Begin() {
    const int peer = threadIdx.x % 32;
    const bool is_rank = peer < num_ranks() && !IsMasked(peer);
    if (threadIdx.x / 32 == 0) {
      bool ok = true;
      if (is_rank) {
        shared_.arena[peer] = exchange_.arena(peer);
        if (sends()) ok = WaitUntilDone(peer);
      }
      ok = __all_sync(~0u, ok);
      if (peer < kMaxMeetings) shared_.failed[peer] = peer == 0 && !ok;
    } else if (threadIdx.x == 32) {
      // A rank gave up, now or in a call before: counters of this rank may be anywhere.
      shared_.aborted = exchange_.Aborted();
    } else if (threadIdx.x / 32 == 2 && blockIdx.x == 0 && is_rank) {
      SayDone(peer);
    }
  }

  /// Block barrier. False if a thread of the block gave up before it, or before an earlier one.
  __device__ bool Meet() {
    __syncthreads();
    if (shared_.failed[meeting_++] != 0 || shared_.aborted != 0) ok_ = false;
    return ok_;
  }
  /// Counts the call, once in each block, after a meeting. It takes the last warp a microsecond,
  /// which is the last one to find work; the others do not wait.
  __device__ void CountCall() {
    if (ok_ && threadIdx.x == blockDim.x - 1) CountBlock();
  }
  /// What every thread of the block knows since it last met.
  __device__ bool ok() const { return ok_; }
  /// Lets the block know at its next meeting.
  __device__ void GiveUp() { atomicOr(&shared_.failed[meeting_], 1u); }

 private:
  static __device__ Control* ControlOf(const PeerContext& peers) {
    return reinterpret_cast<Control*>(peers.arena + ArenaLayout::kControl);
  }
  static __device__ constexpr int Index(LowLatencyKind kind) { return static_cast<int>(kind); }

  __device__ void SayDone(int peer) {
    uint32_t received[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      received[i] = ptx::ld_relaxed_gpu_u32(&exchange_.control()->ll_received[i]);
    }
    char* const there = exchange_.arena(peer);
    // Release, once for all four: what the kernels of those calls read.
    ptx::fence_acq_rel_sys();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* done = reinterpret_cast<uint32_t*>(there + layout_.Done(i, num_ranks()));
      ptx::st_relaxed_sys_u32(&done[rank()], received[i]);
    }
  }

  __device__ bool WaitUntilDone(int peer) {
    const int64_t part = layout_.Done(LowLatencyLayout::KindAndBuffer(kind_, epoch_), num_ranks());
    const auto* done = reinterpret_cast<const uint32_t*>(exchange_.arena() + part);
    // Acquire: the peer has read what its buffer held.
    return exchange_.Wait(
        [&] {
          return static_cast<int32_t>(ptx::ld_acquire_sys_u32(&done[peer]) - (epoch_ - 2)) >= 0;
        },
        Phase::kDone, peer);
  }

  /// All threads of the block have read the epoch, and block 0 what it says to be done. Where a
  /// rank gave up, the group stays where it is: later calls end at once.
  __device__ void CountBlock() {
    Control* const control = exchange_.control();
    if (gridDim.x > 1) {
      uint32_t* const begun =
          &control->ll_blocks_begun[2 * Index(kind_) + (part_ == LowLatencyPart::kReceive)];
      // Acquire-release: every block's reads come before the last one's writes.
      if (ptx::atom_add_acq_rel_gpu_u32(begun, 1) != gridDim.x - 1) return;
      *begun = 0;
    }
    if (sends()) {
      control->ll_sent[Index(kind_)] = epoch_;
      if (ticket_ != nullptr) *ticket_ = epoch_;
    }
    if (receives()) {
      control->ll_received[LowLatencyLayout::KindAndBuffer(kind_, epoch_)] = epoch_;
    }
  }

  const LowLatencyKind kind_;
  const LowLatencyPart part_;
  uint32_t* const ticket_;
  LowLatencyBase& shared_;
  const LowLatencyLayout& layout_;
  const uint32_t epoch_;
  int meeting_ = 0;
  bool ok_ = true;
  Exchange exchange_;
};

/// Where the parts of a list begin: `begin` holds num_parts counts and gets their exclusive sums,
/// and the total at begin[num_parts]. One warp.
__device__ inline void SumCounts(int32_t* begin, int num_parts) {
  const int lane = threadIdx.x % 32;
  int32_t before = 0;
  for (int first = 0; first < num_parts; first += 32) {
    const int i = first + lane;
    const int32_t count = i < num_parts ? begin[i] : 0;
    int32_t sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (i < num_parts) begin[i] = before + sum - count;
    before += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) begin[num_parts] = before;
}

/// The part that holds `item`: begin[part] <= item < begin[part + 1].
__device__ inline int PartOf(const int32_t* begin, int num_parts, int32_t item) {
  int low = 0;
  int high = num_parts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begin[middle] <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// The first of this warp's items; neighbours go to different blocks.
__device__ __forceinline__ int32_t FirstItem() {
  return static_cast<int32_t>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
}

/// Calls visit(item) for this warp's share of `num_items`. Stops when it returns false.
template <typename Visit>
__device__ __forceinline__ void ForEachItem(int32_t num_items, Visit visit) {
  const int32_t num_warps = gridDim.x * kWarpsPerBlock;
  for (int32_t item = FirstItem(); item < num_items; item += num_warps) {
    if (!visit(item)) return;
  }
}

}  // namespace wideep
