// What the plan kernels on one node and over nodes share: a block's part of counting selections,
// filling capacities and placing rows.
//
// Blocks take contiguous parts of a rank's selections, and warps contiguous pieces of those, so
// that the order of warps is the order of selections.
//
// Selections of a masked rank's experts count in tokens_per_expert, and are dropped: they never get
// a destination, and the rank that made them counts them in its overflow.
#pragma once

#include <algorithm>

#include "csrc/core/launch.cuh"
#include "csrc/ep/exchange_protocol.cuh"
#include "csrc/ep/plan.h"

namespace wideep {

constexpr int kPlanThreads = 32 * kWarpsPerBlock;

/// Shared memory of a plan kernel. `bins` are the experts, then the destination ranks.
struct PlanShared {
  char* here[2 * kMaxRanks];
  uint32_t flags[kProtocolFlags];
  uint32_t capacity_is_short;
  int32_t rank_rows[kMaxRanks * kMaxRanks];  // [src][dst] selections
  int32_t first_arrival[kMaxRanks];          // of this rank's selections, at each destination
  int32_t allowance[kMaxRanks];              // how many of them fit
  int32_t num_rows[kMaxRanks];               // of each destination
  int32_t dst_running[kWarpsPerBlock][kMaxRanks];

  // Followed by int32_t arrays:
  //   warp_counts [warps][bins]: a warp's counts; later, what comes before it inside the block
  //   block_before [bins]: what comes before this block on this rank
  //   base [experts]: first row of this rank's block of that expert
  //   size [experts]: rows of the expert, from all ranks
  __device__ int32_t* warp_counts() { return reinterpret_cast<int32_t*>(this + 1); }
  __device__ int32_t* block_before(int bins) { return warp_counts() + kWarpsPerBlock * bins; }
  __device__ int32_t* base(int bins) { return block_before(bins) + bins; }
  __device__ int32_t* size(int bins, int experts) { return base(bins) + experts; }

  static constexpr int64_t NumBytes(int experts, int ranks) {
    return static_cast<int64_t>(sizeof(PlanShared)) +
           4 * ((kWarpsPerBlock + 1) * int64_t{experts + ranks} + 2 * int64_t{experts});
  }
};

/// `Counts` takes the ranks' counts to each other. `accepted`: those of the second exchange.
///
///   void Send(bool accepted, const int32_t* totals)    all threads of block 0: this rank's
///   bool Await(bool accepted, uint32_t* flags)         all threads of a block, before any Look
///   uint64_t Look(bool accepted, int src, int expert)  a CountWord of any epoch; of this rank and
///                                                      of masked ones anything
///   bool Wait(bool accepted, int src, int expert, uint64_t& word)   until the word is of this plan
/// Await and Wait return false if a rank gave up.
template <typename Counts>
class PlanBlock {
 public:
  __device__ PlanBlock(const PlanParams& p, Exchange& exchange, Counts& counts, PlanShared& shared)
      : p_(p),
        exchange_(exchange),
        counts_(counts),
        shared_(shared),
        bins_(p.num_experts + exchange.num_ranks()),
        local_experts_(p.num_experts / exchange.num_ranks()),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        num_selections_(p.num_tokens * p.top_k) {
    const int64_t warps = int64_t{gridDim.x} * kWarpsPerBlock;
    steps_ = static_cast<int>((num_selections_ + 32 * warps - 1) / (32 * warps));
    begin_ = (int64_t{blockIdx.x} * kWarpsPerBlock + warp_) * steps_ * 32;
    warp_counts_ = shared.warp_counts() + warp_ * bins_;
  }

