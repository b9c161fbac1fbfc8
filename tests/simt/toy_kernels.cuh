// Kernels for simt_test.cc, written as those of csrc/ep are, with faults that can be switched on.
#pragma once

#include "csrc/core/launch.cuh"
#include "csrc/core/ptx.h"

namespace wideep {

enum class Fault {
  kNone,
  kRelaxedLoad,   // the reader does not acquire
  kRelaxedStore,  // the writer does not release
  kGpuScope,      // flags between ranks, ordered only within a GPU
  kNoBarrier,     // one thread releases for others that it did not meet
  kFlagFirst,     // the flag is raised before the data is written
  kNoLoadWait,    // shared memory is read before the bulk load has come
  kNoReadWait,    // shared memory is written before the bulk store has read it
  kNoWriteWait,   // the flag is raised before the bulk store has written
  kNoProxyFence,  // ordinary writes, then a bulk store of them
  kNoWaitAtEnd,   // the block ends while it is still read
  kUnaligned,     // a bulk load of 24 bytes
  kPastEnd,       // a row past the end of the peer's memory
  kNoSyncwarp,    // lanes read what others wrote to shared memory
  kHalfMask,      // half of a warp names the other half in a mask, which does not come
  kHalfBlock,     // half of a block does not come to the barrier
  kNeverRaised,   // a flag that nobody raises
};

// ---- two threads write a word each and add to a count; a third reads the words once it is full
// ----

struct CountParams {
  uint64_t* count = nullptr;
  int32_t* words = nullptr;  // [2]
  int32_t* sum = nullptr;
  Fault fault = Fault::kNone;
};

template <int kUnused = 0>
__global__ void __launch_bounds__(96, 1) CountKernel(const __grid_constant__ CountParams p) {
  const auto warp = static_cast<int32_t>(threadIdx.x / 32);
  if (threadIdx.x % 32 != 0) return;
  if (warp < 2) {
    p.words[warp] = warp + 1;
    if (p.fault != Fault::kRelaxedStore) ptx::fence_acq_rel_sys();
    ptx::red_add_relaxed_sys_u64(p.count, 1);
    return;
  }
  while (ptx::ld_acquire_sys_u64(p.count) != 2) {
  }
  *p.sum = p.words[0] + p.words[1];
}

// ---- a token goes round the ranks; each adds to the payload before it passes it on ----

struct RingParams {
  uint32_t* flag[8] = {};    // [rank]; how often the token has come to the rank
  int32_t* payload[8] = {};  // [rank][blockDim.x]
  int rank = 0;
  int num_ranks = 0;
  int laps = 0;
  uint64_t deadline_ns = ~uint64_t{0};
  uint32_t* gave_up = nullptr;
  Fault fault = Fault::kNone;
};

__device__ inline bool WaitForFlag(const RingParams& p, uint32_t expected) {
  const uint64_t begin = ptx::globaltimer();
  const uint32_t* flag = p.flag[p.rank];
  while (true) {
    const uint32_t got = p.fault == Fault::kRelaxedLoad ? ptx::ld_relaxed_sys_u32(flag)
                         : p.fault == Fault::kGpuScope  ? ptx::ld_acquire_gpu_u32(flag)
                                                        : ptx::ld_acquire_sys_u32(flag);
    if (got == expected) return true;
    if (ptx::globaltimer() - begin > p.deadline_ns) return false;
  }
}

template <int kUnused = 0>
__global__ void __launch_bounds__(64, 1) RingKernel(const __grid_constant__ RingParams p) {
  auto* shared_ok = reinterpret_cast<uint32_t*>(DynamicShared());
  const int next = (p.rank + 1) % p.num_ranks;
  for (int lap = 0; lap < p.laps; ++lap) {
    if (p.rank > 0 || lap > 0) {
      const auto expected = static_cast<uint32_t>(p.rank == 0 ? lap : lap + 1);
      if (threadIdx.x == 0) {
        *shared_ok = WaitForFlag(p, p.fault == Fault::kNeverRaised ? 1000 : expected);
      }
      __syncthreads();
      if (!*shared_ok) {
        if (threadIdx.x == 0) ptx::st_release_sys_u32(p.gave_up, 1);
        return;
      }
    }
    const auto raise = [&] {
      const auto count = static_cast<uint32_t>(lap + 1);
      if (p.fault == Fault::kRelaxedStore) {
        ptx::st_relaxed_sys_u32(p.flag[next], count);
      } else {
        ptx::st_release_sys_u32(p.flag[next], count);
      }
    };
    if (p.fault == Fault::kFlagFirst && threadIdx.x == 0) raise();
    p.payload[next][threadIdx.x] = p.payload[p.rank][threadIdx.x] + 1;
    if (p.fault != Fault::kNoBarrier) __syncthreads();
    if (p.fault != Fault::kFlagFirst && threadIdx.x == 0) raise();
  }
}

// ---- rows through shared memory into a peer's memory, two stages of bulk copies per warp ----

constexpr int kRowBytes = 256;
constexpr int kStages = 2;

struct RowsParams {
  const char* from = nullptr;  // [num_rows][kRowBytes]
  char* to = nullptr;          // likewise, of a peer; every word plus 1
  int64_t num_rows = 0;
  uint32_t* blocks_done = nullptr;  // of this rank
  uint32_t* done = nullptr;         // of the peer
  Fault fault = Fault::kNone;
};

template <int kUnused = 0>
__global__ void __launch_bounds__(64, 1) RowsKernel(const __grid_constant__ RowsParams p) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int num_warps = blockDim.x / 32;
  char* const rows = DynamicShared() + warp * kStages * kRowBytes;
  auto* mbarriers = reinterpret_cast<uint64_t*>(DynamicShared() + num_warps * kStages * kRowBytes) +
                    warp * kStages;
  if (lane == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init_shared(ptx::SharedAddress(mbarriers + s), 1);
    }
    ptx::fence_mbarrier_init_release_cluster();
  }
  __syncwarp();
  const int64_t first = int64_t{blockIdx.x} * num_warps + warp;
  const int64_t step = int64_t{gridDim.x} * num_warps;
  int turn = 0;
  for (int64_t row = first; row < p.num_rows; row += step, ++turn) {
    const int stage = turn % kStages;
    char* const here = rows + stage * kRowBytes;
    const uint32_t mbarrier = ptx::SharedAddress(mbarriers + stage);
    if (lane == 0) {
      if (p.fault != Fault::kNoReadWait) ptx::cp_async_bulk_wait_group_read<kStages - 1>();
      const uint32_t bytes = p.fault == Fault::kUnaligned ? kRowBytes - 8 : kRowBytes;
      ptx::mbarrier_arrive_expect_tx_release_cta(mbarrier, bytes);
      const int64_t past = p.fault == Fault::kPastEnd && row + 1 == p.num_rows ? 16 : 0;
      ptx::cp_async_bulk_load(ptx::SharedAddress(here), p.from + row * kRowBytes + past, bytes,
                              mbarrier);
    }
    if (p.fault != Fault::kNoLoadWait) {
      while (!ptx::mbarrier_try_wait_parity_acquire_cta(mbarrier, turn / kStages % 2)) {
      }
    }
    for (int i = lane; i < kRowBytes / 4; i += 32) ++reinterpret_cast<int32_t*>(here)[i];
    if (p.fault != Fault::kNoProxyFence) ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      ptx::cp_async_bulk_store(p.to + row * kRowBytes, ptx::SharedAddress(here), kRowBytes);
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (p.fault == Fault::kNoWaitAtEnd) return;
  if (p.fault == Fault::kNoWriteWait) {
    ptx::cp_async_bulk_wait_group_read<0>();
  } else {
    ptx::cp_async_bulk_wait_group<0>();
  }
  __syncthreads();
  if (threadIdx.x == 0 && ptx::atom_add_acq_rel_gpu_u32(p.blocks_done, 1) == gridDim.x - 1) {
    *p.blocks_done = 0;
    ptx::st_release_sys_u32(p.done, 1);
  }
}

