// The coordination pass on the host: from every rank's choice of experts to every row's final
// place.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/core/status.h"

namespace wideep {

/// The same on every rank.
struct PlanShape {
  int num_ranks;
  int64_t num_tokens;  // per rank
  int top_k;
  int num_experts;   // over all ranks; divisible by num_ranks
  int64_t capacity;  // rows that a rank can receive
  bool overflow_is_error;

  bool operator==(const PlanShape& o) const {
    return num_ranks == o.num_ranks && num_tokens == o.num_tokens && top_k == o.top_k &&
           num_experts == o.num_experts && capacity == o.capacity &&
           overflow_is_error == o.overflow_is_error;
  }
  int local_experts() const { return num_experts / num_ranks; }
};

/// One rank's buffers.
struct PlanBuffers {
  const int32_t* topk_idx;  // in  [num_tokens, top_k]; -1 = masked
  int32_t* group_sizes;     // out [local_experts] rows received, per expert
  int32_t* num_rows;        // out [] rows received
  int32_t* overflow;        // out [] selections dropped: on this rank's receive side, and its own
                            //        of masked ranks' experts
  int32_t* tokens_per_expert;  // out [num_experts] selections over all ranks, dropped ones included
  int32_t* dest_rank;          // out [num_tokens, top_k]; -1 = masked or dropped
  int32_t* dest_row;           // out [num_tokens, top_k]; row on dest_rank, or -1
  int32_t* row_source;    // out [capacity]; (source rank * num_tokens + token) * top_k + k, or -1
  int32_t* arrival_rows;  // out [capacity]; rows in order of source rank, token, k, then -1
  int32_t* rows_per_source;  // out [num_ranks]; rows received from each source rank
  bool masked = false;       // the rank is left out: its arrays are not touched
  // All outputs are null where the rank is in another process.
};

/// Selections are taken in order of source rank, token, k until a rank's capacity is full; the rest
/// are dropped. Rows are packed by expert, and inside an expert in that same order. Selections of a
/// masked rank's experts are dropped too, and count in the overflow of the rank that made them.
/// Fails on an index outside [-1, num_experts), and, if overflow_is_error, on a full rank.
Status MakePlan(const PlanShape& shape, const std::vector<PlanBuffers>& ranks);

/// The plan of a rank that is masked: no rows, and all its selections dropped.
void MakeEmptyPlan(const PlanShape& shape, const PlanBuffers& rank);

}  // namespace wideep
