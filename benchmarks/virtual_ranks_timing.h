// Timing of virtual ranks on one GPU: every rank on a stream of its own, all in one captured graph,
// so that nothing of the host is in the figures.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/status.h"
#include "tests/gpu/cuda_machine.h"

namespace wideep {
namespace benchmarks {

using testing::CudaMachine;
using testing::RequireCuda;

inline void Require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(2);
}

inline double Median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Milliseconds of `work(stream)`, each of `repeats` times after `warm_ups`.
template <typename Work>
std::vector<float> Times(cudaStream_t stream, int warm_ups, int repeats, Work work) {
  cudaEvent_t begin, end;
  RequireCuda(cudaEventCreate(&begin), "event");
  RequireCuda(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < warm_ups + repeats; ++i) {
    RequireCuda(cudaEventRecord(begin, stream), "begin");
    RequireCuda(work(stream), "work");
    RequireCuda(cudaEventRecord(end, stream), "end");
    RequireCuda(cudaEventSynchronize(end), "run");
    float ms;
    RequireCuda(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= warm_ups) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times;
}

/// GB/s of a device-to-device copy, bytes read plus written.
inline double MeasureCopy() {
  constexpr int64_t kBytes = int64_t{2} << 30;
  char *from, *to;
  RequireCuda(cudaMalloc(&from, kBytes), "copy");
  RequireCuda(cudaMalloc(&to, kBytes), "copy");
  RequireCuda(cudaMemset(from, 1, kBytes), "copy");
  const std::vector<float> times = Times(nullptr, 2, 7, [&](cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, stream);
  });
  cudaFree(from);
  cudaFree(to);
  return 2 * kBytes / (Median(times) * 1e6);
}

/// Microseconds of one `launch(rank, stream)` over all ranks, from the first start to the last end:
/// `iterations` of them in a row in a graph, the median of `repeats` graph launches.
template <typename Ranks, typename LaunchRank>
double TimeRanks(Ranks& ranks, int top_k, int iterations, int repeats, LaunchRank launch) {
  cudaStream_t main;
  RequireCuda(cudaStreamCreate(&main), "stream");
  RequireCuda(cudaStreamBeginCapture(main, cudaStreamCaptureModeRelaxed), "capture");
  cudaEvent_t fork, join;
  RequireCuda(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming), "event");
  RequireCuda(cudaEventCreateWithFlags(&join, cudaEventDisableTiming), "event");
  RequireCuda(cudaEventRecord(fork, main), "fork");
  for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
    const cudaStream_t stream = ranks.stream(rank);
    RequireCuda(cudaStreamWaitEvent(stream, fork), "fork");
    for (int i = 0; i < iterations; ++i) Require(launch(rank, stream));
    RequireCuda(cudaEventRecord(join, stream), "join");
    RequireCuda(cudaStreamWaitEvent(main, join), "join");
  }
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  RequireCuda(cudaStreamEndCapture(main, &graph), "capture");
  RequireCuda(cudaGraphInstantiate(&executable, graph, 0), "graph");
  const std::vector<float> times = Times(
      main, 3, repeats, [&](cudaStream_t stream) { return cudaGraphLaunch(executable, stream); });
  for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
    const ErrorRecord& record = ranks.record(rank);
    if (record.failure == 0) continue;
    std::fprintf(stderr, "%s\n", Describe(record, ranks.settings().deadline_s, top_k).c_str());
    std::exit(2);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  for (cudaEvent_t event : {fork, join}) cudaEventDestroy(event);
  cudaStreamDestroy(main);
  return Median(times) * 1e3 / iterations;
}

/// A CudaMachine whose memory is one allocation, kept from one machine to the next: one at a time.
class SlabMachine : public CudaMachine {
 public:
  using CudaMachine::CudaMachine;

  /// At least this much for the next machine. No machine may be alive.
  static void Reserve(uint64_t num_bytes) {
    if (num_bytes <= size_) return;
    cudaFree(slab_);
    RequireCuda(cudaMalloc(&slab_, num_bytes), "slab");
    size_ = num_bytes;
  }

  void* Allocate(int, uint64_t num_bytes) {
    char* const at = slab_ + used_;
    used_ += (num_bytes + 511) / 256 * 256;
    if (used_ > size_) {
      std::fprintf(stderr, "the slab is too small\n");
      std::exit(2);
    }
    return at;
  }

 private:
  static inline char* slab_ = nullptr;
  static inline uint64_t size_ = 0;
  uint64_t used_ = 0;
};

}  // namespace benchmarks
}  // namespace wideep
