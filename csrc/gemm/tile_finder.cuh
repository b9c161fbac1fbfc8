// From the number of a tile to the tile; see schedule.h.
#pragma once

#include <cstdint>

#include "csrc/gemm/schedule.h"

namespace wideep {

/// Looks up tiles for one warp; numbers must not decrease from call to call.
class TileFinder {
 public:
  __device__ TileFinder(const TileTable* table, int32_t num_groups, const TileGrid& grid)
      : groups_(table->groups()),
        num_groups_(num_groups),
        num_tiles_(table->num_tiles),
        grid_(grid) {}

  /// Called by a whole warp with the same number; `cluster_columns`: columns of a cluster's tile.
  __device__ Tile Find(int32_t number, int32_t cluster_columns, int lane) {
    Tile tile = {};
    tile.group = -1;
    if (number >= num_tiles_) return tile;
    // The group is the last one that begins at or before the tile; a lane each looks at 32 groups.
    while (true) {
      const int32_t group = first_group_ + lane;
      const bool after = group >= num_groups_ || groups_[group].tile_begin > number;
      const uint32_t lanes_after = __ballot_sync(~0u, after);
      if (lanes_after != 0) {
        first_group_ += __ffs(lanes_after) - 2;
        break;
      }
      first_group_ += 31;  // the last of these may be the one: look at it again
    }
    const GroupTiles group = groups_[first_group_];
    tile.group = group.group;
    tile.group_row_begin = group.row_begin;
    tile.group_num_rows = group.num_rows;

    const int32_t output_rows = grid_.OutputRows(group.num_rows);
    const int32_t row_tiles = grid_.RowTiles(group.num_rows);
    const int32_t tile_rows = grid_.TileRows(group.num_rows);
    const int32_t in_group = number - group.tile_begin;
    const int32_t band = in_group / (kBandTiles * grid_.column_tiles);
    const int32_t in_band = in_group - band * kBandTiles * grid_.column_tiles;
    const int32_t band_rows = min(kBandTiles, row_tiles - band * kBandTiles);
    const int32_t column_tile = in_band / band_rows;
    tile.row_in_group = (band * kBandTiles + in_band - column_tile * band_rows) * tile_rows;
    tile.num_rows = min(tile_rows, output_rows - tile.row_in_group);
    tile.column = column_tile * cluster_columns;
    return tile;
  }

 private:
  const GroupTiles* groups_;
  int32_t num_groups_;
  int32_t num_tiles_;
  TileGrid grid_;
  int32_t first_group_ = 0;
};

}  // namespace wideep
