// What the tests and the benchmark of the grouped GEMM share: device memory that is freed, random
// data made on the device, and error checks that end the program.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "csrc/core/status.h"

namespace gemm_testing {

inline void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

inline void Require(const wideep::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(2);
}

class DeviceBytes {
 public:
  explicit DeviceBytes(size_t num_bytes) : num_bytes_(num_bytes) {
    Require(cudaMalloc(&data_, num_bytes + 16), "cudaMalloc");
  }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(DeviceBytes&& other) noexcept : data_(other.data_), num_bytes_(other.num_bytes_) {
    other.data_ = nullptr;
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;

  template <typename T>
  T* as(size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + offset_bytes);
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  void* data_ = nullptr;
  size_t num_bytes_;
};

inline DeviceBytes ToDevice(const std::vector<int32_t>& values) {
  DeviceBytes bytes(values.size() * 4);
  Require(cudaMemcpy(bytes.as<void>(), values.data(), values.size() * 4, cudaMemcpyHostToDevice),
          "copy to device");
  return bytes;
}

/// Two rounds of a 64-bit mixer.
__device__ inline uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// Normal numbers; their products with as many others keep a scale near 1 when `scale` is
/// depth^-1/2.
template <typename T>
__global__ void FillNormalKernel(T* out, int64_t count, uint64_t seed, float scale) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint64_t bits = Mix(seed * 0x100000001B3ull + i);
    const float u = (static_cast<uint32_t>(bits) + 1.0f) * 2.3283064e-10f;
    const float v = static_cast<uint32_t>(bits >> 32) * 2.3283064e-10f;
    out[i] = T(scale * sqrtf(-2.0f * __logf(fminf(u, 1.0f))) * cospif(2.0f * v));
  }
}

template <typename T>
void FillNormal(T* out, int64_t count, uint64_t seed, float scale) {
  if (count == 0) return;
  FillNormalKernel<<<1024, 256>>>(out, count, seed, scale);
  Require(cudaGetLastError(), "FillNormal");
}

}  // namespace gemm_testing
