// Rows come home from their experts and are summed per token, on the host: combine, and the
// backward pass of dispatch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/core/dtype.h"
#include "csrc/core/worker_pool.h"

namespace wideep {

/// The most selections a token can have; bounds a sum's list of rows.
constexpr int kMaxTopK = 64;

/// The same on every rank.
struct CombineShape {
  int64_t num_tokens;  // per rank
  int top_k;           // at most kMaxTopK
  int64_t hidden;
  DType dtype;

  bool operator==(const CombineShape& o) const {
    return num_tokens == o.num_tokens && top_k == o.top_k && hidden == o.hidden && dtype == o.dtype;
  }
};

/// One rank's buffers.
struct CombineBuffers {
  const void* y;             // in  [capacity, hidden]
  const float* row_weights;  // in  [capacity]
  const int32_t* dest_rank;  // in  [num_tokens, top_k]
  const int32_t* dest_row;   // in  [num_tokens, top_k]
  void* out;                 // out [num_tokens, hidden]; null where the rank is in another process
  bool masked = false;       // the rank is left out: its arrays are not touched
  // Where ranks are in several processes: what the others read.
  const int32_t* num_rows = nullptr;    // in  []
  const int32_t* row_source = nullptr;  // in  [capacity], as in PlanBuffers
};

/// out[token] = sum of row_weights * y over the token's rows, in float32, in order of (rank, k),
/// rounded once. Runs on the pool and calls `done` when all ranks' outputs are complete. Selections
/// of masked ranks are skipped; there are none unless the plan is older than the mask.
void Combine(const CombineShape& shape, std::vector<CombineBuffers> ranks, WorkerPool& pool,
             std::function<void()> done);

struct DispatchGradBuffers {
  const void* drows;          // in  [capacity, hidden], cotangent of dispatch's rows
  const float* drow_weights;  // in  [capacity], cotangent of dispatch's row_weights
  const int32_t* dest_rank;   // in  [num_tokens, top_k]
  const int32_t* dest_row;    // in  [num_tokens, top_k]
  void* dx;                   // out [num_tokens, hidden]; null where in another process
  float* dweights;            // out [num_tokens, top_k]; 0 where masked or dropped
  bool masked = false;        // as above
  const int32_t* num_rows = nullptr;
  const int32_t* row_source = nullptr;
};

/// dx[token] = sum of drows over the token's rows; dweights[token, k] = drow_weights of its row.
void DispatchGrad(const CombineShape& shape, std::vector<DispatchGradBuffers> ranks,
                  WorkerPool& pool, std::function<void()> done);

/// What a rank that is masked gets from either: zeros.
void EmptyCombine(const CombineShape& shape, const CombineBuffers& rank);
void EmptyDispatchGrad(const CombineShape& shape, const DispatchGradBuffers& rank);

/// The selections of one token that have a row, in order of (rank, k): the order of every float sum
/// over them. Writes indices into the token's top_k selections and returns how many.
int OrderedSelections(const int32_t* dest_rank, int top_k, int* order);

}  // namespace wideep
