// Rows that nobody fills: past the last one, where the caller asks for zeros, and those of ranks
// that have been masked since the plan was made.
#pragma once

#include <cstdint>

#include "csrc/core/ptx.h"
#include "csrc/ep/arrivals.cuh"

namespace wideep {

/// Zeroes rows [num_rows, capacity) and their scalars. All threads of all blocks.
__device__ inline void ZeroTail(char* rows, float* row_scalars, int64_t num_rows, int64_t capacity,
                                int64_t row_bytes) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = num_rows * row_bytes + thread * 16; at < capacity * row_bytes;
       at += num_threads * 16) {
    ptx::st_global_v4(rows + at, make_int4(0, 0, 0, 0));
  }
  for (int64_t i = num_rows + thread; i < capacity; i += num_threads) row_scalars[i] = 0;
}

/// Zeroes the rows whose source is masked: there are some if the plan is older than the mask. All
/// threads of all blocks.
__device__ inline void ZeroMaskedRows(const Exchange& exchange, const PlanArrays& plan, char* rows,
                                      float* row_scalars, int64_t row_bytes) {
  if (!exchange.any_masked()) return;
  const int lane = threadIdx.x % 32;
  const auto warp = static_cast<int32_t>((int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32);
  const auto num_warps = static_cast<int32_t>(int64_t{gridDim.x} * blockDim.x / 32);
  for (int src = 0; src < exchange.num_ranks(); ++src) {
    if (!exchange.IsMasked(src)) continue;
    const SourceArrivals arrivals(plan, src, /*top_k=*/1);
    for (int32_t i = arrivals.begin() + warp; i < arrivals.end(); i += num_warps) {
      const int64_t row = plan.arrival_rows[i];
      for (int64_t at = lane * 16; at < row_bytes; at += 32 * 16) {
        ptx::st_global_v4(rows + row * row_bytes + at, make_int4(0, 0, 0, 0));
      }
      if (lane == 0) row_scalars[row] = 0;
    }
  }
}

/// What a masked rank gets: zeros in the rows of the plan, and past them under `zero_tail`.
__device__ inline void ZeroRows(const PlanArrays& plan, bool zero_tail, char* rows,
                                float* row_scalars, int64_t capacity, int64_t row_bytes) {
  ZeroTail(rows, row_scalars, 0, zero_tail ? capacity : *plan.num_rows, row_bytes);
}

}  // namespace wideep
