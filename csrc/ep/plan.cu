#include "csrc/ep/load_kernels.h"
#include "csrc/ep/plan.cuh"

namespace wideep {

Status LaunchPlan(const PlanParams& p, cudaStream_t stream) {
  return LaunchPlanKernel(PlanKernel, p, p, PlanBytes(p), stream);
}

Status LoadPlanKernels() { return LoadKernels({PlanKernel}, "make_plan"); }

}  // namespace wideep
