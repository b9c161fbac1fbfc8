// How a kernel of the exchange is launched and finds its shared memory. All shared memory is
// dynamic.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "csrc/core/status.h"

namespace wideep {

/// This block's shared memory, as many bytes as Launch was given.
__device__ __forceinline__ char* DynamicShared() {
  extern __shared__ __align__(1024) char wideep_dynamic_shared[];
  return wideep_dynamic_shared;
}

template <typename Params>
Status Launch(void (*kernel)(Params), int grid_blocks, int block_threads, int64_t shared_bytes,
              cudaStream_t stream, const Params& params, const char* op) {
  const auto failed = [op](const char* what, cudaError_t error) {
    return Status::Internal(std::string(op) + ": " + what + ": " + cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return failed("shared memory", error);
  }
  kernel<<<grid_blocks, block_threads, shared_bytes, stream>>>(params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return failed("launch", error);
  }
  return Status();
}

}  // namespace wideep
