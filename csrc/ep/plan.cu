#include <algorithm>

#include "csrc/ep/load_kernels.h"
#include "csrc/ep/plan.cuh"

namespace wideep {

Status LaunchPlan(const PlanParams& p, cudaStream_t stream) {
  if (p.num_experts > kMaxPlanExperts) {
    return Status::InvalidArgument("make_plan: num_experts: expected at most " +
                                   std::to_string(kMaxPlanExperts) + " on CUDA, got " +
                                   std::to_string(p.num_experts) + "; use backend='xla'");
  }
  // A block for every 2048 selections; at least two, since rings need both ends.
  const int64_t wanted = p.num_tokens * p.top_k / 2048 + 1;
  const int blocks = static_cast<int>(std::clamp<int64_t>(wanted, 2, p.peers.num_sms));
  return Launch(PlanKernel, blocks, kPlanThreads,
                PlanShared::NumBytes(p.num_experts, p.peers.num_ranks), stream, p, "make_plan");
}

Status LoadPlanKernels() { return LoadKernels({PlanKernel}, "make_plan"); }

}  // namespace wideep
