// SwiGLU between the two products of an expert, on the rows of groups only: the buffer has room for
// many times the rows that it usually holds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"
#include "csrc/gemm/grouped_matmul.h"

namespace wideep {

/// out = silu(gate) * up, in float32, rounded once. Rows that belong to no group are neither read
/// nor written.
struct SwigluParams {
  RowGroups groups;
  /// kBF16 or kF16.
  DType dtype = DType::kBF16;
  /// A multiple of 8.
  int64_t ffn = 0;
  /// Device memory, aligned to 16 bytes.
  const void* hidden = nullptr;  // [num_rows, 2 * ffn], gate | up
  void* out = nullptr;           // [num_rows, ffn]
};

/// The gradient of hidden, given out's.
struct SwigluGradParams {
  RowGroups groups;
  DType dtype = DType::kBF16;
  int64_t ffn = 0;
  const void* hidden = nullptr;  // [num_rows, 2 * ffn]
  const void* dout = nullptr;    // [num_rows, ffn]
  void* dhidden = nullptr;       // [num_rows, 2 * ffn]
};

Status LaunchSwiglu(const SwigluParams& params, cudaStream_t stream);
Status LaunchSwigluGrad(const SwigluGradParams& params, cudaStream_t stream);

}  // namespace wideep
