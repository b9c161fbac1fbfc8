// Checks, tensor maps and launches.
#include "csrc/gemm/grouped_matmul.h"

#include <cuda_runtime_api.h>

#include <limits>
#include <string>

#include "csrc/gemm/product.h"
#include "csrc/gemm/schedule.h"
#include "csrc/gemm/tensor_map.h"

namespace wideep {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - 256;

Status CheckCuda(const char* op, const char* call, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string(op) + ": " + call + ": " + cudaGetErrorString(error));
}

Status CheckArguments(const char* op, const RowGroups& groups, DType dtype, DType out_dtype,
                      int64_t k, int64_t n) {
  const auto invalid = [&](const std::string& what) {
    return Status::InvalidArgument(std::string(op) + ": " + what);
  };
  if (dtype != DType::kBF16 && dtype != DType::kF16)
    return invalid("operands must be bfloat16 or float16");
  if (out_dtype != dtype && out_dtype != DType::kF32) {
    return invalid("the output must have the operands' type or float32");
  }
  for (const int64_t size : {k, n}) {
    if (size < 0 || size % 8 != 0 || size > kMaxRows) {
      return invalid("k and n must be multiples of 8, got " + std::to_string(k) + " and " +
                     std::to_string(n));
    }
  }
  if (groups.num_rows < 0 || groups.num_rows > kMaxRows) {
    return invalid("rows must number at most " + std::to_string(kMaxRows) + ", got " +
                   std::to_string(groups.num_rows));
  }
  if (groups.slab_rows > 0 && groups.slab_rows * groups.num_groups != groups.num_rows) {
    return invalid("slabs of " + std::to_string(groups.slab_rows) + " rows for " +
                   std::to_string(groups.num_groups) + " groups do not make " +
                   std::to_string(groups.num_rows) + " rows");
  }
  return Status();
}

/// Multiprocessors of the current device, if it is one that the kernels are for.
Status FindMultiprocessors(const char* op, int* num_sms) {
  int device = 0;
  int major = 0;
  Status status = CheckCuda(op, "cudaGetDevice", cudaGetDevice(&device));
  if (status.ok()) {
    status = CheckCuda(op, "compute capability",
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  }
  if (status.ok()) {
    status = CheckCuda(op, "multiprocessors",
                       cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device));
  }
  if (status.ok() && major != 9) {
    return Status::FailedPrecondition(std::string(op) +
                                      ": needs compute capability 9.0, this device has " +
                                      std::to_string(major) + ".x");
  }
  return status;
}

TileGrid GridOf(const TileShape& tile, int64_t columns) {
  TileGrid grid = {};
  grid.rows_are_ragged = true;
  grid.max_tile_rows = kMaxTileRows;
  grid.row_step = tile.row_step;
  const int64_t cluster_columns = int64_t{kTileColumns} * kClusterSize;
  grid.column_tiles = static_cast<int32_t>((columns + cluster_columns - 1) / cluster_columns);
  return grid;
}

Status SetUpTiles(const RowGroups& groups, const ProductParams& product, cudaStream_t stream) {
  SetUpTilesParams setup = {};
  setup.group_sizes = groups.group_sizes;
  setup.num_groups = product.num_groups;
  setup.num_rows = product.num_rows;
  setup.slab_rows = product.slab_rows;
  setup.grid = product.grid;
  setup.table = product.table;
  return LaunchSetUpTiles(setup, stream);
}

ProductParams CommonParams(const RowGroups& groups, void* workspace) {
  ProductParams product = {};
  product.table = static_cast<TileTable*>(workspace);
  product.num_groups = static_cast<int32_t>(groups.num_groups);
  product.num_rows = static_cast<int32_t>(groups.num_rows);
  product.slab_rows = static_cast<int32_t>(groups.slab_rows);
  return product;
}

}  // namespace

size_t GroupedMatmulWorkspaceBytes(int64_t num_groups) {
  return sizeof(TileTable) + static_cast<size_t>(num_groups) * sizeof(GroupTiles);
}

