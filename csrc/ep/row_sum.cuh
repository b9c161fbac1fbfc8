// Sums of rows by one warp, or by several: 16 bytes of each row at a time, several rows in flight.
#pragma once

#include <cstdint>

#include "csrc/core/convert.cuh"
#include "csrc/core/layout.h"
#include "csrc/core/ptx.h"

namespace wideep {

/// The rows of a sum in order of summation, in shared memory.
struct SumList {
  const char* rows[kMaxKernelTopK];
  float weights[kMaxKernelTopK];
};

/// sum += weight * values, or values: one product and one addition after the other, as on the host.
template <DType kDType, bool kWeighted>
__device__ __forceinline__ void AddTerm(int4 bits, float weight,
                                        float (&sum)[kVectorElems<kDType>]) {
  float values[kVectorElems<kDType>];
  Unpack<kDType>(bits, values);
#pragma unroll
  for (int e = 0; e < kVectorElems<kDType>; ++e) {
    const float term = kWeighted ? __fmul_rn(weight, values[e]) : values[e];
    sum[e] = __fadd_rn(sum[e], term);
  }
}

/// Bytes [begin, end) of a row: out[0..] = sum of weights[i] * rows[i] (or of rows[i]) for
/// i < num_rows, in float32, rounded once. `thread` of `num_threads` threads take 16 bytes each.
/// `kColumns` of them at a time, of `kRows` rows, are read before the first is used. kReadOnce:
/// nobody reads the rows again soon, and L2 need not keep them.
template <DType kDType, bool kWeighted, int kColumns = 2, int kRows = 8, bool kReadOnce = false>
__device__ __forceinline__ void SumRows(char* out, const SumList& list, int num_rows, int begin,
                                        int end, int thread, int num_threads) {
  const int step = num_threads * 16;
  // Cleared: what is only read into under a condition would take its registers in all of the
  // kernel.
  int4 bits[kRows][kColumns] = {};
  const uint64_t evict_first = kReadOnce ? ptx::createpolicy_l2_evict_first() : 0;
#pragma unroll 1
  for (int at = begin + thread * 16; at < end; at += kColumns * step) {
    float sum[kColumns][kVectorElems<kDType>] = {};
#pragma unroll 1
    for (int first = 0; first < num_rows; first += kRows) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i >= num_rows) continue;
        const char* row = list.rows[first + i];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (at + c * step < end) {
            const char* const from = row + at + c * step;
            bits[i][c] = kReadOnce ? ptx::ld_global_no_allocate_cache_hint_v4(from, evict_first)
                                   : ptx::ld_global_no_allocate_v4(from);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i >= num_rows) continue;
        const float weight = kWeighted ? list.weights[first + i] : 1.0f;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          AddTerm<kDType, kWeighted>(bits[i][c], weight, sum[c]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (at + c * step < end) {
        ptx::st_global_v4(out + (at - begin) + c * step, Pack<kDType>(sum[c]));
      }
    }
  }
}

}  // namespace wideep
