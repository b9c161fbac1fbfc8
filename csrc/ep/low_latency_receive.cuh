// The receiving half of low-latency dispatch: tokens that arrived go to their rows, packed to the
// front of each expert in order of source rank, token, k. Combine's gradient receives in the same
// way and does something else with the pieces.
#pragma once

#include "csrc/ep/low_latency_protocol.cuh"
#include "csrc/ep/quantize.cuh"

namespace wideep {

/// Where the rows of an arrival lie.
struct Arrival {
  const char* row;  // as it travelled
  int src;          // its home
  int piece;
  int num_rows;
  // Of lane i < num_rows:
  int32_t out_row;  // among the rows of all local experts
  ArrivalEntry entry;
};

/// What a rank will receive, as every block works it out; in shared memory.
class ArrivalTable {
 public:
  WIDEEP_HOST_DEVICE static constexpr int64_t NumWords(const LowLatencyTokens& t, int num_ranks) {
    return int64_t{2} * t.num_experts + t.num_experts / num_ranks + num_ranks + 1;
  }
  __device__ ArrivalTable(int32_t* words, const LowLatencyTokens& t, LowLatencyCall& call)
      : call_(call),
        num_ranks_(call.num_ranks()),
        local_experts_(t.num_experts / call.num_ranks()),
        first_row_(words),
        counts_(words + t.num_experts),
        begin_(words + t.num_experts + local_experts_) {}

  __device__ int local_experts() const { return local_experts_; }
  __device__ int32_t count(int local_expert) const { return counts_[local_expert]; }
  __device__ int32_t num_arrivals() const { return begin_[num_parts()]; }
  __device__ int32_t rows_per_expert() const {
    return num_ranks_ * static_cast<int32_t>(call_.layout().chunk);
  }

  /// Waits for all counts. All threads of the block; false if a rank gave up.
  __device__ bool Fill() {
    const LowLatencyLayout& layout = call_.layout();
    const int num_lists = local_experts_ * num_ranks_;
    const int thread = threadIdx.x;
    WaitForCounts(call_.In<const uint64_t>(call_.rank(), layout.expert_counts), num_lists,
                  first_row_, thread);
    if (layout.once_per_rank) {
      // By threads that most likely have no other.
      WaitForCounts(call_.In<const uint64_t>(call_.rank(), layout.token_counts), num_ranks_, begin_,
                    blockDim.x - 1 - thread);
    }
    if (!call_.Meet()) return false;
    if (!layout.once_per_rank) {
      for (int i = threadIdx.x; i < num_lists; i += blockDim.x) begin_[i] = first_row_[i];
      __syncthreads();
    }
    if (threadIdx.x < 32) {
      SumCounts(begin_, num_parts());
    } else {
      for (int e = threadIdx.x - 32; e < local_experts_; e += blockDim.x - 32) {
        int32_t before = 0;
        for (int src = 0; src < num_ranks_; ++src) {
          const int32_t rows = first_row_[e * num_ranks_ + src];
          first_row_[e * num_ranks_ + src] = before;
          before += rows;
        }
        counts_[e] = before;
      }
    }
    __syncthreads();
    return true;
  }

  /// Waits for a piece of an arrival. All lanes; false if a rank gave up.
  __device__ bool Wait(int32_t index, int piece, Arrival& arrival) {
    const LowLatencyLayout& layout = call_.layout();
    const int lane = threadIdx.x % 32;
    const int part = PartOf(begin_, num_parts(), index);
    const int src = layout.once_per_rank ? part : part % num_ranks_;
    const int64_t slot = part * layout.chunk + (index - begin_[part]);
    const int64_t slot_piece = slot * kMaxPieces + piece;
    const uint64_t* flag =
        call_.In<const uint64_t>(call_.rank(), layout.arrival_flags) + slot_piece;
    int num_rows = 0;
    if (lane == 0) {
      uint64_t word = 0;
      const bool came = call_.exchange().Wait(
          [&] {
            word = ptx::ld_acquire_sys_u64(flag);
            return CountWord::IsOf(word, call_.epoch());
          },
          Phase::kRegion, src);
      num_rows = came ? static_cast<int>(CountWord::Count(word)) : -1;
    }
    num_rows = __shfl_sync(~0u, num_rows, 0);
    __syncwarp();  // what lane 0 acquired is there for all lanes
    if (num_rows < 0) {
      call_.GiveUp();
      return false;
    }
    arrival.row =
        call_.In<const char>(call_.rank(), layout.arrival_rows) + slot * layout.row_stride;
    arrival.src = src;
    arrival.piece = piece;
    arrival.num_rows = num_rows;
    // Without a branch, so that the piece itself is read meanwhile: lanes without a row get an
    // entry that is left from an earlier call, or zeros.
    const int own = min(lane, layout.entries_per_slot - 1);
    const auto* entries = call_.In<const ArrivalEntry>(call_.rank(), layout.arrival_entries);
    const int4 bits =
        ptx::ld_global_no_allocate_v4(&entries[slot_piece * layout.entries_per_slot + own]);
    arrival.entry = {bits.x, bits.y, __int_as_float(bits.z), 0};
    const auto chunk = static_cast<int32_t>(layout.chunk);
    const int32_t local_expert = bits.x / chunk;
    arrival.out_row = local_expert * rows_per_expert() +
                      first_row_[local_expert * num_ranks_ + src] + bits.x % chunk;
    return true;
  }

