// Low-latency combine: each row of expert output to the slot of its selection at the token's home,
// and there the weighted sum of a token's rows; a piece of a row for a warp at both ends.
#pragma once

#include "csrc/ep/combine_order.cuh"
#include "csrc/ep/low_latency_protocol.cuh"
#include "csrc/ep/row_sum.cuh"

namespace wideep {

/// The rows of a rank's experts, of which `counts` are valid, as one list; in shared memory.
class PackedRows {
 public:
  WIDEEP_HOST_DEVICE static constexpr int64_t NumWords(const LowLatencyTokens& t, int num_ranks) {
    return t.num_experts / num_ranks + 1;
  }
  __device__ PackedRows(int32_t* words, int local_experts, int32_t rows_per_expert)
      : begin_(words), local_experts_(local_experts), rows_per_expert_(rows_per_expert) {}

  /// All threads of the block, right after Begin; false if a rank gave up, or a count is not one of
  /// this call.
  __device__ bool Fill(const int32_t* counts, LowLatencyCall& call) {
    int32_t wrong = 0;
    for (int e = threadIdx.x; e < local_experts_; e += blockDim.x) {
      const int32_t count = counts[e];
      begin_[e] = count;
      if (count < 0 || count > rows_per_expert_) wrong = count;
    }
    if (!call.Meet()) return false;
    if (wrong != 0) {
      call.exchange().Fail(Failure::kForeignRows, Phase::kNone, call.rank(), rows_per_expert_ + 1,
                           wrong);
      call.GiveUp();
    }
    if (threadIdx.x < 32) SumCounts(begin_, local_experts_);
    return call.Meet();
  }
  __device__ int32_t num_rows() const { return begin_[local_experts_]; }
  /// Where row `index` of the list lies.
  __device__ int32_t At(int32_t index) const {
    const int e = PartOf(begin_, local_experts_, index);
    return e * rows_per_expert_ + index - begin_[e];
  }

 private:
  int32_t* const begin_;
  const int local_experts_;
  const int32_t rows_per_expert_;
};

/// The expert's end; all threads of the block, right after Begin.
__device__ inline void SendOutputs(const LowLatencyCombineParams& p, int64_t row_bytes,
                                   LowLatencyCall& call, int32_t* words) {
  constexpr int kInFlight = 8;
  const int lane = threadIdx.x % 32;
  const LowLatencyTokens& t = p.tokens;
  const LowLatencyLayout& layout = call.layout();
  const int num_ranks = call.num_ranks();
  const int pieces = p.tuning.pieces;
  const auto selections = static_cast<int32_t>(t.num_tokens * t.top_k);
  PackedRows rows(words, t.num_experts / num_ranks, num_ranks * static_cast<int32_t>(layout.chunk));
  if (!rows.Fill(p.counts, call)) return;

  ForEachItem(rows.num_rows() * pieces, [&](int32_t item) {
    const int32_t row = rows.At(item / pieces);
    const int piece = item % pieces;
    const int32_t source = p.row_source[row];
    const char* from = p.y + row * row_bytes;
    const PieceRange range = RangeOfPiece(static_cast<int>(row_bytes / 16), piece, pieces);
    int4 bits[kInFlight];
    const auto read = [&](int at) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + 32 * i < range.end) {
          bits[i] = ptx::ld_global_no_allocate_v4(from + (at + 32 * i) * 16);
        }
      }
    };
    read(range.begin + lane);  // where they go turns out while they come
    if (source < 0 || source >= num_ranks * selections) {
      if (lane == 0) {
        call.exchange().Fail(Failure::kForeignRows, Phase::kNone, call.rank(),
                             num_ranks * selections, static_cast<uint32_t>(source));
      }
      call.GiveUp();
      return false;
    }
    const int home = source / selections;
    if (call.IsMasked(home)) return true;
    const int64_t selection = source % selections;
    char* const to = call.In<char>(home, layout.home_rows) + selection * layout.row_stride;
    for (int at = range.begin + lane; at < range.end; at += 32 * kInFlight) {
      if (at >= range.begin + 32 * kInFlight) read(at);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + 32 * i < range.end) ptx::st_global_v4(to + (at + 32 * i) * 16, bits[i]);
      }
    }
    __syncwarp();
    if (lane == 0) {
      // Release: the piece, by all lanes.
      ptx::st_release_sys_u32(
          &call.In<uint32_t>(home, layout.home_flags)[selection * kMaxPieces + piece],
          call.epoch());
    }
    return true;
  });
}

/// What a masked rank gets.
__device__ inline void ZeroOutputs(const LowLatencyCombineParams& p, int64_t row_bytes) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t at = thread * 16; at < p.tokens.num_tokens * row_bytes;
       at += int64_t{gridDim.x} * blockDim.x * 16) {
    ptx::st_global_v4(p.out + at, make_int4(0, 0, 0, 0));
  }
}

/// The home's end; all threads of the block, after a meeting.
template <DType kDType>
__device__ void ReceiveOutputs(const LowLatencyCombineParams& p, LowLatencyCall& call,
                               SumList& list) {
  const int lane = threadIdx.x % 32;
  const LowLatencyTokens& t = p.tokens;
  const LowLatencyLayout& layout = call.layout();
  const int local_experts = t.num_experts / call.num_ranks();
  const int64_t row_bytes = t.hidden * static_cast<int64_t>(SizeOf(kDType));
  const int pieces = p.tuning.pieces;
  const auto* flags = call.In<const uint32_t>(call.rank(), layout.home_flags);
  const char* rows = call.In<const char>(call.rank(), layout.home_rows);
  ForEachItem(static_cast<int32_t>(t.num_tokens * pieces), [&](int32_t item) {
    const int64_t token = item / pieces;
    const int piece = item % pieces;
    const int64_t selection = token * t.top_k + lane;
    const int32_t expert = lane < t.top_k ? p.topk_idx[selection] : -1;
    const int32_t host = expert >= 0 ? expert / local_experts : -1;
    const int32_t dst = host >= 0 && !call.IsMasked(host) ? host : -1;
    const float weight = lane < t.top_k ? p.topk_weights[selection] : 0.0f;
    const SumOrder order = OrderByRank(dst, t.top_k);
    bool came = true;
    if (dst >= 0) {
      list.rows[order.place] = rows + selection * layout.row_stride;
      list.weights[order.place] = weight;
      const uint32_t* flag = &flags[selection * kMaxPieces + piece];
      came = call.exchange().Wait([&] { return ptx::ld_acquire_sys_u32(flag) == call.epoch(); },
                                  Phase::kSlots, dst);
    }
    if (!__all_sync(~0u, came)) {
      call.GiveUp();
      return false;
    }
    __syncwarp();  // the list; and what each lane acquired is there for all
    const PieceRange range = RangeOfPiece(static_cast<int>(row_bytes / 16), piece, pieces);
    SumRows<kDType, /*kWeighted=*/true>(p.out + token * row_bytes + range.begin * 16, list,
                                        order.count, range.begin * 16, range.end * 16, lane, 32);
    __syncwarp();  // the list is read
    return true;
  });
}

}  // namespace wideep
