// Rows travel from their tokens to their experts, on CUDA: dispatch, in one launch per rank.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/status.h"
#include "csrc/ep/peer_context.h"

namespace wideep {

/// The arrays of a plan that the ops read; see PlanParams.
struct PlanArrays {
  const int32_t* dest_rank = nullptr;        // [num_tokens, top_k]
  const int32_t* dest_row = nullptr;         // [num_tokens, top_k]
  const int32_t* num_rows = nullptr;         // []
  const int32_t* row_source = nullptr;       // [capacity]
  const int32_t* arrival_rows = nullptr;     // [capacity]
  const int32_t* rows_per_source = nullptr;  // [num_ranks]
};

/// How rows travel. The result is the same bit for bit.
enum class DispatchForm : int32_t {
  /// The sender writes every row to its place: one pass, nothing to do at the receiver.
  kPush,
  /// The receiver reads each token once and writes all its rows: least bytes between ranks.
  kPull,
};

struct DispatchParams {
  PeerContext peers;
  PlanArrays plan;
  DispatchForm form = DispatchForm::kPush;
  int64_t num_tokens = 0;  // per rank
  int32_t top_k = 0;
  int64_t row_bytes = 0;  // a multiple of 16
  int64_t capacity = 0;
  bool zero_tail = true;

  const char* x = nullptr;         // in  [num_tokens, row_bytes]
  const float* weights = nullptr;  // in  [num_tokens, top_k]
  char* rows = nullptr;            // out [capacity, row_bytes]
  float* row_weights = nullptr;    // out [capacity]

  /// Pieces of a row that go through a warp's shared memory at a time, and how many of them; 0: the
  /// launcher chooses.
  int32_t piece_bytes = 0;
  int32_t num_stages = 0;
};

Status LaunchDispatch(const DispatchParams& params, cudaStream_t stream);

}  // namespace wideep
