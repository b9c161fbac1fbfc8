// Rows come home from their experts, on CUDA: combine, and the backward passes of dispatch and of
// combine; each in one launch per rank.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"
#include "csrc/ep/dispatch.h"
#include "csrc/ep/peer_context.h"

namespace wideep {

/// How rows come home.
enum class CombineForm : int32_t {
  /// The home rank reads its tokens' rows from the peers and sums: one pass. The sum is that of
  /// CombineHost bit for bit.
  kPull,
  /// The expert's rank sums the rows of a token that it holds, and sends one row through a ring:
  /// least bytes between ranks. Sums of a rank are rounded to the rows' type before they travel.
  kPush,
  /// The expert's rank sums the rows of a token that it holds into `sums`, in its own memory, and
  /// the home rank reads the sums: fewer bytes between ranks than with kPull, at full speed. Where
  /// two or more rows of a token lie at another rank, their sum is rounded to the rows' type. Where
  /// buffers are not mapped, the same as kPush.
  kReduce,
};

/// out[token] = sum of row_weights * y over the token's rows, in float32, in order of (rank, k),
/// rounded once.
struct CombineParams {
  PeerContext peers;
  PlanArrays plan;
  CombineForm form = CombineForm::kPull;
  DType dtype = DType::kBF16;
  int64_t num_tokens = 0;  // per rank
  int32_t top_k = 0;
  int64_t hidden = 0;  // rows are a multiple of 16 bytes

  const char* y = nullptr;             // in  [capacity, hidden]
  const float* row_scalars = nullptr;  // in  [capacity]: weights, or, for dispatch's backward pass,
                                       //     the cotangents of dispatch's row_weights
  char* out = nullptr;                 // out [num_tokens, hidden]
  char* sums = nullptr;                // scratch [capacity, hidden] of kReduce
  /// Parts that kReduce cuts the tokens into, at most kMaxSumChunks; 0: the launcher chooses.
  int32_t num_chunks = 0;
  /// Dispatch's backward pass: rows are summed unweighted and each selection's scalar comes home.
  float* dweights = nullptr;  // out [num_tokens, top_k], or null for combine
};

/// dy[row] = row_weights[row] * dout[token], drow_weights[row] = <y[row], dout[token]>. The rank of
/// the rows reads each token's dout once, or gets it through a ring where it is not mapped.
struct CombineGradParams {
  PeerContext peers;
  PlanArrays plan;
  DType dtype = DType::kBF16;
  int64_t num_tokens = 0;
  int32_t top_k = 0;
  int64_t hidden = 0;
  int64_t capacity = 0;
  bool zero_tail = true;

  const char* dout = nullptr;          // in  [num_tokens, hidden]
  const char* y = nullptr;             // in  [capacity, hidden]
  const float* row_weights = nullptr;  // in  [capacity]
  char* dy = nullptr;                  // out [capacity, hidden]
  float* drow_weights = nullptr;       // out [capacity]
};

Status LaunchCombine(const CombineParams& params, cudaStream_t stream);
Status LaunchCombineGrad(const CombineGradParams& params, cudaStream_t stream);

}  // namespace wideep
