// Copies by one warp.
#pragma once

#include <cstdint>

#include "csrc/core/ptx.h"

namespace wideep {

/// `num_bytes`, a multiple of 16, by loads and stores, kAtOnce of each lane's under way. All lanes;
/// nothing is ordered.
template <int kAtOnce = 4>
__device__ inline void CopyWarp(char* to, const char* from, int64_t num_bytes) {
  for (int64_t at = threadIdx.x % 32 * 16; at < num_bytes; at += kAtOnce * 512) {
    int4 bits[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (at + i * 512 < num_bytes) bits[i] = ptx::ld_global_no_allocate_v4(from + at + i * 512);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (at + i * 512 < num_bytes) ptx::st_global_v4(to + at + i * 512, bits[i]);
    }
  }
}

}  // namespace wideep
