// The low-latency shape on the host: no plan, a private region per (expert, source rank), received
// rows packed to the front of each expert.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"
#include "csrc/core/worker_pool.h"

namespace wideep {

using StatusCallback = std::function<void(const Status&)>;

/// The same on every rank.
struct LowLatencyShape {
  int num_ranks;
  int64_t num_tokens;  // per rank, at most chunk
  int top_k;
  int num_experts;
  int64_t chunk;  // cap on tokens per rank and call
  int64_t hidden;
  DType dtype;     // of rows on arrival; kF8E4M3: as sent, with scales
  bool quantized;  // the wire carries FP8 and scales
  bool zero_tail;  // zero the rows past each expert's count

  bool operator==(const LowLatencyShape& o) const {
    return num_ranks == o.num_ranks && num_tokens == o.num_tokens && top_k == o.top_k &&
           num_experts == o.num_experts && chunk == o.chunk && hidden == o.hidden &&
           dtype == o.dtype && quantized == o.quantized && zero_tail == o.zero_tail;
  }
  int local_experts() const { return num_experts / num_ranks; }
  int64_t rows_per_expert() const { return num_ranks * chunk; }
};

/// One rank's buffers of dispatch.
struct LowLatencyDispatchBuffers {
  const void* payload;      // in  [num_tokens, hidden]; FP8 if quantized
  const float* scales;      // in  [num_tokens, hidden / 128], null unless quantized
  const int32_t* topk_idx;  // in  [num_tokens, top_k]; -1 = masked
  void* rows;               // out [local_experts, rows_per_expert, hidden]
  float*
      row_scales;   // out [local_experts, rows_per_expert, hidden / 128], null unless rows are FP8
  int32_t* counts;  // out [local_experts]
  int32_t* row_source;  // out [local_experts, rows_per_expert];
                        //     (source rank * num_tokens + token) * top_k + k, or -1 past the count
  bool masked = false;  // the rank is left out: its arrays are not touched
  // Outputs are null where the rank is in another process.
};

/// Rows of an expert are in order of source rank, token, k. Selections of a masked rank's experts
/// are dropped. Fails on an index outside [-1, num_experts) and on a token that selects an expert
/// twice (its region has one slot per token).
void LowLatencyDispatch(const LowLatencyShape& shape, std::vector<LowLatencyDispatchBuffers> ranks,
                        WorkerPool& pool, StatusCallback done);

/// One rank's buffers of combine and of its backward pass.
struct LowLatencyCombineBuffers {
  const void* y;              // in  [local_experts, rows_per_expert, hidden]
  const float* topk_weights;  // in  [num_tokens, top_k]
  const int32_t* counts;      // in  [local_experts]
  const int32_t* row_source;  // in  [local_experts, rows_per_expert]
  const void* dout;           // in  [num_tokens, hidden]; backward only
  void* out;                  // out [num_tokens, hidden]; forward only
  void* dy;                   // out as y; backward only
  float* dtopk_weights;       // out as topk_weights; backward only
  bool masked = false;        // as above
};

/// out[token] = sum of topk_weights * y over the token's rows, in float32, in order of (rank, k).
void LowLatencyCombine(const LowLatencyShape& shape, std::vector<LowLatencyCombineBuffers> ranks,
                       WorkerPool& pool, StatusCallback done);

/// dy[row] = topk_weights * dout[token], dtopk_weights[token, k] = <y[row], dout[token]>.
void LowLatencyCombineGrad(const LowLatencyShape& shape,
                           std::vector<LowLatencyCombineBuffers> ranks, WorkerPool& pool,
                           StatusCallback done);

/// What a rank that is masked gets: no rows, zeros.
void EmptyLowLatencyDispatch(const LowLatencyShape& shape, const LowLatencyDispatchBuffers& rank);
void EmptyLowLatencyCombine(const LowLatencyShape& shape, const LowLatencyCombineBuffers& rank);
void EmptyLowLatencyCombineGrad(const LowLatencyShape& shape, const LowLatencyCombineBuffers& rank);

}  // namespace wideep
