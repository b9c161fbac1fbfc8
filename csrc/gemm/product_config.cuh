// What the parts of the product kernel have in common: sizes, shared memory, waiting for each
// other.
#pragma once

#include <cstdint>

#include "csrc/core/ptx.h"
#include "csrc/gemm/product.h"
#include "csrc/gemm/schedule.h"

namespace wideep {

template <typename T_, typename Out_, Product kProduct_>
struct ProductConfig {
  using T = T_;
  using Out = Out_;
  static constexpr Product kProduct = kProduct_;
  static constexpr TileShape kTile = TileShapeOf(kProduct);
  static constexpr int kRowStep = kTile.row_step;
  /// Pieces of depth under way at once.
  static constexpr int kColumnStages = 4;
  static constexpr int kRowStages = 4;

  static constexpr int kTileDepth = 64;
  static constexpr int kConsumerWarpgroups = 2;
  static constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
  static constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);
  static constexpr int kSlots = 2;

  /// Whether an operand is contiguous across depth rather than along it.
  static constexpr bool kColumnsContiguous = kProduct != Product::kInputGrad;
  static constexpr bool kRowsContiguous = kProduct == Product::kWeightGrad;
  static constexpr bool kRaggedDepth = kProduct == Product::kWeightGrad;

  static constexpr int kColumnBoxBytes = 64 * 64 * 2;  // what one consumer warpgroup multiplies
  static constexpr int kColumnBytes = kConsumerWarpgroups * kColumnBoxBytes;
  /// A box of the row operand covers row_box rows x 64 of depth.
  static constexpr int kRowsOfBox = kTile.row_box;
  static constexpr int kRowBoxBytes = kRowsOfBox * 64 * 2;
  static constexpr int kRowBytes = kMaxTileRows * 64 * 2;
  static constexpr int kChunkRows = ChunkRows(sizeof(Out) == 4 ? DType::kF32 : DType::kBF16);

  static_assert(!kRowsContiguous || (kRowsOfBox == 64 && kRowStep % 64 == 0));
  static_assert(kMaxTileRows % kRowStep == 0 && kRowStep % 16 == 0 && kRowBoxBytes % 1024 == 0);
};

/// Dynamic shared memory of a block; the base is aligned to 1024 bytes, as the 128-byte swizzle
/// asks.
template <typename Config>
struct ProductSharedMemory {
  alignas(1024) uint8_t columns[Config::kColumnStages][Config::kColumnBytes];
  uint8_t rows[Config::kRowStages][Config::kRowBytes];
  uint8_t staging[Config::kConsumerWarpgroups][2][kChunkBytes];
  Tile slots[Config::kSlots];
  uint64_t columns_full[Config::kColumnStages];
  uint64_t columns_empty[Config::kColumnStages];
  uint64_t rows_full[Config::kRowStages];
  uint64_t rows_empty[Config::kRowStages];
  uint64_t slot_full[Config::kSlots];
  uint64_t slot_empty[Config::kSlots];
};

/// Bytes to ask for: the base that CUDA gives is aligned to 16 only.
template <typename Config>
constexpr int kProductSharedBytes = sizeof(ProductSharedMemory<Config>) + 1024 - 16;

/// A place in a ring and the parity of the phase it is in.
template <int kLength>
struct RingPosition {
  int index = 0;
  uint32_t parity = 0;

  __device__ void Advance() {
    if (++index == kLength) {
      index = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ void WaitInBlock(const uint64_t& barrier, uint32_t parity) {
  const uint32_t address = ptx::SharedAddress(&barrier);
  while (!ptx::mbarrier_try_wait_parity_acquire_cta(address, parity)) {
  }
}

/// Until what other blocks of the cluster sent has arrived.
__device__ __forceinline__ void WaitForCluster(const uint64_t& barrier, uint32_t parity) {
  const uint32_t address = ptx::SharedAddress(&barrier);
  while (!ptx::mbarrier_try_wait_parity_acquire_cluster(address, parity)) {
  }
}

/// Until every reader in the cluster has let go of a place. They have published nothing, so there
/// is nothing to acquire.
__device__ __forceinline__ void WaitUntilFree(const uint64_t& barrier, uint32_t parity) {
  const uint32_t address = ptx::SharedAddress(&barrier);
  while (!ptx::mbarrier_try_wait_parity_relaxed_cluster(address, parity)) {
  }
}

/// Lets go of a place that was read, towards block `rank`, which fills it.
__device__ __forceinline__ void Release(const uint64_t& barrier, uint32_t rank) {
  ptx::mbarrier_arrive_relaxed_cluster(
      ptx::mapa_shared_cluster(ptx::SharedAddress(&barrier), rank));
}

/// Lets go of a place that this block fills.
__device__ __forceinline__ void ReleaseHere(const uint64_t& barrier) {
  ptx::mbarrier_arrive_release_cta(ptx::SharedAddress(&barrier));
}

/// The tiles of this block's cluster, one after the other, as loaders and consumers see them.
template <typename Config>
class TileStream {
 public:
  __device__ explicit TileStream(ProductSharedMemory<Config>& smem) : smem_(smem) {}

  /// Called by a whole warp; false once no tile is left.
  __device__ bool Next(Tile* tile, int lane) {
    WaitForCluster(smem_.slot_full[slot_.index], slot_.parity);
    *tile = smem_.slots[slot_.index];
    __syncwarp();
    if (lane == 0) Release(smem_.slot_empty[slot_.index], 0);
    slot_.Advance();
    return tile->group >= 0;
  }

 private:
  ProductSharedMemory<Config>& smem_;
  RingPosition<Config::kSlots> slot_;
};

template <typename Config>
__device__ __forceinline__ int DepthOf(const Tile& tile, const ProductParams& p) {
  return Config::kRaggedDepth ? tile.group_num_rows : p.depth;
}

template <typename Config>
__device__ __forceinline__ int DepthBlocks(const Tile& tile, const ProductParams& p) {
  return (DepthOf<Config>(tile, p) + Config::kTileDepth - 1) / Config::kTileDepth;
}

/// Rows of the tile that are computed: those it has, rounded up.
template <typename Config>
__device__ __forceinline__ int ComputedRows(const Tile& tile) {
  return (tile.num_rows + Config::kRowStep - 1) / Config::kRowStep * Config::kRowStep;
}

}  // namespace wideep
