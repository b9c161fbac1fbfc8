// How a kernel of the exchange is launched and finds its shared memory. All shared memory is
// dynamic.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>

#include "csrc/core/status.h"

namespace wideep {

/// This block's shared memory, as many bytes as Launch was given.
__device__ __forceinline__ char* DynamicShared() {
  extern __shared__ __align__(1024) char wideep_dynamic_shared[];
  return wideep_dynamic_shared;
}

/// Loads a kernel now. Otherwise the driver loads it with its first launch, for which it may wait
/// until the device is idle: for ever, if what runs there waits for another rank of this process.
template <typename Params>
Status LoadKernel(void (*kernel)(Params), const char* op) {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string(op) +
                          ": cannot load the kernel: " + cudaGetErrorString(error));
}

/// All of `kernels`, or the first error.
template <typename Params>
Status LoadKernels(std::initializer_list<void (*)(Params)> kernels, const char* op) {
  for (const auto kernel : kernels) {
    if (Status status = LoadKernel(kernel, op); !status.ok()) return status;
  }
  return Status();
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
