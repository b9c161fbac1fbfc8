// Sums of rows by one warp, or by several: 16 bytes of each row at a time, several rows in flight.
#pragma once

#include <cstdint>

#include "csrc/core/convert.cuh"
#include "csrc/core/ptx.h"

namespace wideep {

/// The rows of a sum, in shared memory, in order of summation.
struct SumList {
  const char* rows[32];
  float weights[32];
};

/// out = sum of weights[i] * rows[i] (or of rows[i]) for i < num_rows, in float32, one product and
/// one addition after the other as on the host, rounded once. `thread` of `num_threads` threads
/// take 16 bytes each.
template <DType kDType, bool kWeighted>
__device__ __forceinline__ void SumRows(char* out, const SumList& list, int num_rows,
                                        int64_t row_bytes, int thread, int num_threads) {
  constexpr int kColumns = 2;  // of 16 bytes, for each thread
  constexpr int kRows = 8;     // read before the first is used
  constexpr int kElems = kVectorElems<kDType>;
  const int64_t step = int64_t{num_threads} * 16;
  for (int64_t at = thread * 16; at < row_bytes; at += kColumns * step) {
    float sum[kColumns][kElems] = {};
    for (int first = 0; first < num_rows; first += kRows) {
      int4 bits[kRows][kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i < num_rows) {
          const char* row = list.rows[first + i];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (at + c * step < row_bytes) {
              bits[i][c] = ptx::ld_global_no_allocate_v4(row + at + c * step);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i < num_rows) {
          const float weight = kWeighted ? list.weights[first + i] : 1.0f;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            float values[kElems];
            Unpack<kDType>(bits[i][c], values);
#pragma unroll
            for (int e = 0; e < kElems; ++e) {
              const float term = kWeighted ? __fmul_rn(weight, values[e]) : values[e];
              sum[c][e] = __fadd_rn(sum[c][e], term);
            }
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (at + c * step < row_bytes) ptx::st_global_v4(out + at + c * step, Pack<kDType>(sum[c]));
    }
  }
}

}  // namespace wideep
