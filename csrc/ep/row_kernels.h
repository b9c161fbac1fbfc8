// What is done to single rows on the host: copy, weighted sum, dot product, FP8. Compiled once per
// instruction set from row_kernels.cc; all variants give the same bits (no contraction, fixed order
// of sums).
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/core/dtype.h"

namespace wideep {

/// Values that share one FP8 scale.
constexpr int64_t kQuantBlock = 128;

struct RowKernels {
  const char* isa;

  /// dst[0, bytes) = src[0, bytes). `stream`: past the cache, for data that is larger than it; call
  /// finish_streams before another thread reads. Rows must not overlap.
  void (*copy)(void* dst, const void* src, size_t bytes, bool stream);
  void (*finish_streams)();

  /// out[i] = sum over r, in order, of weights[r] * rows[r][i], in float32, rounded once to
  /// `dtype`. `weights` null: all ones.
  void (*weighted_sum)(DType dtype, void* out, const void* const* rows, const float* weights,
                       int num_rows, int64_t hidden);

  /// out[i] = weight * row[i], and returns the sum over i of row[i] * other[i] in float32.
  float (*scale_and_dot)(DType dtype, void* out, const void* row, float weight, const void* other,
                         int64_t hidden);

  /// FP8 e4m3fn with one float32 scale per kQuantBlock values; hidden is a multiple of kQuantBlock.
  ///   scale = max(max |x|, 1e-30) * (1/448),  q = round_to_nearest_even(x * (1/scale))
  /// A block that holds an infinity or a NaN dequantises to NaN throughout.
  void (*quantize)(DType dtype, uint8_t* q, float* scales, const void* row, int64_t hidden);

  /// out[i] = float32(q[i]) * scale of its block, rounded to `dtype`.
  void (*dequantize)(DType dtype, void* out, const uint8_t* q, const float* scales, int64_t hidden);
};

/// The widest variant that this processor runs. WIDEEP_ISA=portable|v3|v4 in the environment
/// overrides.
const RowKernels& SelectRowKernels();

/// All variants that this processor runs, widest last; for tests. Returns how many were written.
int ListRowKernels(const RowKernels** variants, int max_variants);

}  // namespace wideep