 private:
  __device__ int num_parts() const {
    return call_.layout().once_per_rank ? num_ranks_ : local_experts_ * num_ranks_;
  }
  /// counts[i] is from rank i % num_ranks. `first` is this thread's first one.
  __device__ void WaitForCounts(const uint64_t* words, int num_words, int32_t* counts, int first) {
    for (int i = first; i < num_words; i += blockDim.x) {
      counts[i] = 0;
      if (call_.IsMasked(i % num_ranks_)) continue;
      uint64_t word = 0;
      const bool came = call_.exchange().Wait(
          [&] {
            word = ptx::ld_relaxed_sys_u64(&words[i]);
            return CountWord::IsOf(word, call_.epoch());
          },
          Phase::kCounts, i % num_ranks_);
      if (!came) {
        call_.GiveUp();
        return;
      }
      counts[i] = static_cast<int32_t>(CountWord::Count(word));
    }
  }

  LowLatencyCall& call_;
  const int num_ranks_;
  const int local_experts_;
  int32_t* const first_row_;  // [local expert][src] of its rows in the expert
  int32_t* const counts_;     // [local expert]
  int32_t* const begin_;      // arrivals before those of each part: a source, or a source's expert
};

// ---- what is done with a piece ----

/// Copies units of 16 bytes to all rows of an arrival.
__device__ __forceinline__ void CopyPiece(const Arrival& arrival, char* rows, int64_t row_bytes,
                                          PieceRange range) {
  constexpr int kInFlight = 8;
  const int lane = threadIdx.x % 32;
  for (int at = range.begin + lane; at - lane < range.end; at += 32 * kInFlight) {
    int4 bits[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (at + 32 * i < range.end) {
        bits[i] = ptx::ld_global_no_allocate_v4(arrival.row + (at + 32 * i) * 16);
      }
    }
    for (int r = 0; r < arrival.num_rows; ++r) {
      char* const to = rows + __shfl_sync(~0u, arrival.out_row, r) * row_bytes;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + 32 * i < range.end) ptx::st_global_v4(to + (at + 32 * i) * 16, bits[i]);
      }
    }
  }
}

/// FP8 values and scales as they are.
__device__ __forceinline__ void KeepFp8Piece(const Arrival& arrival, char* rows, float* row_scales,
                                             int hidden, PieceRange blocks) {
  constexpr int kVectorsPerBlock = static_cast<int>(kQuantBlock) / 16;
  const int lane = threadIdx.x % 32;
  const int num_blocks = hidden / static_cast<int>(kQuantBlock);
  const auto* scales = reinterpret_cast<const float*>(arrival.row + hidden);
  const auto scale_of = [&](int block) { return block < blocks.end ? scales[block] : 0.0f; };
  float scale = scale_of(blocks.begin + lane);  // comes while the values do
  CopyPiece(arrival, rows, hidden,
            {blocks.begin * kVectorsPerBlock, blocks.end * kVectorsPerBlock});
  for (int first = blocks.begin; first < blocks.end; first += 32) {
    const int block = first + lane;
    if (first > blocks.begin) scale = scale_of(block);
    for (int r = 0; r < arrival.num_rows; ++r) {
      const int64_t row = __shfl_sync(~0u, arrival.out_row, r);
      if (block < blocks.end) row_scales[row * num_blocks + block] = scale;
    }
  }
}