Status LaunchGroupedMatmul(const GroupedMatmulParams& p, cudaStream_t stream) {
  constexpr char kOp[] = "grouped_matmul";
  Status status = CheckArguments(kOp, p.groups, p.dtype, p.out_dtype, p.k, p.n);
  if (!status.ok()) return status;
  const int64_t depth = p.transpose_w ? p.n : p.k;
  const int64_t columns = p.transpose_w ? p.k : p.n;
  const RowGroups& groups = p.groups;
  if (groups.num_rows == 0 || columns == 0) return Status();
  if (groups.num_groups == 0 || depth == 0) {
    const size_t out_bytes = static_cast<size_t>(groups.num_rows) * columns * SizeOf(p.out_dtype);
    return CheckCuda(kOp, "cudaMemsetAsync", cudaMemsetAsync(p.out, 0, out_bytes, stream));
  }
  int num_sms = 0;
  if (status = FindMultiprocessors(kOp, &num_sms); !status.ok()) return status;

  const Product kind = p.transpose_w ? Product::kInputGrad : Product::kForward;
  const TileShape tile = TileShapeOf(kind);
  ProductParams product = CommonParams(groups, p.workspace);
  product.grid = GridOf(tile, columns);
  product.depth = static_cast<int32_t>(depth);
  product.out = p.out;
  product.out_columns = static_cast<int32_t>(columns);
  product.zero_tail = p.zero_tail;

  status = EncodeTensorMap({p.w, p.dtype, p.n, p.k, groups.num_groups, 64, true},
                           &product.column_operand);
  if (!status.ok()) return status;
  status = EncodeTensorMap({p.rows, p.dtype, depth, groups.num_rows, 1, tile.row_box, false},
                           &product.row_operand);
  if (!status.ok()) return status;
  status = EncodeTensorMap(
      {p.out, p.out_dtype, columns, groups.num_rows, 1, ChunkRows(p.out_dtype), true},
      &product.output);
  if (!status.ok()) return status;
  if (status = SetUpTiles(groups, product, stream); !status.ok()) return status;
  const ProductTypes types = {p.dtype, p.out_dtype};
  return p.transpose_w ? LaunchInputGrad(types, product, num_sms, stream)
                       : LaunchForward(types, product, num_sms, stream);
}

Status LaunchGroupedMatmulWeightGrad(const GroupedMatmulWeightGradParams& p, cudaStream_t stream) {
  constexpr char kOp[] = "grouped_matmul's weight gradient";
  Status status = CheckArguments(kOp, p.groups, p.dtype, p.out_dtype, p.k, p.n);
  if (!status.ok()) return status;
  const RowGroups& groups = p.groups;
  if (groups.num_groups == 0 || p.k == 0 || p.n == 0) return Status();
  if (groups.num_rows == 0) {
    const size_t dw_bytes =
        static_cast<size_t>(groups.num_groups) * p.k * p.n * SizeOf(p.out_dtype);
    return CheckCuda(kOp, "cudaMemsetAsync", cudaMemsetAsync(p.dw, 0, dw_bytes, stream));
  }
  int num_sms = 0;
  if (status = FindMultiprocessors(kOp, &num_sms); !status.ok()) return status;

  const TileShape tile = TileShapeOf(Product::kWeightGrad);
  ProductParams product = CommonParams(groups, p.workspace);
  product.grid = GridOf(tile, p.n);
  product.grid.rows_are_ragged = false;
  product.grid.fixed_rows = static_cast<int32_t>(p.k);
  product.out = p.dw;
  product.out_columns = static_cast<int32_t>(p.n);

  status = EncodeTensorMap({p.dout, p.dtype, p.n, groups.num_rows, 1, 64, false},
                           &product.column_operand);
  if (!status.ok()) return status;
  status = EncodeTensorMap({p.rows, p.dtype, p.k, groups.num_rows, 1, tile.row_box, false},
                           &product.row_operand);
  if (!status.ok()) return status;
  status = EncodeTensorMap(
      {p.dw, p.out_dtype, p.n, p.k, groups.num_groups, ChunkRows(p.out_dtype), true},
      &product.output);
  if (!status.ok()) return status;
  if (status = SetUpTiles(groups, product, stream); !status.ok()) return status;
  return LaunchWeightGrad({p.dtype, p.out_dtype}, product, num_sms, stream);
}

}  // namespace wideep
