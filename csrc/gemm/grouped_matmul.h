// Grouped matrix products on Hopper (sm_90a): each group's rows times its own matrix, and the
// gradients. Group sizes are read on the device; nothing here synchronises with the host, and every
// launch can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"

namespace wideep {

/// How a buffer of rows is divided among groups.
struct RowGroups {
  /// [num_groups], device memory. Negative sizes count as 0; what does not fit the buffer is cut
  /// off.
  const int32_t* group_sizes = nullptr;
  int64_t num_groups = 0;
  /// Rows of the buffer, all groups together and what is past them. At most 2^31 - 257.
  int64_t num_rows = 0;
  /// 0: groups lie one after the other. Otherwise group g begins at row g * slab_rows, and num_rows
  /// is num_groups * slab_rows.
  int64_t slab_rows = 0;
};

/// out[rows of g] = rows[rows of g] * w[g], or * transpose(w[g]); accumulated in float32.
struct GroupedMatmulParams {
  RowGroups groups;
  /// Of rows and w: kBF16 or kF16.
  DType dtype = DType::kBF16;
  /// dtype, or kF32.
  DType out_dtype = DType::kBF16;
  /// w is [num_groups, k, n], multiples of 8.
  int64_t k = 0, n = 0;
  /// false: rows [num_rows, k] -> out [num_rows, n]. true: rows [num_rows, n] -> out [num_rows, k].
  bool transpose_w = false;
  /// Writes zeros to the rows of out that belong to no group; otherwise those stay as they are.
  bool zero_tail = true;
  /// Device memory, aligned to 16 bytes.
  const void* rows = nullptr;
  const void* w = nullptr;
  void* out = nullptr;
  /// [GroupedMatmulWorkspaceBytes], device memory, aligned to 16 bytes; written anew by every
  /// launch.
  void* workspace = nullptr;
};

/// dw[g] = transpose(rows[rows of g]) * dout[rows of g]; zero for an empty group; accumulated in
/// float32.
struct GroupedMatmulWeightGradParams {
  RowGroups groups;
  /// Of rows and dout: kBF16 or kF16.
  DType dtype = DType::kBF16;
  /// dtype, or kF32.
  DType out_dtype = DType::kBF16;
  /// Multiples of 8.
  int64_t k = 0, n = 0;
  const void* rows = nullptr;  // [num_rows, k]
  const void* dout = nullptr;  // [num_rows, n]
  void* dw = nullptr;          // [num_groups, k, n]
  void* workspace = nullptr;   // as in GroupedMatmulParams
};

/// The scratch memory of one launch; two launches that may overlap need one each.
/// jax_wideep/_kernels.py knows this size too, for its shape rule.
size_t GroupedMatmulWorkspaceBytes(int64_t num_groups);

Status LaunchGroupedMatmul(const GroupedMatmulParams& params, cudaStream_t stream);
Status LaunchGroupedMatmulWeightGrad(const GroupedMatmulWeightGradParams& params,
                                     cudaStream_t stream);

}  // namespace wideep
