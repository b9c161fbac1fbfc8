// FP8 block quantisation of rows on CUDA. The formula, and the bits for finite values, are those of
// row_kernels.h; denormals are values like others.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/host_device.h"
#include "csrc/core/status.h"
#include "csrc/ep/row_kernels.h"

namespace wideep {

/// A quantised row as it travels: hidden FP8 values, hidden / 128 float32 scales, zeros up to a
/// multiple of 16 bytes.
WIDEEP_HOST_DEVICE constexpr int64_t WireRowBytes(int64_t hidden) {
  return (hidden + hidden / kQuantBlock * 4 + 15) / 16 * 16;
}

struct QuantizeParams {
  DType dtype = DType::kBF16;  // of x
  int64_t num_tokens = 0;
  int64_t hidden = 0;  // a multiple of 128

  const void* x = nullptr;         // in  [num_tokens, hidden], 16-byte aligned
  void* q = nullptr;               // out hidden bytes a token, 8-byte aligned
  int64_t q_stride_bytes = 0;      // from one token to the next; a multiple of 8
  void* scales = nullptr;          // out hidden / 128 float32 a token
  int64_t scale_stride_bytes = 0;  // from one token to the next; a multiple of 4
  int64_t pad_bytes = 0;           // zeros after a token's scales; a multiple of 4
};

/// Rows as they travel: `wire` [num_tokens, row_stride_bytes], at least WireRowBytes(hidden).
inline QuantizeParams QuantizeToWire(DType dtype, const void* x, int64_t num_tokens, int64_t hidden,
                                     void* wire, int64_t row_stride_bytes) {
  QuantizeParams p;
  p.dtype = dtype;
  p.num_tokens = num_tokens;
  p.hidden = hidden;
  p.x = x;
  p.q = wire;
  p.q_stride_bytes = row_stride_bytes;
  p.scales = static_cast<char*>(wire) + hidden;
  p.scale_stride_bytes = row_stride_bytes;
  p.pad_bytes = row_stride_bytes - hidden - hidden / kQuantBlock * 4;
  return p;
}

/// Values and scales apart: q [num_tokens, hidden], scales [num_tokens, hidden / 128].
inline QuantizeParams QuantizeApart(DType dtype, const void* x, int64_t num_tokens, int64_t hidden,
                                    void* q, float* scales) {
  QuantizeParams p;
  p.dtype = dtype;
  p.num_tokens = num_tokens;
  p.hidden = hidden;
  p.x = x;
  p.q = q;
  p.q_stride_bytes = hidden;
  p.scales = scales;
  p.scale_stride_bytes = hidden / kQuantBlock * 4;
  return p;
}

Status LaunchQuantize(const QuantizeParams& params, cudaStream_t stream);

}  // namespace wideep
