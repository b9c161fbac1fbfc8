// Combine's gradient over nodes: dout travels as tokens do in dispatch, and whoever writes a row of
// dy reads the row's y and weight where they lie in the node.
#pragma once

#include "csrc/ep/combine.cuh"
#include "csrc/ep/two_hop_dispatch.cuh"

namespace wideep {
namespace two_hop {

template <DType kDType>
class GradRows {
 public:
  static constexpr int kRowWork = 2;
  static constexpr int kNumBuffers = 4;
  static __device__ void Publish(const TwoHopTokens& p, const void* (&mine)[kNumBuffers]) {
    mine[0] = p.rows;
    mine[1] = p.row_scalars;
    mine[2] = p.y;
    mine[3] = p.row_weights;
  }
  __device__ GradRows(const TwoHopTokens& p, char* const* here, BulkPipe& pipe)
      : p_(p), here_(here), pipe_(pipe) {}

  __device__ __noinline__ void Write(const char* dout, bool of_ring, int32_t host, int64_t row,
                                     int32_t, char* slot) const {
    if (slot != nullptr) {
      ptx::fence_proxy_async();  // copies may overwrite what others have read
      CopyRow(pipe_, dout, static_cast<int>(p_.row_bytes), of_ring, [&](int at, uint32_t bytes) {
        if (threadIdx.x % 32 == kSlotLane) pipe_.StoreForReading(slot + at, bytes);
      });
    }
    GradRow own{};
    if (host >= 0) {
      own.dy = here_[host] + row * p_.row_bytes;
      own.dot = reinterpret_cast<float*>(here_[kMaxRanks + host]) + row;
      own.y = here_[2 * kMaxRanks + host] + row * p_.row_bytes;
      own.weight = reinterpret_cast<const float*>(here_[3 * kMaxRanks + host])[row];
    }
    ScaleAndDot<kDType>(dout, p_.row_bytes, own, __ballot_sync(~0u, host >= 0));
  }

 private:
  const TwoHopTokens& p_;
  char* const* const here_;
  BulkPipe& pipe_;
};

}  // namespace two_hop

template <typename Net>
Status LaunchTwoHopCombineGrad(const two_hop::Params<CombineGradParams, Net>& params,
                               cudaStream_t stream) {
  constexpr const char* kOp = "combine's gradient";
  const CombineGradParams& p = params.op;
  if (Status status = CheckCombineShape(kOp, p.dtype, p.hidden, p.top_k); !status.ok()) {
    return status;
  }
  TwoHopTokens tokens;
  tokens.peers = p.peers;
  tokens.plan = p.plan;
  tokens.op = ExchangeOp::kCombineGrad;
  tokens.num_tokens = p.num_tokens;
  tokens.top_k = p.top_k;
  tokens.row_bytes = p.hidden * static_cast<int64_t>(SizeOf(p.dtype));
  tokens.capacity = p.capacity;
  tokens.zero_tail = p.zero_tail;
  tokens.x = p.dout;
  tokens.rows = p.dy;
  tokens.row_scalars = p.drow_weights;
  tokens.y = p.y;
  tokens.row_weights = p.row_weights;
  using two_hop::GradRows;
  switch (p.dtype) {
    case DType::kBF16:
      return LaunchTwoHopTokens<GradRows<DType::kBF16>>(tokens, params, stream, kOp);
    case DType::kF16:
      return LaunchTwoHopTokens<GradRows<DType::kF16>>(tokens, params, stream, kOp);
    default:
      return LaunchTwoHopTokens<GradRows<DType::kF32>>(tokens, params, stream, kOp);
  }
}

template <typename Net>
Status LoadTwoHopCombineGrad() {
  using two_hop::GradRows;
  return LoadKernels<two_hop::Params<TwoHopTokens, Net>>(
      {TwoHopDispatchKernel<GradRows<DType::kBF16>, Net>,
       TwoHopDispatchKernel<GradRows<DType::kF16>, Net>,
       TwoHopDispatchKernel<GradRows<DType::kF32>, Net>},
      "combine's gradient over nodes");
}

}  // namespace wideep
