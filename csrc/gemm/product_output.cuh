// From accumulators to the output; see product_kernel.cuh.
//
// Each consumer warpgroup has two buffers in shared memory and sends its 64 columns through them,
// some rows (a chunk) at a time. The copy engine takes whole chunks from there while the warpgroup
// goes on, into the next tile if need be. A chunk in which the group's rows end goes by ordinary
// stores, since the rows after them belong to the next group; the ends of the array itself the copy
// engine knows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/core/ptx.h"
#include "csrc/gemm/product_config.cuh"

namespace wideep {

constexpr uint32_t kWarpgroupBarrier = 2;  // and 3

/// Where a warpgroup's part of a tile goes.
template <typename Out>
struct OutputTile {
  Out* out;
  int64_t row_stride_elems;
  /// Of the group's rows and of the output's columns, how many there are from here on.
  int num_rows;
  int num_columns;
  /// The same place in the output's tensor map.
  int x, y, z;
};

template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

/// Where 16-byte piece `piece` of a row lies in a chunk [kChunkRows, 64]: in boxes of 128 bytes a
/// row, pieces permuted by row % 8. So the copy engine wants it, and neither writing nor reading
/// conflicts in banks.
template <typename Config>
__device__ __forceinline__ int PieceOffset(int row, int piece) {
  return piece / 8 * Config::kChunkRows * 128 + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

/// Accumulators of rows [kFirstRow, kFirstRow + kNumRows) -> a chunk.
template <typename Config, int kFirstRow, int kNumRows, int kAcc>
__device__ __forceinline__ void StageChunk(uint8_t* chunk, const float (&acc)[kAcc], int thread) {
  using Out = typename Config::Out;
  const int warp = thread / 32;
  const int lane = thread % 32;
  if constexpr (sizeof(Out) == 2) {
    // Matrices: rows 0-7 and 8-15 of the output, columns 0-7 and 8-15 of the warp's 16.
    const int row = lane / 16 * 8 + lane % 8;
    const uint32_t place =
        ptx::SharedAddress(chunk) + PieceOffset<Config>(row, warp * 2 + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < kNumRows; i += 16) {
      const int first = (kFirstRow + i) / 2;
      ptx::stmatrix_x4_trans(place + i * 128, Pack<Out>(acc[first], acc[first + 1]),
                             Pack<Out>(acc[first + 2], acc[first + 3]),
                             Pack<Out>(acc[first + 4], acc[first + 5]),
                             Pack<Out>(acc[first + 6], acc[first + 7]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNumRows / 2; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int column = warp * 16 + i / 2 % 2 * 8 + lane / 4;
      float* const piece = reinterpret_cast<float*>(chunk + PieceOffset<Config>(row, column / 4));
      piece[column % 4] = acc[kFirstRow / 2 + i];
    }
  }
}

/// Part of a chunk -> the output, by ordinary stores.
template <typename Config>
__device__ __forceinline__ void CopyChunk(const uint8_t* chunk,
                                          const OutputTile<typename Config::Out>& tile,
                                          int first_row, int thread) {
  constexpr int kPerPiece = 16 / sizeof(typename Config::Out);
  constexpr int kPieces = 64 / kPerPiece;
  for (int i = thread; i < Config::kChunkRows * kPieces; i += 128) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    if (first_row + row < tile.num_rows && piece * kPerPiece < tile.num_columns) {
      *reinterpret_cast<uint4*>(tile.out + (first_row + row) * tile.row_stride_elems +
                                piece * kPerPiece) =
          *reinterpret_cast<const uint4*>(chunk + PieceOffset<Config>(row, piece));
    }
  }
}

/// One thread: a whole chunk -> the output, by the copy engine.
template <typename Config>
__device__ __forceinline__ void StoreChunk(const uint8_t* chunk, const void* output_map,
                                           const OutputTile<typename Config::Out>& tile,
                                           int first_row) {
  constexpr int kBoxColumns = 128 / sizeof(typename Config::Out);
#pragma unroll
  for (int box = 0; box < 64 / kBoxColumns; ++box) {
    ptx::cp_async_bulk_tensor_3d_store(output_map, tile.x + box * kBoxColumns, tile.y + first_row,
                                       tile.z,
                                       ptx::SharedAddress(chunk + box * Config::kChunkRows * 128));
  }
}

/// What of rows [kFirstRow, kFirstRow + kChunkRows) the tile has, if any -> a buffer.
template <typename Config, int kRows, int kFirstRow>
__device__ __forceinline__ void StageRows(uint8_t* chunk, const float (&acc)[kRows / 2],
                                          int thread) {
  constexpr int kRowsLeft = kRows - kFirstRow;
  constexpr int kNumRows = kRowsLeft < Config::kChunkRows ? kRowsLeft : Config::kChunkRows;
  if constexpr (kNumRows > 0) StageChunk<Config, kFirstRow, kNumRows>(chunk, acc, thread);
}

/// Two chunks at a time, from row kFirstRow on.
template <typename Config, int kRows, int kFirstRow = 0>
__device__ __forceinline__ void WriteTile(ProductSharedMemory<Config>& smem,
                                          const float (&acc)[kRows / 2], const void* output_map,
                                          const OutputTile<typename Config::Out>& tile,
                                          int warpgroup, int thread) {
  if constexpr (kFirstRow < kRows) {
    constexpr int kChunkRows = Config::kChunkRows;
    auto& chunks = smem.staging[warpgroup];
    // What the copy engine was given last has left the buffers.
    if (thread == 0) ptx::cp_async_bulk_wait_group_read<0>();
    ptx::bar_sync(kWarpgroupBarrier + warpgroup, 128);
    StageRows<Config, kRows, kFirstRow>(chunks[0], acc, thread);
    StageRows<Config, kRows, kFirstRow + kChunkRows>(chunks[1], acc, thread);
    ptx::fence_proxy_async_shared_cta();
    ptx::bar_sync(kWarpgroupBarrier + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first_row = kFirstRow + i * kChunkRows;
      // In the weight gradient a group's rows end where the array's do.
      const bool whole = Config::kRaggedDepth || tile.num_rows - first_row >= kChunkRows;
      if (first_row >= kRows) continue;
      if (!whole) {
        CopyChunk<Config>(chunks[i], tile, first_row, thread);
      } else if (thread == 0) {
        StoreChunk<Config>(chunks[i], output_map, tile, first_row);
      }
    }
    if (thread == 0) ptx::cp_async_bulk_commit_group();
    WriteTile<Config, kRows, kFirstRow + 2 * kChunkRows>(smem, acc, output_map, tile, warpgroup,
                                                         thread);
  }
}

/// Before the block leaves: its shared memory goes with it.
__device__ __forceinline__ void FinishWrites(int thread) {
  if (thread == 0) ptx::cp_async_bulk_wait_group_read<0>();
}

}  // namespace wideep
