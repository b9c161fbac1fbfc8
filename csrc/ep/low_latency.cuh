// The low-latency kernels. A launch sends, receives, or does one after the other: a block that has
// sent its share begins to receive, and no block waits for another one of its rank.
#pragma once

#include "csrc/core/launch.cuh"
#include "csrc/ep/low_latency_combine.cuh"
#include "csrc/ep/low_latency_combine_grad.cuh"
#include "csrc/ep/low_latency_receive.cuh"
#include "csrc/ep/low_latency_send.cuh"

namespace wideep {

constexpr int kLowLatencyThreads = 32 * kWarpsPerBlock;

/// Shared memory of dispatch and of combine's gradient.
struct LowLatencyDispatchShared {
  LowLatencyBase base;
  // Followed, from kWords on, by what NumWords says.

  static constexpr int64_t kWords = 256;
  static int64_t NumBytes(const LowLatencyTokens& t, int num_ranks) {
    return kWords + 4 * (t.num_tokens * t.top_k + TokenBits::NumWords(t, num_ranks) +
                         ArrivalTable::NumWords(t, num_ranks));
  }
  __device__ int32_t* experts() {
    return reinterpret_cast<int32_t*>(reinterpret_cast<char*>(this) + kWords);
  }
  __device__ uint32_t* token_bits(const LowLatencyTokens& t) {
    return reinterpret_cast<uint32_t*>(experts() + t.num_tokens * t.top_k);
  }
  __device__ int32_t* arrivals(const LowLatencyTokens& t, int num_ranks) {
    return reinterpret_cast<int32_t*>(token_bits(t) + TokenBits::NumWords(t, num_ranks));
  }
};
static_assert(sizeof(LowLatencyDispatchShared) <= LowLatencyDispatchShared::kWords);

struct LowLatencyCombineShared {
  LowLatencyBase base;
  SumList lists[kWarpsPerBlock];
  // Followed by PackedRows::NumWords words.

  static int64_t NumBytes(const LowLatencyTokens& t, int num_ranks) {
    return static_cast<int64_t>(sizeof(LowLatencyCombineShared)) +
           4 * PackedRows::NumWords(t, num_ranks);
  }
  __device__ int32_t* packed_rows() { return reinterpret_cast<int32_t*>(this + 1); }
};

template <DType kDType, Wire kWire>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    LowLatencyDispatchKernel(const __grid_constant__ LowLatencyDispatchParams p) {
  auto& shared = *reinterpret_cast<LowLatencyDispatchShared*>(DynamicShared());
  LowLatencyCall call(p.peers, ExchangeOp::kLowLatencyDispatch, LowLatencyKind::kDispatch, p.part,
                      p.ticket, shared.base);
  if (!call.TakesPart()) {
    if (call.receives()) ReceiveNothing(p, call.num_ranks());
    return;
  }
  call.Begin();
  if (call.sends()) {
    const LowLatencySource source{p.tokens, p.tuning.pieces, p.x, p.topk_idx, nullptr};
    SendTokens<kDType, kWire != Wire::kPlain>(source, call, shared.experts(),
                                              shared.token_bits(p.tokens));
  }
  if (!call.Meet()) return;
  if (!call.sends()) call.CountCall();
  if (call.receives()) {
    ReceiveTokens<kDType, kWire>(p, call, shared.arrivals(p.tokens, p.peers.num_ranks));
  }
}

template <DType kDType>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    LowLatencyCombineKernel(const __grid_constant__ LowLatencyCombineParams p) {
  auto& shared = *reinterpret_cast<LowLatencyCombineShared*>(DynamicShared());
  LowLatencyCall call(p.peers, ExchangeOp::kLowLatencyCombine, LowLatencyKind::kCombine, p.part,
                      p.ticket, shared.base);
  const int64_t row_bytes = p.tokens.hidden * static_cast<int64_t>(SizeOf(kDType));
  if (!call.TakesPart()) {
    if (call.receives()) ZeroOutputs(p, row_bytes);
    return;
  }
  call.Begin();
  if (call.sends()) {
    SendOutputs(p, row_bytes, call, shared.packed_rows());
  } else {
    call.Meet();
  }
  call.CountCall();
  if (call.ok() && call.receives()) ReceiveOutputs<kDType>(p, call, shared.lists[threadIdx.x / 32]);
}

template <DType kDType>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    LowLatencyCombineGradKernel(const __grid_constant__ LowLatencyCombineGradParams p) {
  auto& shared = *reinterpret_cast<LowLatencyDispatchShared*>(DynamicShared());
  const bool whole = p.part == CombineGradPart::kBoth;
  const bool sends = whole || p.part == CombineGradPart::kSend;
  LowLatencyCall call(p.peers, ExchangeOp::kLowLatencyCombineGrad, LowLatencyKind::kDispatch,
                      whole   ? LowLatencyPart::kBoth
                      : sends ? LowLatencyPart::kSend
                              : LowLatencyPart::kReceive,
                      p.ticket, shared.base);
  if (!call.TakesPart()) {
    const int64_t row_bytes = p.tokens.hidden * static_cast<int64_t>(SizeOf(kDType));
    return ZeroGradients(p, row_bytes, call.num_ranks());
  }
  call.Begin();
  if (sends) {
    const LowLatencySource source{p.tokens, p.tuning.pieces, p.dout, p.topk_idx, p.topk_weights};
    SendTokens<kDType, /*kQuantize=*/false>(source, call, shared.experts(),
                                            shared.token_bits(p.tokens));
  }
  if (!call.Meet()) return;
  if (p.part == CombineGradPart::kReceive) call.CountCall();
  if (whole || p.part == CombineGradPart::kReceive) {
    ReceiveDouts<kDType>(p, call, shared.arrivals(p.tokens, p.peers.num_ranks));
  }
  if (whole || p.part == CombineGradPart::kHome) ReceiveDots(p, call);
}

// ---- rows past the counts: more blocks than the exchange has, and no other rank ----

struct ExpertTailParams {
  char* rows;             // [local_experts, rows_per_expert, row_bytes]
  float* row_scales;      // [local_experts, rows_per_expert, num_scales], or null
  const int32_t* counts;  // [local_experts]
  int64_t row_bytes;      // a multiple of 16
  int64_t num_scales;
  int64_t rows_per_expert;
  int32_t local_experts;
};

constexpr int kTailThreads = 256;

__global__ void __launch_bounds__(kTailThreads)
    ZeroExpertTailsKernel(const __grid_constant__ ExpertTailParams p) {
  const int blocks_per_expert = gridDim.x / p.local_experts;
  const int expert = blockIdx.x / blocks_per_expert;
  const int64_t thread = blockIdx.x % blocks_per_expert * kTailThreads + threadIdx.x;
  const int64_t num_threads = int64_t{blocks_per_expert} * kTailThreads;
  // Of a call that failed, it may be anything.
  const int64_t count = min(max(int64_t{p.counts[expert]}, int64_t{0}), p.rows_per_expert);
  char* const rows = p.rows + expert * p.rows_per_expert * p.row_bytes;
  for (int64_t at = count * p.row_bytes + thread * 16; at < p.rows_per_expert * p.row_bytes;
       at += num_threads * 16) {
    ptx::st_global_v4(rows + at, make_int4(0, 0, 0, 0));
  }
  if (p.row_scales == nullptr) return;
  float* const scales = p.row_scales + expert * p.rows_per_expert * p.num_scales;
  for (int64_t i = count * p.num_scales + thread; i < p.rows_per_expert * p.num_scales;
       i += num_threads) {
    scales[i] = 0;
  }
}

}  // namespace wideep
