// The kernel that turns group sizes into a TileTable.
#include <string>

#include "csrc/gemm/schedule.h"

namespace wideep {
namespace {

template <typename T>
__device__ inline T WarpPrefixSum(T value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

/// Where the rows of 32 groups lie, one a lane; `row_end` runs along. Sizes may be anything, so
/// sums are kept in 64 bits until they are cut to the buffer.
__device__ inline GroupTiles PlaceRows(const SetUpTilesParams& p, int32_t group, int lane,
                                       int32_t& row_end) {
  const bool exists = group < p.num_groups;
  const int32_t room = p.slab_rows > 0 ? p.slab_rows : p.num_rows;
  const int32_t wanted = exists ? min(max(p.group_sizes[group], 0), room) : 0;
  GroupTiles tiles = {};
  tiles.group = group;
  if (p.slab_rows > 0) {
    tiles.row_begin = exists ? group * p.slab_rows : 0;
    tiles.num_rows = wanted;
    return tiles;
  }
  const auto cut = [&](int64_t row) { return static_cast<int32_t>(min(row, int64_t{p.num_rows})); };
  const int64_t wanted_end = row_end + WarpPrefixSum(int64_t{wanted}, lane);
  tiles.row_begin = cut(wanted_end - wanted);
  tiles.num_rows = cut(wanted_end) - tiles.row_begin;
  row_end = cut(__shfl_sync(~0u, wanted_end, 31));
  return tiles;
}

/// 0: the group's tiles take longest. Where depth is ragged, by the group's share of the rows.
__device__ inline int LengthClass(const SetUpTilesParams& p, int32_t group_rows) {
  const int64_t length = p.grid.rows_are_ragged ? p.grid.TileRows(group_rows) : group_rows;
  const int64_t long_length =
      p.grid.rows_are_ragged ? p.grid.max_tile_rows : 2 * int64_t{p.num_rows / p.num_groups} + 1;
  const int64_t quarters = length * kLengthClasses / long_length;
  return kLengthClasses - 1 - static_cast<int>(min(quarters, int64_t{kLengthClasses - 1}));
}

/// One warp; a pass over the groups for each class of length.
__global__ void __launch_bounds__(32) SetUpTilesKernel(const __grid_constant__ SetUpTilesParams p) {
  const int lane = threadIdx.x;
  int32_t row_end = 0;
  int32_t tile_end = 0;
  int32_t num_placed = 0;
  for (int length_class = 0; length_class < kLengthClasses; ++length_class) {
    row_end = 0;
    for (int32_t first = 0; first < p.num_groups; first += 32) {
      GroupTiles tiles = PlaceRows(p, first + lane, lane, row_end);
      const bool now = tiles.group < p.num_groups && LengthClass(p, tiles.num_rows) == length_class;
      const int32_t num_tiles = now ? p.grid.RowTiles(tiles.num_rows) * p.grid.column_tiles : 0;
      const int32_t tiles_through = WarpPrefixSum(num_tiles, lane);
      tiles.tile_begin = tile_end + tiles_through - num_tiles;
      const uint32_t lanes_now = __ballot_sync(~0u, now);
      const uint32_t lanes_before = lanes_now & ((1u << lane) - 1);
      if (now) p.table->groups()[num_placed + __popc(lanes_before)] = tiles;
      num_placed += __popc(lanes_now);
      tile_end += __shfl_sync(~0u, tiles_through, 31);
    }
  }
  if (lane == 0) {
    p.table->next_tile = 0;
    p.table->num_tiles = tile_end;
    p.table->rows_end = row_end;
    p.table->pad = 0;
  }
}

}  // namespace

Status LaunchSetUpTiles(const SetUpTilesParams& params, cudaStream_t stream) {
  SetUpTilesKernel<<<1, 32, 0, stream>>>(params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return Status::Internal(std::string("grouped_matmul: set-up kernel: ") +
                            cudaGetErrorString(error));
  }
  return Status();
}

}  // namespace wideep