  /// Fills base, size, first_arrival, allowance and num_rows of the shared memory. All threads of
  /// all blocks; false if a rank gave up.
  __device__ bool PlaceBlocks() {
    CountSelections(/*recount=*/false);
    SumWarps(0, bins_, 0);
    if (!exchange_.BlockBarrier(shared_.flags)) return false;
    SumBlocks(0, bins_, 0);
    if (blockIdx.x == 0) counts_.Send(/*accepted=*/false, shared_.size(bins_, p_.num_experts));
    if (!ReadCounts(/*accepted=*/false)) return false;
    CheckCapacity();
    if (shared_.capacity_is_short) {
      if (p_.overflow_is_error && blockIdx.x == 0) ReportOverflow();
      CountSelections(/*recount=*/true);
      SumWarps(0, p_.num_experts, 1);
      if (!exchange_.BlockBarrier(shared_.flags)) return false;
      SumBlocks(0, p_.num_experts, 1);
      if (blockIdx.x == 0) counts_.Send(/*accepted=*/true, shared_.size(bins_, p_.num_experts));
      if (!ReadCounts(/*accepted=*/true)) return false;
    }
    FirstRows();
    return true;
  }

  /// dest_rank and dest_row of the block's selections; row_source and arrival_rows too, at those
  /// destinations that have their bit in `reached`.
  __device__ void PlaceSelections(uint32_t reached) {
    int32_t* const base = shared_.base(bins_);
    ForEachSelection([&](int64_t s, int32_t expert, int32_t dst, int32_t place_in_dst) {
      const bool kept = expert >= 0 && place_in_dst < shared_.allowance[dst];
      const uint32_t same = __match_any_sync(~0u, kept ? expert : -1);
      if (kept) {
        const int32_t row = base[expert] + warp_counts_[expert] + CountBelow(same);
        p_.dest_rank[s] = dst;
        p_.dest_row[s] = row;
        if (reached >> dst & 1) {
          const int64_t source = exchange_.rank() * num_selections_ + s;
          RowSource(dst)[row] = static_cast<int32_t>(source);
          ArrivalRows(dst)[shared_.first_arrival[dst] + place_in_dst] = row;
        }
      } else if (s < num_selections_) {
        p_.dest_rank[s] = -1;
        p_.dest_row[s] = -1;
      }
      __syncwarp();
      if (kept && CountBelow(same) == 0) warp_counts_[expert] += __popc(same);
      __syncwarp();
    });
  }

  /// What belongs to this rank as a receiver.
  __device__ void WriteSummary() {
    const int rank = exchange_.rank();
    const int32_t num_rows = shared_.num_rows[rank];
    for (int64_t i = num_rows + GlobalThread(); i < p_.capacity; i += NumThreads()) {
      p_.row_source[i] = -1;
      p_.arrival_rows[i] = -1;
    }
    if (blockIdx.x != 0) return;
    const int32_t* size = shared_.size(bins_, p_.num_experts);
    for (int e = threadIdx.x; e < local_experts_; e += blockDim.x) {
      p_.group_sizes[e] = size[rank * local_experts_ + e];
    }
    if (threadIdx.x == 0) {
      *p_.num_rows = num_rows;
      int32_t wanted = 0;
      for (int src = 0; src < exchange_.num_ranks(); ++src) {
        const int32_t sent = shared_.rank_rows[src * kMaxRanks + rank];
        p_.rows_per_source[src] = max(0, min(sent, static_cast<int32_t>(p_.capacity) - wanted));
        wanted += sent;
      }
      int32_t masked = 0;
      for (int dst = 0; dst < exchange_.num_ranks(); ++dst) {
        if (exchange_.IsMasked(dst)) masked += shared_.rank_rows[rank * kMaxRanks + dst];
      }
      *p_.overflow = wanted - num_rows + masked;
    }
  }

  /// Where a block's selections begin; for gridDim.x, where all end.
  __device__ int64_t FirstSelection(int block) const {
    return min(num_selections_, int64_t{block} * kWarpsPerBlock * steps_ * 32);
  }
  /// This rank's selections for `dst` before that block's, dropped ones included. After
  /// PlaceBlocks.
  __device__ int32_t CountBefore(int block, int dst) const {
    int32_t before = 0;
    for (int b = 0; b < block; ++b) before += BlockCounts(0, b)[p_.num_experts + dst];
    return before;
  }

