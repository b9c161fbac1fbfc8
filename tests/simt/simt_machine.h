// Virtual ranks in the emulator: a stream each. See tests/kernels/virtual_ranks.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "csrc/core/launch.cuh"
#include "csrc/core/ptx.h"
#include "tests/cpp/check.h"
#include "tests/simt/device.h"

namespace wideep {
namespace testing {

struct DelayParams {
  uint64_t ns;
};

inline void DelayKernel(const DelayParams p) {
  if (threadIdx.x != 0) return;
  const uint64_t begin = ptx::globaltimer();
  while (ptx::globaltimer() - begin < p.ns) {
  }
}

class SimtMachine {
 public:
  SimtMachine(int num_ranks, uint64_t seed) : SimtMachine(num_ranks, num_ranks, seed) {}

  void* Allocate(int rank, uint64_t num_bytes) {
    return device_.Allocate(rank, static_cast<int64_t>(num_bytes),
                            "allocation " + std::to_string(num_allocations_++));
  }
  void CopyIn(void* to, const void* from, int64_t num_bytes) { std::memcpy(to, from, num_bytes); }
  void CopyOut(void* to, const void* from, int64_t num_bytes) { std::memcpy(to, from, num_bytes); }
  void Fill(void* to, int byte, int64_t num_bytes) { std::memset(to, byte, num_bytes); }
  template <typename T>
  T* PinnedRecord() {
    T* record = device_.Array<T>(0, 1, "pinned record");
    std::memset(static_cast<void*>(record), 0, sizeof(T));
    return record;
  }
  cudaStream_t Stream(int rank) { return device_.stream(rank); }
  void Delay(int rank, int microseconds) {
    const DelayParams p{static_cast<uint64_t>(microseconds) * 1000};
    CHECK(Launch(DelayKernel, 1, 32, 0, Stream(rank), p, "delay").ok());
  }
  bool Synchronize() {
    const std::string report = device_.RunAll();
    CHECK_EQ(report, "");
    return report.empty();
  }
  simt::Device& device() { return device_; }

 protected:
  SimtMachine(int num_streams, int num_ranks, uint64_t seed)
      : device_(num_streams, OptionsOf(num_ranks, seed)) {}

 private:
  /// Every other seed has a slow rank.
  static simt::Options OptionsOf(int num_ranks, uint64_t seed) {
    simt::Options options;
    options.seed = seed;
    options.slow_rank = seed % 2 == 0 ? -1 : static_cast<int>(seed / 2 % num_ranks);
    return options;
  }

  simt::Device device_;
  int num_allocations_ = 0;
};

/// With a second stream for each rank, for the network (tests/kernels/late_network.h).
class NetworkedMachine : public SimtMachine {
 public:
  NetworkedMachine(int num_ranks, uint64_t seed)
      : SimtMachine(2 * num_ranks, num_ranks, seed), num_ranks_(num_ranks) {}
  cudaStream_t NetworkStream(int rank) { return Stream(num_ranks_ + rank); }

 private:
  const int num_ranks_;
};

}  // namespace testing
}  // namespace wideep
