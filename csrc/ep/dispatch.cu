#include <algorithm>

#include "csrc/ep/dispatch.cuh"
#include "csrc/ep/load_kernels.h"

namespace wideep {

Status LaunchDispatch(const DispatchParams& params, cudaStream_t stream) {
  const DispatchParams p = WithBuffers(params);
  if (p.row_bytes % 16 != 0 || p.top_k > kMaxKernelTopK) {
    return Status::InvalidArgument(
        "dispatch: expected rows of a multiple of 16 bytes and top_k of at most " +
        std::to_string(kMaxKernelTopK) + " on CUDA, got " + std::to_string(p.row_bytes) +
        " bytes and top_k " + std::to_string(p.top_k));
  }
  // Few tokens need few blocks: two rows a warp, and at least two blocks for the rings' two ends.
  const int64_t wanted = p.num_tokens / (2 * kWarpsPerBlock) + 1;
  const int blocks = static_cast<int>(std::clamp<int64_t>(wanted, 2, p.peers.num_sms));
  return Launch(DispatchKernel, blocks, kDispatchThreads, DispatchSharedBytes(p), stream, p,
                "dispatch");
}

Status LoadDispatchKernels() { return LoadKernels({DispatchKernel}, "dispatch"); }

}  // namespace wideep
