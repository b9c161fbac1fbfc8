// The backward pass of low-latency combine: dout travels as tokens do in dispatch, with the gate
// weights; the expert's rank makes dy and the dot product of each row with its dout, and sends the
// latter home, piece by piece.
#pragma once

#include "csrc/core/convert.cuh"
#include "csrc/ep/low_latency_receive.cuh"

namespace wideep {

/// One piece of an arrival: dy of its rows, and their dot products home.
template <DType kDType>
__device__ __forceinline__ void ScaleAndDotPiece(const LowLatencyCombineGradParams& p,
                                                 const Arrival& arrival, LowLatencyCall& call) {
  constexpr int kElems = kVectorElems<kDType>;
  const int lane = threadIdx.x % 32;
  const int64_t row_bytes = p.tokens.hidden * static_cast<int64_t>(SizeOf(kDType));
  const PieceRange range =
      RangeOfPiece(static_cast<int>(row_bytes / 16), arrival.piece, p.tuning.pieces);
  for (int r = 0; r < arrival.num_rows; ++r) {
    const int64_t row = __shfl_sync(~0u, arrival.out_row, r);
    const float weight = __shfl_sync(~0u, arrival.entry.weight, r);
    const int32_t selection = __shfl_sync(~0u, arrival.entry.selection, r);
    float dot = 0;
    for (int at = range.begin + lane; at < range.end; at += 32) {
      float dout[kElems];
      float y[kElems];
      Unpack<kDType>(ptx::ld_global_no_allocate_v4(arrival.row + at * 16), dout);
      Unpack<kDType>(ptx::ld_global_no_allocate_v4(p.y + row * row_bytes + at * 16), y);
#pragma unroll
      for (int e = 0; e < kElems; ++e) {
        dot += y[e] * dout[e];
        dout[e] = __fmul_rn(weight, dout[e]);
      }
      ptx::st_global_v4(p.dy + row * row_bytes + at * 16, Pack<kDType>(dout));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane == 0) {
      auto* dots = call.In<uint64_t>(arrival.src, call.layout().home_dots);
      // One word with its epoch: it vouches for nothing else.
      ptx::st_relaxed_sys_u64(&dots[int64_t{selection} * kMaxPieces + arrival.piece],
                              CountWord::Pack(call.epoch(), __float_as_uint(dot)));
    }
  }
}

/// The expert's end; all threads of the block, after a meeting.
template <DType kDType>
__device__ void ReceiveDouts(const LowLatencyCombineGradParams& p, LowLatencyCall& call,
                             int32_t* table_words) {
  ArrivalTable table(table_words, p.tokens, call);
  if (!table.Fill()) return;
  const int pieces = p.tuning.pieces;
  ForEachItem(table.num_arrivals() * pieces, [&](int32_t item) {
    Arrival arrival;
    if (!table.Wait(item / pieces, item % pieces, arrival)) return false;
    ScaleAndDotPiece<kDType>(p, arrival, call);
    return true;
  });
}

/// What a masked rank gets: the rows that it holds and its weights have no gradient.
__device__ inline void ZeroGradients(const LowLatencyCombineGradParams& p, int64_t row_bytes,
                                     int num_ranks) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t expert_bytes = num_ranks * p.peers.layout.low_latency.chunk * row_bytes;
  for (int e = 0; e < p.tokens.num_experts / num_ranks; ++e) {
    // The launcher clears the rest.
    const int64_t bytes = min(max(int64_t{p.counts[e]}, int64_t{0}) * row_bytes, expert_bytes);
    for (int64_t at = thread * 16; at < bytes; at += num_threads * 16) {
      ptx::st_global_v4(p.dy + e * expert_bytes + at, make_int4(0, 0, 0, 0));
    }
  }
  const int64_t selections = p.tokens.num_tokens * p.tokens.top_k;
  for (int64_t s = thread; s < selections; s += num_threads) p.dtopk_weights[s] = 0;
}

/// The home's end: a thread for each selection.
__device__ inline void ReceiveDots(const LowLatencyCombineGradParams& p, LowLatencyCall& call) {
  const LowLatencyTokens& t = p.tokens;
  const int local_experts = t.num_experts / call.num_ranks();
  const auto selections = static_cast<int32_t>(t.num_tokens * t.top_k);
  const auto* dots = call.In<const uint64_t>(call.rank(), call.layout().home_dots);
  for (int32_t s = threadIdx.x * gridDim.x + blockIdx.x; s < selections;
       s += gridDim.x * blockDim.x) {
    const int32_t expert = p.topk_idx[s];
    const bool has_row = expert >= 0 && !call.IsMasked(expert / local_experts);
    float sum = 0;
    for (int piece = 0; has_row && piece < p.tuning.pieces; ++piece) {
      uint64_t word = 0;
      const bool came = call.exchange().Wait(
          [&] {
            word = ptx::ld_relaxed_sys_u64(&dots[int64_t{s} * kMaxPieces + piece]);
            return CountWord::IsOf(word, call.epoch());
          },
          Phase::kSlots, expert / local_experts);
      if (!came) {
        call.GiveUp();
        return;
      }
      sum += __uint_as_float(CountWord::Count(word));
    }
    p.dtopk_weights[s] = sum;
  }
}

}  // namespace wideep