 private:
  __device__ int64_t GlobalThread() const { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
  __device__ int64_t NumThreads() const { return int64_t{gridDim.x} * blockDim.x; }
  __device__ int32_t* RowSource(int rank) const {
    return reinterpret_cast<int32_t*>(shared_.here[rank]);
  }
  __device__ int32_t* ArrivalRows(int rank) const {
    return reinterpret_cast<int32_t*>(shared_.here[kMaxRanks + rank]);
  }
  __device__ int32_t* BlockCounts(int round, int block) const {
    return reinterpret_cast<int32_t*>(exchange_.arena() + exchange_.layout().block_counts) +
           (int64_t{round} * exchange_.layout().num_blocks + block) * bins_;
  }
  /// Lanes of `lanes` below this one.
  __device__ int CountBelow(uint32_t lanes) const { return __popc(lanes & ((1u << lane_) - 1)); }

  /// The warp's selections in order, 32 at a time: visit(s, expert or -1, destination, how many of
  /// this rank's selections for that destination come before it). Uses dst_running.
  template <typename Visit>
  __device__ void ForEachSelection(Visit visit) {
    int32_t* const running = shared_.dst_running[warp_];
    const int num_ranks = exchange_.num_ranks();
    if (lane_ < num_ranks) {
      running[lane_] = shared_.block_before(bins_)[p_.num_experts + lane_] +
                       warp_counts_[p_.num_experts + lane_];
    }
    __syncwarp();
    for (int step = 0; step < steps_; ++step) {
      const int64_t s = begin_ + step * 32 + lane_;
      const int32_t expert = Selection(s);
      const int32_t dst = expert < 0 ? -1 : expert / local_experts_;
      const uint32_t same = __match_any_sync(~0u, dst);
      const int32_t place = dst < 0 ? 0 : running[dst] + CountBelow(same);
      __syncwarp();
      if (dst >= 0 && CountBelow(same) == 0) running[dst] += __popc(same);
      __syncwarp();
      visit(s, expert, dst, place);
    }
  }

  /// The expert selected, -1 if there is none or its rank is masked.
  __device__ int32_t Selection(int64_t s) const {
    const int32_t expert = WantedExpert(s);
    return expert >= 0 && !exchange_.IsMasked(expert / local_experts_) ? expert : -1;
  }
  __device__ int32_t WantedExpert(int64_t s) const {
    if (s >= num_selections_) return -1;
    const int32_t expert = p_.topk_idx[s];
    return expert >= 0 && expert < p_.num_experts ? expert : -1;
  }

  __device__ void CountSelections(bool recount) {
    for (int bin = lane_; bin < (recount ? p_.num_experts : bins_); bin += 32) {
      warp_counts_[bin] = 0;
    }
    __syncwarp();
    const auto count = [&](int32_t bin) {
      const uint32_t same = __match_any_sync(~0u, bin);
      if (bin >= 0 && CountBelow(same) == 0) warp_counts_[bin] += __popc(same);
      __syncwarp();
    };
    if (recount) {
      ForEachSelection([&](int64_t, int32_t expert, int32_t dst, int32_t place) {
        count(expert >= 0 && place < shared_.allowance[dst] ? expert : -1);
      });
    } else {
      for (int step = 0; step < steps_; ++step) {
        const int64_t s = begin_ + step * 32 + lane_;
        const int32_t expert = WantedExpert(s);
        if (s < num_selections_ && expert < 0 && p_.topk_idx[s] != -1) {
          exchange_.Fail(Failure::kIndexRange, Phase::kNone, exchange_.rank(), s, p_.topk_idx[s]);
        }
        count(expert);
        count(expert < 0 ? -1 : p_.num_experts + expert / local_experts_);
      }
    }
    __syncthreads();
  }

  /// warp_counts -> what comes before each warp in the block; the block's sums go to the arena.
  __device__ void SumWarps(int first_bin, int end_bin, int round) {
    int32_t* const counts = shared_.warp_counts();
    for (int bin = first_bin + threadIdx.x; bin < end_bin; bin += blockDim.x) {
      int32_t before = 0;
      for (int warp = 0; warp < kWarpsPerBlock; ++warp) {
        const int32_t here = counts[warp * bins_ + bin];
        counts[warp * bins_ + bin] = before;
        before += here;
      }
      BlockCounts(round, blockIdx.x)[bin] = before;
    }
  }

  /// block_before, and this rank's totals in `size` for the exchange of counts.
  __device__ void SumBlocks(int first_bin, int end_bin, int round) {
    for (int bin = first_bin + threadIdx.x; bin < end_bin; bin += blockDim.x) {
      int32_t before = 0;
      int32_t total = 0;
      for (int block = 0; block < static_cast<int>(gridDim.x); ++block) {
        if (block == static_cast<int>(blockIdx.x)) before = total;
        total += BlockCounts(round, block)[bin];
      }
      shared_.block_before(bins_)[bin] = before;
      if (bin < p_.num_experts) shared_.size(bins_, p_.num_experts)[bin] = total;
    }
    __syncthreads();
  }

  /// All ranks' counts -> base (rows of earlier sources) and size of every expert; the first time
  /// also rank_rows, and tokens_per_expert.
  __device__ bool ReadCounts(bool accepted) {
    const int num_ranks = exchange_.num_ranks();
    const int rank = exchange_.rank();
    int32_t* const size = shared_.size(bins_, p_.num_experts);
    int32_t* const base = shared_.base(bins_);
    if (!counts_.Await(accepted, shared_.flags)) return false;
    for (int i = threadIdx.x; i < kMaxRanks * kMaxRanks && !accepted; i += blockDim.x) {
      shared_.rank_rows[i] = 0;
    }
    if (threadIdx.x == 0) shared_.flags[0] = 1;
    __syncthreads();
    const int steps = (p_.num_experts + blockDim.x - 1) / blockDim.x;
    for (int step = 0; step < steps; ++step) {
      const int expert = step * blockDim.x + threadIdx.x;
      const bool is_expert = expert < p_.num_experts;
      uint64_t word[kMaxRanks];
#pragma unroll
      for (int src = 0; src < kMaxRanks; ++src) {
        if (src < num_ranks && is_expert) {
          word[src] = counts_.Look(accepted, src, expert);
        }
      }
      const int32_t own = is_expert ? size[expert] : 0;
      const uint32_t same_rank =
          __match_any_sync(~0u, is_expert ? expert / local_experts_ : kMaxRanks);
      int32_t total = 0;
      int32_t before = 0;
#pragma unroll
      for (int src = 0; src < kMaxRanks; ++src) {
        if (src >= num_ranks) break;
        int32_t count = own;
        if (exchange_.IsMasked(src)) {
          count = 0;
        } else if (src != rank && is_expert) {
          const bool came = counts_.Wait(accepted, src, expert, word[src]);
          if (!came) shared_.flags[0] = 0;
          count = came ? static_cast<int32_t>(CountWord::Count(word[src])) : 0;
        }
        if (src < rank) before += count;
        total += count;
        if (!accepted) {
          const int32_t of_rank = __reduce_add_sync(same_rank, count);
          if (is_expert && CountBelow(same_rank) == 0) {
            atomicAdd(&shared_.rank_rows[src * kMaxRanks + expert / local_experts_], of_rank);
          }
        }
      }
      if (is_expert) {
        base[expert] = before;
        size[expert] = total;
        if (!accepted && blockIdx.x == 0) p_.tokens_per_expert[expert] = total;
      }
    }
    __syncthreads();
    const bool ok = shared_.flags[0] != 0;
    __syncthreads();
    return ok;
  }

  /// Sources fill a rank in order until it is full.
  __device__ void CheckCapacity() {
    if (threadIdx.x == 0) shared_.capacity_is_short = 0;
    __syncthreads();
    const int dst = threadIdx.x;
    if (dst < exchange_.num_ranks() && !exchange_.IsMasked(dst)) {
      const auto capacity = static_cast<int32_t>(p_.capacity);
      int32_t filled = 0;
      for (int src = 0; src < exchange_.num_ranks(); ++src) {
        const int32_t sent = shared_.rank_rows[src * kMaxRanks + dst];
        if (src == exchange_.rank()) {
          shared_.first_arrival[dst] = filled;
          shared_.allowance[dst] = max(0, min(sent, capacity - filled));
        }
        filled += sent;
      }
      shared_.num_rows[dst] = min(filled, capacity);
      if (filled > capacity) shared_.capacity_is_short = 1;
    }
    __syncthreads();
  }

  __device__ void ReportOverflow() {
    if (threadIdx.x != 0) return;
    int32_t wanted = 0;
    for (int src = 0; src < exchange_.num_ranks(); ++src) {
      wanted += shared_.rank_rows[src * kMaxRanks + exchange_.rank()];
    }
    if (wanted > p_.capacity) {
      exchange_.Fail(Failure::kOverflow, Phase::kNone, exchange_.rank(), p_.capacity, wanted);
    }
  }

  /// base += first row of the expert on its rank + what this rank's earlier blocks send. One warp a
  /// rank, 32 experts at a time.
  __device__ void FirstRows() {
    const int32_t* const size = shared_.size(bins_, p_.num_experts);
    const int32_t* const block_before = shared_.block_before(bins_);
    int32_t* const base = shared_.base(bins_);
    for (int dst = warp_; dst < exchange_.num_ranks(); dst += kWarpsPerBlock) {
      int32_t row = 0;
      for (int first = 0; first < local_experts_; first += 32) {
        const bool is_expert = first + lane_ < local_experts_;
        const int expert = dst * local_experts_ + first + lane_;
        const int32_t rows = is_expert ? size[expert] : 0;
        int32_t through = rows;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int32_t other = __shfl_up_sync(~0u, through, step);
          if (lane_ >= step) through += other;
        }
        if (is_expert) base[expert] += row + through - rows + block_before[expert];
        row += __shfl_sync(~0u, through, 31);
      }
    }
    __syncthreads();
  }

