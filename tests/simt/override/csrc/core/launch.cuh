// csrc/core/launch.cuh for the emulator: kernels are queued on the stream of their rank and run by
// simt::Device::RunAll.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>

#include "csrc/core/status.h"
#include "tests/simt/device.h"

namespace wideep {

inline char* DynamicShared() { return simt::SharedBase(); }

template <typename Params>
Status LoadKernels(std::initializer_list<void (*)(Params)>, const char*) {
  return Status();
}

template <typename Params>
Status Launch(void (*kernel)(Params), int grid_blocks, int block_threads, int64_t shared_bytes,
              cudaStream_t stream, const Params& params, const char* op) {
  std::string reason;
  if (simt::Enqueue(
          stream, op, grid_blocks, block_threads, shared_bytes,
          [kernel, params] { kernel(params); }, reason)) {
    return Status();
  }
  return Status::Internal(std::string(op) + ": launch: " + reason);
}

}  // namespace wideep
