// Which tile of the output a cluster computes next.
//
// A launch is two kernels on one stream. SetUpTilesKernel, one warp, turns the group sizes into a
// TileTable: where each group's rows begin and how many tiles come before it. The product kernel is
// persistent: one warp of each cluster (the scheduler) draws tile numbers from the table's counter,
// looks the tile up and sends it to every block of the cluster through a small ring of slots in
// shared memory, ahead of its use. So groups of any size keep all multiprocessors busy without the
// host knowing them.
//
// Groups with the longest tiles come first, so that no multiprocessor is left with a long tile at
// the end; among tiles of about the same length, groups keep their order. Inside a group tiles go
// in bands of kBandTiles row tiles; inside a band, all row tiles of one column tile come before the
// next column tile. Tiles that run at the same time thereby share both operands in L2. A group's
// rows are cut into equal tiles, not into full ones and a rest.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/status.h"

namespace wideep {

/// A group, as the scheduler sees it.
struct GroupTiles {
  int32_t group;
  int32_t row_begin;
  int32_t num_rows;
  /// Tiles of all groups that come before this one.
  int32_t tile_begin;
};

/// The workspace of a launch.
struct alignas(16) TileTable {
  /// The next tile that nobody has drawn.
  uint32_t next_tile;
  int32_t num_tiles;
  /// First row after the last group, if groups lie one after the other.
  int32_t rows_end;
  int32_t pad;

  /// Every group once, in the order in which their tiles are drawn.
  __host__ __device__ GroupTiles* groups() { return reinterpret_cast<GroupTiles*>(this + 1); }
  __host__ __device__ const GroupTiles* groups() const {
    return reinterpret_cast<const GroupTiles*>(this + 1);
  }
};

/// How the output of one group is cut into tiles.
struct TileGrid {
  /// Rows of the output of a group: its own row count, or a constant (weight gradient).
  bool rows_are_ragged;
  int32_t fixed_rows;
  /// Most rows of a tile, and what the rows of a tile are rounded up to.
  int32_t max_tile_rows;
  int32_t row_step;
  /// Column tiles, each as wide as a whole cluster.
  int32_t column_tiles;

  __host__ __device__ int32_t OutputRows(int32_t group_rows) const {
    return rows_are_ragged ? group_rows : fixed_rows;
  }
  __host__ __device__ int32_t RowTiles(int32_t group_rows) const {
    return (OutputRows(group_rows) + max_tile_rows - 1) / max_tile_rows;
  }
  /// Rows of a tile of the group, the last one excepted.
  __host__ __device__ int32_t TileRows(int32_t group_rows) const {
    const int32_t row_tiles = RowTiles(group_rows);
    if (row_tiles == 0) return 0;
    const int32_t equal_rows = (OutputRows(group_rows) + row_tiles - 1) / row_tiles;
    return (equal_rows + row_step - 1) / row_step * row_step;
  }
};

/// Tiles are sorted into this many classes of length.
constexpr int kLengthClasses = 4;

struct SetUpTilesParams {
  const int32_t* group_sizes;
  int32_t num_groups;
  int32_t num_rows;
  int32_t slab_rows;
  TileGrid grid;
  TileTable* table;
};

/// One warp on `stream`.
Status LaunchSetUpTiles(const SetUpTilesParams& params, cudaStream_t stream);

/// What the blocks of a cluster are to compute: rows [row_begin, row_begin + num_rows) of group's
/// output.
struct alignas(16) Tile {
  /// -1: no tile is left.
  int32_t group;
  /// Of the tile, counted inside the group's output.
  int32_t row_in_group;
  int32_t num_rows;
  /// Of the cluster's first block.
  int32_t column;
  /// The group's rows in the buffer of rows.
  int32_t group_row_begin;
  int32_t group_num_rows;
  int32_t pad[2];
};
static_assert(sizeof(Tile) == 32);

constexpr int32_t kBandTiles = 8;

}  // namespace wideep
