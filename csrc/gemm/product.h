// The three products, as the host launches them; product_kernel.cuh computes them.
#pragma once

#include <cuda.h>  // types only: the driver library is not linked
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/status.h"
#include "csrc/gemm/schedule.h"

namespace wideep {

enum class Product { kForward, kInputGrad, kWeightGrad };

// The sizes below were measured against others on an H200: docs/performance_gemm.md.

/// Columns of a block's tile.
constexpr int kTileColumns = 128;

/// Columns that go through one buffer of a warpgroup's output at a time, and that buffer.
constexpr int kChunkColumns = 64;
constexpr int kChunkBytes = 8192;

/// Rows of the output that one copy takes.
constexpr int ChunkRows(DType out) {
  return kChunkBytes / (kChunkColumns * static_cast<int>(SizeOf(out)));
}

/// Most rows of a tile.
constexpr int kMaxTileRows = 256;

struct TileShape {
  /// Rows of a tile are computed in multiples of this.
  int row_step;
  /// Rows of the row operand that one copy brings.
  int row_box;
};

/// Where rows are what is contiguous, a box is 64 of them wide, and so is a step.
constexpr TileShape TileShapeOf(Product product) {
  return product == Product::kWeightGrad ? TileShape{64, 64} : TileShape{16, 32};
}

/// Blocks of a cluster, side by side.
constexpr int kClusterSize = 2;

struct ProductParams {
  /// Box of 64 x 64.
  CUtensorMap column_operand;
  /// Box of 64 x row_box.
  CUtensorMap row_operand;
  /// Of out: box of 128 bytes x ChunkRows.
  CUtensorMap output;
  TileTable* table;
  TileGrid grid;
  int32_t num_groups;
  /// Length of the contraction; weight gradient: unused, it is the group's row count.
  int32_t depth;
  /// [.., out_columns], T or f32, row-major and dense.
  void* out;
  int32_t out_columns;
  /// Rows of the output that a filler has to clear; see RowGroups. Not used by the weight gradient.
  bool zero_tail;
  int32_t num_rows;
  int32_t slab_rows;
};

/// operands: kBF16 or kF16; out: the same or kF32.
struct ProductTypes {
  DType operands;
  DType out;
};

Status LaunchForward(const ProductTypes& types, const ProductParams& params, int num_sms,
                     cudaStream_t stream);
Status LaunchInputGrad(const ProductTypes& types, const ProductParams& params, int num_sms,
                       cudaStream_t stream);
Status LaunchWeightGrad(const ProductTypes& types, const ProductParams& params, int num_sms,
                        cudaStream_t stream);

}  // namespace wideep
