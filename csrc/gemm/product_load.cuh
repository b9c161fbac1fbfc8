// Scheduler and loaders of the product kernel; see product_kernel.cuh.
#pragma once

#include <cstdint>

#include "csrc/core/ptx.h"
#include "csrc/gemm/product_config.cuh"
#include "csrc/gemm/tile_finder.cuh"

namespace wideep {

// ---- scheduler ----

/// One warp: the tile to its slot in every block of the cluster.
template <typename Config>
__device__ __forceinline__ void SendTile(ProductSharedMemory<Config>& smem, int slot,
                                         const Tile& tile, int lane) {
  if (lane < kClusterSize) {
    const uint32_t barrier =
        ptx::mapa_shared_cluster(ptx::SharedAddress(&smem.slot_full[slot]), lane);
    const uint32_t place = ptx::mapa_shared_cluster(ptx::SharedAddress(&smem.slots[slot]), lane);
    ptx::mbarrier_arrive_expect_tx_release_cluster(barrier, sizeof(Tile));
    const int4 first = {tile.group, tile.row_in_group, tile.num_rows, tile.column};
    const int4 second = {tile.group_row_begin, tile.group_num_rows, 0, 0};
    ptx::st_async_cluster_v4(place, first, barrier);
    ptx::st_async_cluster_v4(place + sizeof first, second, barrier);
  }
}

template <typename Config>
__device__ __forceinline__ void ScheduleTiles(ProductSharedMemory<Config>& smem,
                                              const ProductParams& p, int lane) {
  TileFinder finder(p.table, p.num_groups, p.grid);
  RingPosition<Config::kSlots> slot;
  Tile tile;
  do {
    int32_t number = 0;
    if (lane == 0) number = atomicAdd(&p.table->next_tile, 1u);
    number = __shfl_sync(~0u, number, 0);
    tile = finder.Find(number, kTileColumns * kClusterSize, lane);
    WaitUntilFree(smem.slot_empty[slot.index], slot.parity ^ 1);
    SendTile(smem, slot.index, tile, lane);
    slot.Advance();
  } while (tile.group >= 0);
}

// ---- loaders ----

/// The column operand of one warpgroup: 64 columns from `column`, 64 of depth from `depth`.
template <typename Config>
__device__ __forceinline__ void LoadColumns(uint32_t place, uint32_t barrier,
                                            const ProductParams& p, const Tile& tile, int column,
                                            int depth) {
  if constexpr (Config::kProduct == Product::kForward) {
    ptx::cp_async_bulk_tensor_3d_load(place, &p.column_operand, column, depth, tile.group, barrier);
  } else if constexpr (Config::kProduct == Product::kInputGrad) {
    ptx::cp_async_bulk_tensor_3d_load(place, &p.column_operand, depth, column, tile.group, barrier);
  } else {
    ptx::cp_async_bulk_tensor_2d_load(place, &p.column_operand, column,
                                      tile.group_row_begin + depth, barrier);
  }
}

/// One box of the row operand, from row `row` of the tile, to every block of the cluster.
template <typename Config>
__device__ __forceinline__ void LoadRows(uint32_t place, uint32_t barrier, const ProductParams& p,
                                         const Tile& tile, int row, int depth) {
  const int row_in_group = tile.row_in_group + row;
  const int x = Config::kRowsContiguous ? row_in_group : depth;
  const int y = tile.group_row_begin + (Config::kRowsContiguous ? depth : row_in_group);
  constexpr uint16_t kEveryBlock = (1 << kClusterSize) - 1;
  ptx::cp_async_bulk_tensor_2d_load_multicast(place, &p.row_operand, x, y, barrier, kEveryBlock);
}

/// One warp, whose first lane issues the copies: the column operand of every tile.
template <typename Config>
__device__ __forceinline__ void LoadColumnsOfTiles(ProductSharedMemory<Config>& smem,
                                                   const ProductParams& p, uint32_t block_rank,
                                                   int lane) {
  TileStream<Config> tiles(smem);
  RingPosition<Config::kColumnStages> stage;
  Tile tile;
  while (tiles.Next(&tile, lane)) {
    const int column = tile.column + block_rank * kTileColumns;
    const int depth_blocks = lane == 0 ? DepthBlocks<Config>(tile, p) : 0;
    for (int block = 0; block < depth_blocks; ++block) {
      WaitInBlock(smem.columns_empty[stage.index], stage.parity ^ 1);
      const uint32_t barrier = ptx::SharedAddress(&smem.columns_full[stage.index]);
      const uint32_t place = ptx::SharedAddress(smem.columns[stage.index]);
      ptx::mbarrier_arrive_expect_tx_release_cta(barrier, Config::kColumnBytes);
      for (int warpgroup = 0; warpgroup < Config::kConsumerWarpgroups; ++warpgroup) {
        LoadColumns<Config>(place + warpgroup * Config::kColumnBoxBytes, barrier, p, tile,
                            column + warpgroup * 64, block * Config::kTileDepth);
      }
      stage.Advance();
    }
    __syncwarp();
  }
}

/// One warp, whose first lane issues the copies: this block's share of the row operand of every
/// tile.
template <typename Config>
__device__ __forceinline__ void LoadRowsOfTiles(ProductSharedMemory<Config>& smem,
                                                const ProductParams& p, uint32_t block_rank,
                                                int lane) {
  TileStream<Config> tiles(smem);
  RingPosition<Config::kRowStages> stage;
  Tile tile;
  while (tiles.Next(&tile, lane)) {
    const int row_boxes =
        (ComputedRows<Config>(tile) + Config::kRowsOfBox - 1) / Config::kRowsOfBox;
    const int depth_blocks = lane == 0 ? DepthBlocks<Config>(tile, p) : 0;
    for (int block = 0; block < depth_blocks; ++block) {
      WaitUntilFree(smem.rows_empty[stage.index], stage.parity ^ 1);
      const uint32_t barrier = ptx::SharedAddress(&smem.rows_full[stage.index]);
      const uint32_t place = ptx::SharedAddress(smem.rows[stage.index]);
      ptx::mbarrier_arrive_expect_tx_release_cta(barrier, row_boxes * Config::kRowBoxBytes);
      for (int box = block_rank; box < row_boxes; box += kClusterSize) {
        LoadRows<Config>(place + box * Config::kRowBoxBytes, barrier, p, tile,
                         box * Config::kRowsOfBox, block * Config::kTileDepth);
      }
      stage.Advance();
    }
    __syncwarp();
  }
}

}  // namespace wideep