/// FP8 values times their scales, in type kDType.
template <DType kDType>
__device__ __forceinline__ void DequantizePiece(const Arrival& arrival, char* rows, int hidden,
                                                PieceRange blocks) {
  constexpr int kInFlight = 8;
  constexpr int kLanes = kLanesPerBlock<kDType>;
  constexpr int kElems = kVectorElems<kDType>;
  const int lane = threadIdx.x % 32;
  const int64_t row_bytes = hidden * static_cast<int64_t>(SizeOf(kDType));
  const auto* scales = reinterpret_cast<const float*>(arrival.row + hidden);
  const int end = blocks.end * kLanes;
  for (int at = blocks.begin * kLanes + lane; at - lane < end; at += 32 * kInFlight) {
    uint32_t words[kInFlight][kElems / 4];
    float scale[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int vector = at + 32 * i;
      if (vector >= end) continue;
      const char* from = arrival.row + vector * kElems;
      if constexpr (kElems == 8) {
        const uint2 both = *reinterpret_cast<const uint2*>(from);
        words[i][0] = both.x;
        words[i][1] = both.y;
      } else {
        words[i][0] = *reinterpret_cast<const uint32_t*>(from);
      }
      scale[i] = scales[vector / kLanes];
    }
    int4 bits[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      float values[kElems];
#pragma unroll
      for (int w = 0; w < kElems / 4; ++w) UnpackFp8(words[i][w], &values[4 * w]);
#pragma unroll
      for (int e = 0; e < kElems; ++e) values[e] = __fmul_rn(values[e], scale[i]);
      bits[i] = Pack<kDType>(values);
    }
    for (int r = 0; r < arrival.num_rows; ++r) {
      char* const to = rows + __shfl_sync(~0u, arrival.out_row, r) * row_bytes;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + 32 * i < end) ptx::st_global_v4(to + (at + 32 * i) * 16, bits[i]);
      }
    }
  }
}

/// How rows travel and arrive.
enum class Wire { kPlain, kFp8, kFp8Dequantized };

/// What a masked rank receives.
__device__ inline void ReceiveNothing(const LowLatencyDispatchParams& p, int64_t num_ranks) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t local_experts = p.tokens.num_experts / num_ranks;
  const int64_t num_rows = p.tokens.num_experts * p.peers.layout.low_latency.chunk;
  for (int64_t e = thread; e < local_experts; e += num_threads) p.counts[e] = 0;
  for (int64_t row = thread; row < num_rows; row += num_threads) p.row_source[row] = -1;
}

/// The receiving half; all threads of the block, after a meeting.
template <DType kDType, Wire kWire>
__device__ void ReceiveTokens(const LowLatencyDispatchParams& p, LowLatencyCall& call,
                              int32_t* table_words) {
  const int lane = threadIdx.x % 32;
  const LowLatencyTokens& t = p.tokens;
  ArrivalTable table(table_words, t, call);
  if (!table.Fill()) return;

  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < table.local_experts(); e += blockDim.x) {
      p.counts[e] = table.count(e);
    }
  }
  constexpr int kTailParts = 4;
  ForEachItem(table.local_experts() * kTailParts, [&](int32_t item) {
    const int e = item / kTailParts;
    int32_t* const sources = p.row_source + int64_t{e} * table.rows_per_expert();
    for (int i = table.count(e) + item % kTailParts * 32 + lane; i < table.rows_per_expert();
         i += 32 * kTailParts) {
      sources[i] = -1;
    }
    return true;
  });

  const auto hidden = static_cast<int>(t.hidden);
  const int64_t row_bytes = t.hidden * static_cast<int64_t>(SizeOf(kDType));
  const int pieces = p.tuning.pieces;
  const auto selections = static_cast<int32_t>(t.num_tokens * t.top_k);
  ForEachItem(table.num_arrivals() * pieces, [&](int32_t item) {
    Arrival arrival;
    if (!table.Wait(item / pieces, item % pieces, arrival)) return false;
    if (arrival.piece == 0 && lane < arrival.num_rows) {
      p.row_source[arrival.out_row] = arrival.src * selections + arrival.entry.selection;
    }
    if constexpr (kWire == Wire::kPlain) {
      CopyPiece(arrival, p.rows, row_bytes,
                RangeOfPiece(static_cast<int>(row_bytes / 16), arrival.piece, pieces));
    } else {
      const PieceRange blocks =
          RangeOfPiece(hidden / static_cast<int>(kQuantBlock), arrival.piece, pieces);
      if constexpr (kWire == Wire::kFp8) {
        KeepFp8Piece(arrival, p.rows, p.row_scales, hidden, blocks);
      } else {
        DequantizePiece<kDType>(arrival, p.rows, hidden, blocks);
      }
    }
    return true;
  });
}

}  // namespace wideep
