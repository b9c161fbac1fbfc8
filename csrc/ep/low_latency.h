// The low-latency shape on CUDA: dispatch, combine, and combine's backward pass, each in one launch
// per rank or as a send and a receive half. What they compute is in low_latency_host.h; the
// protocol is in low_latency_protocol.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"
#include "csrc/ep/peer_context.h"

namespace wideep {

/// What a launch does. Between the halves other kernels may run. At most two calls of a kind are
/// under way: the receive half of a call comes before the send half of the second next.
enum class LowLatencyPart { kBoth, kSend, kReceive };

/// The same on every rank.
struct LowLatencyTokens {
  int64_t num_tokens = 0;  // per rank, at most the arena's chunk
  int32_t top_k = 0;
  int32_t num_experts = 0;
  int64_t hidden = 0;  // rows are a multiple of 16 bytes
};

/// For tuning; 0: the launcher chooses. `pieces` must be the same on every rank.
struct LowLatencyTuning {
  int32_t pieces = 0;  // of a row, each sent by one warp and received by one warp
  int32_t num_blocks = 0;
};

/// Rows in order of expert, source rank, token, k; packed to the front of each expert.
struct LowLatencyDispatchParams {
  PeerContext peers;
  LowLatencyTokens tokens;
  LowLatencyTuning tuning;
  LowLatencyPart part = LowLatencyPart::kBoth;
  DType dtype = DType::kBF16;  // of x
  bool quantize = true;        // rows travel as FP8; hidden is a multiple of 128
  bool dequantize = true;      // rows arrive in x's type; otherwise as FP8 with scales
  bool zero_tail = true;       // rows past the counts are zero
  /// Says which call this is: written by the send half, read by the receive half. Null for kBoth.
  uint32_t* ticket = nullptr;  // []

  const char* x = nullptr;            // in  [num_tokens, hidden]; send
  const int32_t* topk_idx = nullptr;  // in  [num_tokens, top_k], -1 = masked; send
  char* rows = nullptr;               // out [local_experts, num_ranks * chunk, hidden]
  float* row_scales = nullptr;    // out [local_experts, num_ranks * chunk, hidden / 128], if FP8
  int32_t* counts = nullptr;      // out [local_experts]
  int32_t* row_source = nullptr;  // out [local_experts, num_ranks * chunk];
                                  //     (source rank * num_tokens + token) * top_k + k, or -1
};

/// out[token] = sum of topk_weights * y over the token's rows, in float32, in order of (rank, k),
/// rounded once.
struct LowLatencyCombineParams {
  PeerContext peers;
  LowLatencyTokens tokens;
  LowLatencyTuning tuning;
  LowLatencyPart part = LowLatencyPart::kBoth;
  DType dtype = DType::kBF16;
  uint32_t* ticket = nullptr;  // [], as above

  const char* y = nullptr;              // in  [local_experts, num_ranks * chunk, hidden]; send
  const int32_t* counts = nullptr;      // in  [local_experts]; send
  const int32_t* row_source = nullptr;  // in  [local_experts, num_ranks * chunk]; send
  const int32_t* topk_idx = nullptr;    // in  [num_tokens, top_k]; receive
  const float* topk_weights = nullptr;  // in  [num_tokens, top_k]; receive
  char* out = nullptr;                  // out [num_tokens, hidden]; receive
};

/// Combine's gradient, or one of the three kernels of a call that is relayed
/// (csrc/transport/relay.h): dout out, rows and their dot products, dot products home.
enum class CombineGradPart { kBoth, kSend, kReceive, kHome };

/// dy[row] = topk_weights * dout[token], dtopk_weights[token, k] = <y[row], dout[token]>.
struct LowLatencyCombineGradParams {
  PeerContext peers;
  LowLatencyTokens tokens;
  LowLatencyTuning tuning;
  CombineGradPart part = CombineGradPart::kBoth;
  DType dtype = DType::kBF16;
  bool zero_tail = true;
  uint32_t* ticket = nullptr;  // [], as above

  const char* dout = nullptr;           // in  [num_tokens, hidden]
  const char* y = nullptr;              // in  [local_experts, num_ranks * chunk, hidden]
  const int32_t* topk_idx = nullptr;    // in  [num_tokens, top_k]
  const float* topk_weights = nullptr;  // in  [num_tokens, top_k]
  const int32_t* counts = nullptr;      // in  [local_experts]
  char* dy = nullptr;                   // out as y
  float* dtopk_weights = nullptr;       // out [num_tokens, top_k]
};

Status LaunchLowLatencyDispatch(const LowLatencyDispatchParams& params, cudaStream_t stream);
Status LaunchLowLatencyCombine(const LowLatencyCombineParams& params, cudaStream_t stream);
Status LaunchLowLatencyCombineGrad(const LowLatencyCombineGradParams& params, cudaStream_t stream);

}  // namespace wideep
