// Virtual ranks on one GPU: a stream each. See tests/kernels/virtual_ranks.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "csrc/ep/load_kernels.h"

namespace wideep {
namespace testing {

inline void RequireCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

__global__ void DelayKernel(int64_t nanoseconds) {
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (static_cast<int64_t>(now - begin) < nanoseconds);
}

class CudaMachine {
 public:
  explicit CudaMachine(int num_ranks, uint64_t) : streams_(num_ranks) {
    // Each stream needs a queue of its own: kernels of different ranks wait for each other.
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    for (cudaStream_t& stream : streams_) {
      RequireCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    }
    if (const Status status = LoadExchangeKernels(); !status.ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      std::exit(2);
    }
  }
  ~CudaMachine() {
    cudaDeviceSynchronize();
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (void* memory : device_) cudaFree(memory);
    for (void* memory : pinned_) cudaFreeHost(memory);
  }
  CudaMachine(const CudaMachine&) = delete;
  CudaMachine& operator=(const CudaMachine&) = delete;

  void* Allocate(int, uint64_t num_bytes) {
    void* memory;
    RequireCuda(cudaMalloc(&memory, num_bytes + 256), "cudaMalloc");
    device_.push_back(memory);
    return memory;
  }
  void CopyIn(void* to, const void* from, int64_t num_bytes) {
    RequireCuda(cudaMemcpy(to, from, num_bytes, cudaMemcpyHostToDevice), "copy in");
  }
  void CopyOut(void* to, const void* from, int64_t num_bytes) {
    RequireCuda(cudaMemcpy(to, from, num_bytes, cudaMemcpyDeviceToHost), "copy out");
  }
  void Fill(void* to, int byte, int64_t num_bytes) {
    RequireCuda(cudaMemset(to, byte, num_bytes), "fill");
    RequireCuda(cudaDeviceSynchronize(), "fill");
  }
  template <typename T>
  T* PinnedRecord() {
    void* memory;
    RequireCuda(cudaHostAlloc(&memory, sizeof(T), cudaHostAllocMapped), "pinned memory");
    std::memset(memory, 0, sizeof(T));
    pinned_.push_back(memory);
    return static_cast<T*>(memory);
  }
  cudaStream_t Stream(int rank) { return streams_[rank]; }
  void Delay(int rank, int microseconds) {
    DelayKernel<<<1, 1, 0, streams_[rank]>>>(int64_t{microseconds} * 1000);
    RequireCuda(cudaGetLastError(), "delay");
  }
  bool Synchronize() {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    return error == cudaSuccess;
  }

 private:
  std::vector<cudaStream_t> streams_;
  std::vector<void*> device_;
  std::vector<void*> pinned_;
};

}  // namespace testing
}  // namespace wideep
