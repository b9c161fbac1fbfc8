// The throughput shape on a group over nodes, on CUDA: what the handlers launch in place of
// plan.h, dispatch.h and combine.h where ranks have no address of some others.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/status.h"
#include "csrc/ep/combine.h"
#include "csrc/ep/dispatch.h"
#include "csrc/ep/plan.h"

namespace wideep {

/// What a rank has sent between nodes since its group was made (or its mask changed), each way.
struct CrossedNodes {
  uint64_t tokens_out = 0;   // by dispatch and combine's gradient
  uint64_t bytes_out = 0;    // all puts: slots with their headers, ends of channels, plans' entries
  uint64_t tokens_back = 0;  // by combine and dispatch's gradient
  uint64_t bytes_back = 0;
};

/// One rank of such a group. Results are those of the kernels on one node, but for the order of
/// combine's sum: by node, then rank, then k, rounded once for each row that crosses.
class TwoHop {
 public:
  virtual ~TwoHop() = default;
  virtual Status Plan(const PlanParams& params, cudaStream_t stream) = 0;
  virtual Status Dispatch(const DispatchParams& params, cudaStream_t stream) = 0;
  virtual Status Combine(const CombineParams& params, cudaStream_t stream) = 0;
  virtual Status CombineGrad(const CombineGradParams& params, cudaStream_t stream) = 0;
  /// Waits for the device.
  virtual Status Crossed(CrossedNodes& crossed) = 0;
  /// Begins again without the ranks whose bit is set. No kernel of any rank may run, and nothing
  /// that one has sent be under way.
  virtual Status Reset(uint32_t masked) = 0;
};

}  // namespace wideep
