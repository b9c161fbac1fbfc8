// The coordination pass on CUDA: make_plan in one launch per rank.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/status.h"
#include "csrc/ep/peer_context.h"

namespace wideep {

struct PlanParams {
  PeerContext peers;
  int64_t num_tokens = 0;  // per rank
  int32_t top_k = 0;
  int32_t num_experts = 0;  // over all ranks
  int64_t capacity = 0;     // rows that a rank can receive
  bool overflow_is_error = false;

  const int32_t* topk_idx = nullptr;     // in  [num_tokens, top_k]; -1 = masked
  int32_t* group_sizes = nullptr;        // out [local_experts]
  int32_t* num_rows = nullptr;           // out []
  int32_t* overflow = nullptr;           // out []
  int32_t* tokens_per_expert = nullptr;  // out [num_experts]
  int32_t* dest_rank = nullptr;          // out [num_tokens, top_k]
  int32_t* dest_row = nullptr;           // out [num_tokens, top_k]
  int32_t* row_source = nullptr;         // out [capacity]; written by the source ranks
  int32_t* arrival_rows = nullptr;       // out [capacity]; written by the source ranks
  int32_t* rows_per_source = nullptr;    // out [num_ranks]
};

/// Most experts of a group on CUDA: every warp keeps a count of each in shared memory.
constexpr int kMaxPlanExperts = 2048;

/// The outputs equal MakePlan's (plan_host.h) bit for bit. All ranks launch it, on streams whose
/// kernels run at the same time.
Status LaunchPlan(const PlanParams& params, cudaStream_t stream);

}  // namespace wideep
