// Rows past the last one: zero where the caller asks for it.
#pragma once

#include <cstdint>

#include "csrc/core/ptx.h"

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

}  // namespace wideep
