// Rows travel from their tokens to their experts, on the host: dispatch, and the backward pass of
// combine.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/core/dtype.h"
#include "csrc/core/worker_pool.h"

namespace wideep {

/// The same on every rank.
struct DispatchShape {
  int64_t num_tokens;  // per rank
  int top_k;
  int64_t hidden;
  int64_t capacity;  // rows of the output
  DType dtype;
  bool zero_tail;  // zero the rows past num_rows; otherwise they are left as they are

  bool operator==(const DispatchShape& o) const {
    return num_tokens == o.num_tokens && top_k == o.top_k && hidden == o.hidden &&
           capacity == o.capacity && dtype == o.dtype && zero_tail == o.zero_tail;
  }
};

/// One rank's buffers.
struct DispatchBuffers {
  const void* x;             // in  [num_tokens, hidden]
  const float* weights;      // in  [num_tokens, top_k]
  const int32_t* dest_rank;  // in  [num_tokens, top_k]
  const int32_t* dest_row;   // in  [num_tokens, top_k]
  const int32_t* num_rows;   // in  []
  void* rows;                // out [capacity, hidden]; null where the rank is in another process
  float* row_weights;        // out [capacity]
  bool masked = false;       // the rank is left out: its arrays are not touched
};

/// rows[dest_rank][dest_row] = x[token], row_weights likewise from weights[token, k]. Runs on the
/// pool and calls `done` when all ranks' outputs are complete. Where the plan is older than a mask,
/// selections of masked ranks are skipped and rows that they would have sent are zero.
void Dispatch(const DispatchShape& shape, std::vector<DispatchBuffers> ranks, WorkerPool& pool,
              std::function<void()> done);

struct CombineGradBuffers {
  const void* dout;          // in  [num_tokens, hidden], cotangent of combine's output
  const void* y;             // in  [capacity, hidden]
  const float* row_weights;  // in  [capacity]
  const int32_t* dest_rank;  // in  [num_tokens, top_k]
  const int32_t* dest_row;   // in  [num_tokens, top_k]
  const int32_t* num_rows;   // in  []
  void* dy;                  // out [capacity, hidden]; null where in another process
  float* drow_weights;       // out [capacity]
  bool masked = false;       // as above
};

/// dy[row] = row_weights[row] * dout[token] and drow_weights[row] = <y[row], dout[token]>; zero
/// where a masked rank would have sent dout.
void CombineGrad(const DispatchShape& shape, std::vector<CombineGradBuffers> ranks,
                 WorkerPool& pool, std::function<void()> done);

/// What a rank that is masked gets from either: zeros, past num_rows too under zero_tail.
void EmptyDispatch(const DispatchShape& shape, const DispatchBuffers& rank);
void EmptyCombineGrad(const DispatchShape& shape, const CombineGradBuffers& rank);

}  // namespace wideep