/// Reads what RowsKernel of another rank has written.
struct SumParams {
  const int32_t* rows = nullptr;
  int64_t num_words = 0;
  const uint32_t* done = nullptr;
  int32_t* sum = nullptr;
};

template <int kUnused = 0>
__global__ void __launch_bounds__(32, 1) SumKernel(const __grid_constant__ SumParams p) {
  while (ptx::ld_acquire_sys_u32(p.done) == 0) {
  }
  int32_t sum = 0;
  for (int64_t i = threadIdx.x; i < p.num_words; i += 32) sum += p.rows[i];
  sum = __reduce_add_sync(~0u, sum);
  if (threadIdx.x == 0) *p.sum = sum;
}

// ---- prefix sums of a block: shuffles, then the warps' totals through shared memory ----

struct PrefixParams {
  const int32_t* in = nullptr;   // [blockDim.x]
  int32_t* out = nullptr;        // [blockDim.x] what comes before
  uint32_t* same = nullptr;      // [blockDim.x] lanes of the warp with the same input
  int32_t* neighbour = nullptr;  // [blockDim.x] the input of the lane beside
  Fault fault = Fault::kNone;
};

template <int kUnused = 0>
__global__ void PrefixKernel(const __grid_constant__ PrefixParams p) {
  auto* totals = reinterpret_cast<int32_t*>(DynamicShared());
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int32_t mine = p.in[threadIdx.x];
  int32_t through = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through += other;
  }
  if (lane == 31) totals[warp] = through;
  if (p.fault == Fault::kHalfBlock && warp % 2 == 1) {
    __syncthreads();
    return;
  }
  __syncthreads();
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) before += totals[w];
  p.out[threadIdx.x] = before + through - mine;
  const unsigned int mask = p.fault == Fault::kHalfMask && lane < 16 ? 0x3ffffu : ~0u;
  p.same[threadIdx.x] = __match_any_sync(mask, mine);

  int32_t* const inputs = totals + 32 + warp * 32;
  inputs[lane] = mine;
  if (p.fault != Fault::kNoSyncwarp) __syncwarp();
  p.neighbour[threadIdx.x] = inputs[lane ^ 1];
}

}  // namespace wideep
