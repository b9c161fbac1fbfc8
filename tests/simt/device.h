// Runs CUDA kernels on the CPU, without a GPU: every thread of every block of every rank is a
// fiber, one OS thread runs them all, and a seeded generator chooses who goes next. For tests of
// protocols between ranks: a seed is an interleaving, which can be run again.
//
//   simt::Device device(/*num_ranks=*/3, {.seed = 7});        // one at a time in a process
//   float* x = device.Array<float>(/*rank=*/0, 100, "x");      // guarded, filled with kPoison
//   LaunchSomething(params, device.stream(0));                 // queued on the rank's stream
//   CHECK_EQ(device.RunAll(), "");                             // runs what is queued; "" or a
//   report
//
// Kernels are compiled by the host compiler against the headers in override/, which come first on
// the include path. What is reported, with kernel, rank, block, thread and source line:
//   - a deadlock: nothing can run, or nothing changes for a long time; where every thread waits;
//   - collectives (__syncthreads, __syncwarp, shuffles, ..) in which threads or masks disagree;
//   - flag accesses, 16-byte accesses and bulk copies that are misaligned or outside what was
//     allocated; with -fsanitize=thread on the kernel's source (and not on the link), every access;
//   - writes around an allocation, seen by its guards;
//   - bulk copies that outlive their block; mbarriers that are misused;
//   - with -fsanitize=thread, data races: two accesses, one of them a write, that no barrier, flag
//     (release, acquire), or completed copy orders, on any interleaving. Accesses of bulk copies
//     also need a proxy fence after ordinary writes. Only __syncwarp orders memory in a warp; other
//     collectives do not. Ordinary writes of what is there already pass.
// Bulk copies happen at random times between issue and the wait for them, so that a missing wait
// gives wrong data too.
//
// Not modelled: clusters, other memory spaces, what a weak memory would make of a race that is
// there (it is reported instead).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

struct CUstream_st;  // cudaStream_t points to one

namespace simt {

struct Options {
  uint64_t seed = 1;
  /// Simulated time between two steps of the scheduler. While nothing but polling goes on it runs
  /// faster and faster, so that deadlines of seconds pass soon.
  uint64_t step_ns = 10;
  /// Threads of this rank run 16 times less often; -1: of no rank.
  int slow_rank = -1;
  /// Now and then a rank, a block, a warp or a thread stands still for a while.
  bool starve = true;
  bool check_races = true;
  /// Steps in which no flag, barrier, copy or kernel gets further, until that is a deadlock.
  /// 0: as many as fit the number of threads.
  int64_t max_idle_steps = 0;
  /// Steps of one RunAll.
  int64_t max_steps = 1'000'000'000;
};

struct Stats {
  int64_t steps = 0;  // times that a thread was given the processor
  int64_t copies = 0;
  int64_t kernels = 0;
  uint64_t now_ns = 0;
};

class Runtime;

class Device {
 public:
  static constexpr unsigned char kPoison = 0xa5;

  explicit Device(int num_ranks, const Options& options = {});
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CUstream_st* stream(int rank) const;

  /// Memory of a rank that all ranks can reach, aligned to 256 bytes, filled with kPoison if it is
  /// at most 4 MiB. Lives as long as the device, or until Free: later accesses are reported. 1 GiB
  /// in all.
  char* Allocate(int rank, int64_t num_bytes, const std::string& name);
  template <typename T>
  T* Array(int rank, int64_t count, const std::string& name) {
    return reinterpret_cast<T*>(Allocate(rank, count * static_cast<int64_t>(sizeof(T)), name));
  }
  void Free(const void* pointer);

  /// Runs everything queued; kernels of one stream in order. Returns "", or what went wrong, after
  /// which this device runs nothing more.
  std::string RunAll();

  /// Kernels of the rank start no earlier (simulated time, see Stats).
  void StartAt(int rank, uint64_t ns);
  /// The rank stops at that time, as a process that is killed: in the middle of its kernels.
  void KillAt(int rank, uint64_t ns);

  const Stats& stats() const;

 private:
  std::unique_ptr<Runtime> runtime_;
};

/// What Launch of override/csrc/core/launch.cuh calls. False, with a reason, if no GPU could run
/// it.
bool Enqueue(CUstream_st* stream, const char* name, int grid_blocks, int block_threads,
             int64_t shared_bytes, std::function<void()> body, std::string& reason);

}  // namespace simt