  const PlanParams& p_;
  Exchange& exchange_;
  Counts& counts_;
  PlanShared& shared_;
  const int bins_;
  const int local_experts_;
  const int lane_;
  const int warp_;
  const int64_t num_selections_;
  int64_t begin_;
  int steps_;
  int32_t* warp_counts_;
};

/// What a masked rank gets: no rows, and all its selections dropped.
__device__ inline void WriteEmptyPlan(const PlanParams& p, int num_ranks) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  const auto fill = [&](int32_t* to, int64_t count, int32_t value) {
    for (int64_t i = thread; i < count; i += num_threads) to[i] = value;
  };
  const int64_t num_selections = p.num_tokens * p.top_k;
  fill(p.group_sizes, p.num_experts / num_ranks, 0);
  fill(p.num_rows, 1, 0);
  fill(p.tokens_per_expert, p.num_experts, 0);
  fill(p.dest_rank, num_selections, -1);
  fill(p.dest_row, num_selections, -1);
  fill(p.row_source, p.capacity, -1);
  fill(p.arrival_rows, p.capacity, -1);
  fill(p.rows_per_source, num_ranks, 0);
  if (blockIdx.x != 0 || threadIdx.x >= 32) return;
  int32_t dropped = 0;
  for (int64_t s = threadIdx.x; s < num_selections; s += 32) dropped += p.topk_idx[s] >= 0;
  dropped = __reduce_add_sync(~0u, dropped);
  if (threadIdx.x == 0) *p.overflow = dropped;
}

/// Of PlanShared and what follows it.
inline int64_t PlanBytes(const PlanParams& p) {
  return PlanShared::NumBytes(p.num_experts, p.peers.num_ranks);
}

/// Launches a plan kernel.
template <typename Params>
Status LaunchPlanKernel(void (*kernel)(Params), const Params& params, const PlanParams& p,
                        int64_t shared_bytes, cudaStream_t stream) {
  if (p.num_experts > kMaxPlanExperts) {
    return Status::InvalidArgument("make_plan: num_experts: expected at most " +
                                   std::to_string(kMaxPlanExperts) + " on CUDA, got " +
                                   std::to_string(p.num_experts) + "; use backend='xla'");
  }
  // A block for every 2048 selections; at least two, since rings need both ends.
  const int64_t wanted = std::max<int64_t>(2, p.num_tokens * p.top_k / 2048 + 1);
  const auto blocks = static_cast<int>(std::min<int64_t>(wanted, p.peers.num_sms));
  return Launch(kernel, blocks, kPlanThreads, shared_bytes, stream, params, "make_plan");
}

}  // namespace wideep
