// The grouped product: one persistent, warp-specialised kernel for all three products.
//
//   product        output            depth      column operand        row operand
//   kForward       out  [rows, n]    k          w[g]  [k, n]          rows [rows, k]
//   kInputGrad     drows [rows, k]   n          w[g]  [k, n]          dout [rows, n]
//   kWeightGrad    dw[g] [k, n]      rows of g  dout  [rows, n]       rows [rows, k]
//
// Tensor cores compute the transpose of each output tile: output columns are wgmma's M (64 a
// warpgroup), output rows its N. N can be any multiple of 8, so a group costs its rows rounded up
// to 16 and not to 128, and few rows still stream the weights at full width. Operands are read as
// they lie: wgmma takes either of them contiguous along depth or across it.
//
// A block has a tile of kTileColumns columns and up to kMaxTileRows rows. The blocks of a cluster
// sit side by side: same rows, neighbouring columns. Each loads its own column operand, and a share
// of the row operand, which it multicasts to the others.
//
// Warps of a block, and who waits for whom:
// - Scheduler, in a cluster's first block: draws a tile, waits until its slot is free in every
//   block, sends it there.
// - Loader of columns: takes tiles from the slots; for every 64 of depth, waits until the block's
//   consumers have freed a stage, says how many bytes will come, issues the copies.
// - Loader of rows: the same, but waits for the consumers of every block of the cluster, since all
//   of them receive its multicasts. Two loaders, so that only rows wait for other blocks.
// - Filler: meanwhile writes zeros to the rows that belong to no group.
// - Two warpgroups of consumers: take the same tiles; wait until a stage of columns and one of rows
//   are full, multiply, free the ones before; then write the tile (product_output.cuh).
// Barriers of a stage or slot alternate in parity; nobody resets them. Blocks leave together, since
// a block that has left cannot receive.
//
// Rows past a group's end, inside a tile, belong to somebody else or to nobody and may hold
// anything. In the first two products they end up in output rows that are not written. In the
// weight gradient they are depth: consumers clear them in shared memory, in both operands, since
// NaN times zero is NaN.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/core/ptx.h"
#include "csrc/gemm/product.h"
#include "csrc/gemm/product_config.cuh"
#include "csrc/gemm/product_load.cuh"
#include "csrc/gemm/product_output.cuh"

namespace wideep {
namespace {

// ---- fillers ----

/// Zeros to rows [begin, end) of the output, by all fillers of the grid.
template <typename Config>
__device__ __forceinline__ void ZeroRows(const ProductParams& p, int64_t begin, int64_t end,
                                         int filler, int num_fillers) {
  constexpr int kPerStore = 16 / sizeof(typename Config::Out);
  const int64_t first = begin * p.out_columns / kPerStore;
  const int64_t last = end * p.out_columns / kPerStore;
  uint4* out = static_cast<uint4*>(p.out);
#pragma unroll 1
  for (int64_t i = first + filler; i < last; i += num_fillers) out[i] = uint4{};
}

template <typename Config>
__device__ __forceinline__ void ZeroTail(const ProductParams& p, int filler, int num_fillers) {
  if (p.slab_rows == 0) {
    ZeroRows<Config>(p, p.table->rows_end, p.num_rows, filler, num_fillers);
    return;
  }
  for (int i = 0; i < p.num_groups; ++i) {
    const GroupTiles group = p.table->groups()[i];
    const int64_t slab_begin = group.row_begin;
    ZeroRows<Config>(p, slab_begin + group.num_rows, slab_begin + p.slab_rows, filler, num_fillers);
  }
}

// ---- consumers ----

constexpr uint32_t kBothWarpgroupsBarrier = 1;

/// wgmma's description of an operand in the 128-byte swizzle: where it begins; bytes from 8 lines
/// of 128 bytes to the next 8; bytes from 64 elements to the next 64 across depth, if it is
/// contiguous that way.
__device__ __forceinline__ uint64_t OperandDescriptor(uint32_t smem, uint32_t next_64_bytes) {
  constexpr uint64_t kSwizzle128B = uint64_t{1} << 62;
  constexpr uint64_t kNext8LinesBytes = 1024;
  return kSwizzle128B | (kNext8LinesBytes >> 4) << 32 | uint64_t{next_64_bytes >> 4} << 16 |
         (smem & 0x3FFFF) >> 4;
}

/// Clears lines [first_line, 64) of a box of 64 lines of 128 bytes; the swizzle stays inside a
/// line.
__device__ __forceinline__ void ClearLines(uint8_t* box, int first_line, int thread) {
  for (int i = first_line * 8 + thread; i < 64 * 8; i += 128)
    reinterpret_cast<uint4*>(box)[i] = uint4{};
}

/// Weight gradient: clears what the operands hold past the group's last row.
template <typename Config>
__device__ __forceinline__ void ClearPastGroup(uint8_t* columns, uint8_t* rows, int num_rows,
                                               int valid_depth, int warpgroup, int thread) {
  ClearLines(columns + warpgroup * Config::kColumnBoxBytes, valid_depth, thread);
  for (int box = warpgroup; box < num_rows / 64; box += Config::kConsumerWarpgroups) {
    ClearLines(rows + box * Config::kRowBoxBytes, valid_depth, thread);
  }
  ptx::fence_proxy_async_shared_cta();
  ptx::bar_sync(kBothWarpgroupsBarrier, 128 * Config::kConsumerWarpgroups);
}

/// How far a consumer warp is in the two rings.
template <typename Config>
struct StagePositions {
  RingPosition<Config::kColumnStages> columns;
  RingPosition<Config::kRowStages> rows;
};

/// One warp: lets go of one piece of depth.
template <typename Config>
__device__ __forceinline__ void ReleaseStages(ProductSharedMemory<Config>& smem,
                                              const StagePositions<Config>& stages, int lane) {
  if (lane == 0) ReleaseHere(smem.columns_empty[stages.columns.index]);
  if (lane < kClusterSize) Release(smem.rows_empty[stages.rows.index], lane);
}

/// acc += columns x rows over the tile's depth.
template <typename Config, int kRows>
__device__ __forceinline__ void Multiply(ProductSharedMemory<Config>& smem,
                                         StagePositions<Config>& stages, int depth, int warpgroup,
                                         int thread, float (&acc)[kRows / 2]) {
  using Wgmma = ptx::WgmmaM64K16<typename Config::T, kRows, Config::kColumnsContiguous,
                                 Config::kRowsContiguous>;
  // Bytes from one 16 of depth to the next: 16 lines, or 32 bytes of a line.
  constexpr uint32_t kColumnStep = Config::kColumnsContiguous ? 16 * 128 : 32;
  constexpr uint32_t kRowStep = Config::kRowsContiguous ? 16 * 128 : 32;
  const int lane = thread % 32;
  const int depth_blocks = (depth + Config::kTileDepth - 1) / Config::kTileDepth;
  StagePositions<Config> previous;
  for (int block = 0; block < depth_blocks; ++block) {
    uint8_t* const columns = smem.columns[stages.columns.index];
    uint8_t* const rows = smem.rows[stages.rows.index];
    WaitInBlock(smem.rows_full[stages.rows.index], stages.rows.parity);
    WaitInBlock(smem.columns_full[stages.columns.index], stages.columns.parity);
    if constexpr (Config::kRaggedDepth) {
      const int valid_depth = depth - block * Config::kTileDepth;
      if (valid_depth < Config::kTileDepth) {
        ClearPastGroup<Config>(columns, rows, kRows, valid_depth, warpgroup, thread);
      }
    }
    const uint64_t column_descriptor = OperandDescriptor(
        ptx::SharedAddress(columns) + warpgroup * Config::kColumnBoxBytes, Config::kColumnBoxBytes);
    const uint64_t row_descriptor =
        OperandDescriptor(ptx::SharedAddress(rows), Config::kRowBoxBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kTileDepth / 16; ++step) {
      Wgmma::wgmma(acc, column_descriptor + (step * kColumnStep >> 4),
                   row_descriptor + (step * kRowStep >> 4));
    }
    ptx::wgmma_commit_group();
    // The operands of the piece before have been read once at most this one's products are under
    // way.
    ptx::wgmma_wait_group<1>();
    if (block > 0) ReleaseStages(smem, previous, lane);
    previous = stages;
    stages.columns.Advance();
    stages.rows.Advance();
  }
  ptx::wgmma_wait_group<0>();
  if (depth_blocks > 0) ReleaseStages(smem, previous, lane);
}

template <typename Config, int kRows>
__device__ __forceinline__ void ComputeTile(ProductSharedMemory<Config>& smem,
                                            const ProductParams& p, const Tile& tile,
                                            StagePositions<Config>& stages, uint32_t block_rank,
                                            int warpgroup, int thread) {
  float acc[kRows / 2];
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) acc[i] = 0.0f;
  Multiply<Config, kRows>(smem, stages, DepthOf<Config>(tile, p), warpgroup, thread, acc);

  using Out = typename Config::Out;
  constexpr bool kOutputPerGroup = Config::kProduct == Product::kWeightGrad;
  OutputTile<Out> output;
  output.num_rows = tile.num_rows;
  output.x = tile.column + block_rank * kTileColumns + warpgroup * 64;
  output.y = tile.row_in_group + (kOutputPerGroup ? 0 : tile.group_row_begin);
  output.z = kOutputPerGroup ? tile.group : 0;
  output.num_columns = p.out_columns - output.x;
  output.row_stride_elems = p.out_columns;
  output.out = static_cast<Out*>(p.out) + output.y * output.row_stride_elems + output.x;
  WriteTile<Config, kRows>(smem, acc, &p.output, output, warpgroup, thread);
}

/// The instance of ComputeTile for this many rows: kRows, kRows + kRowStep, ..
template <typename Config, int kRows = Config::kRowStep>
__device__ __forceinline__ void ComputeTileOf(int rows, ProductSharedMemory<Config>& smem,
                                              const ProductParams& p, const Tile& tile,
                                              StagePositions<Config>& stages, uint32_t block_rank,
                                              int warpgroup, int thread) {
  if constexpr (kRows < kMaxTileRows) {
    if (rows > kRows) {
      ComputeTileOf<Config, kRows + Config::kRowStep>(rows, smem, p, tile, stages, block_rank,
                                                      warpgroup, thread);
      return;
    }
  }
  ComputeTile<Config, kRows>(smem, p, tile, stages, block_rank, warpgroup, thread);
}

template <typename Config>
__device__ __forceinline__ void ConsumeTiles(ProductSharedMemory<Config>& smem,
                                             const ProductParams& p, uint32_t block_rank,
                                             int warpgroup, int thread) {
  TileStream<Config> tiles(smem);
  StagePositions<Config> stages;
  Tile tile;
  while (tiles.Next(&tile, thread % 32)) {
    ComputeTileOf<Config>(tile.num_rows, smem, p, tile, stages, block_rank, warpgroup, thread);
  }
  FinishWrites(thread);
}

// ---- kernel ----

template <typename Config>
__device__ __forceinline__ void InitBarriers(ProductSharedMemory<Config>& smem) {
  constexpr uint32_t kClusterConsumerWarps = Config::kConsumerWarps * kClusterSize;
  for (int i = 0; i < Config::kColumnStages; ++i) {
    ptx::mbarrier_init_shared(ptx::SharedAddress(&smem.columns_full[i]), 1);
    ptx::mbarrier_init_shared(ptx::SharedAddress(&smem.columns_empty[i]), Config::kConsumerWarps);
  }
  for (int i = 0; i < Config::kRowStages; ++i) {
    ptx::mbarrier_init_shared(ptx::SharedAddress(&smem.rows_full[i]), 1);
    ptx::mbarrier_init_shared(ptx::SharedAddress(&smem.rows_empty[i]), kClusterConsumerWarps);
  }
  for (int i = 0; i < Config::kSlots; ++i) {
    ptx::mbarrier_init_shared(ptx::SharedAddress(&smem.slot_full[i]), 1);
    // Consumers and both loaders of every block; the first block's is the one in use.
    ptx::mbarrier_init_shared(ptx::SharedAddress(&smem.slot_empty[i]),
                              kClusterConsumerWarps + 2 * kClusterSize);
  }
  ptx::fence_mbarrier_init_release_cluster();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    ProductKernel(const __grid_constant__ ProductParams p) {
  extern __shared__ uint8_t shared_bytes[];
  const uint32_t base = ptx::SharedAddress(shared_bytes);
  auto& smem =
      *reinterpret_cast<ProductSharedMemory<Config>*>(shared_bytes + (1024 - base % 1024) % 1024);
  // The same value in every thread of a warp, and known to be: wgmma's descriptors stay in uniform
  // registers.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const uint32_t block_rank = ptx::cluster_ctarank();

  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&p.column_operand);
    ptx::prefetch_tensormap(&p.row_operand);
    InitBarriers(smem);
  }
  __syncthreads();
  ptx::barrier_cluster_arrive_release();
  ptx::barrier_cluster_wait_acquire();

  if (warp < 4) {
    ptx::setmaxnreg_dec<40>();
    if (warp == 0) {
      LoadColumnsOfTiles(smem, p, block_rank, lane);
    } else if (warp == 1) {
      LoadRowsOfTiles(smem, p, block_rank, lane);
    } else if (warp == 2) {
      if (block_rank == 0) ScheduleTiles(smem, p, lane);
    } else if (Config::kProduct != Product::kWeightGrad && p.zero_tail) {
      ZeroTail<Config>(p, blockIdx.x * 32 + lane, gridDim.x * 32);
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    ConsumeTiles(smem, p, block_rank, warp / 4 - 1, threadIdx.x % 128);
  }
  // Nobody leaves while a block of the cluster may still write to it or arrive at its barriers.
  __syncwarp();
  ptx::barrier_cluster_arrive_release();
  ptx::barrier_cluster_wait_acquire();
}

// ---- launcher ----

/// As many clusters as the device runs at once.
template <typename Config>
Status LaunchProduct(const ProductParams& params, int num_sms, cudaStream_t stream) {
  const auto kernel = ProductKernel<Config>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kProductSharedBytes<Config>);
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kClusterSize, 1, 1};
    cudaLaunchConfig_t launch = {};
    launch.gridDim = num_sms / kClusterSize * kClusterSize;
    launch.blockDim = Config::kThreads;
    launch.dynamicSmemBytes = kProductSharedBytes<Config>;
    launch.stream = stream;
    launch.attrs = &cluster;
    launch.numAttrs = 1;
    error = cudaLaunchKernelEx(&launch, kernel, params);
  }
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string("grouped_matmul: launch: ") + cudaGetErrorString(error));
}

/// The instance for these element types.
template <Product kProduct>
Status LaunchProductOf(const ProductTypes& types, const ProductParams& params, int num_sms,
                       cudaStream_t stream) {
  const bool f32_out = types.out == DType::kF32;
  if (types.operands == DType::kBF16) {
    return f32_out ? LaunchProduct<ProductConfig<__nv_bfloat16, float, kProduct>>(params, num_sms,
                                                                                  stream)
                   : LaunchProduct<ProductConfig<__nv_bfloat16, __nv_bfloat16, kProduct>>(
                         params, num_sms, stream);
  }
  return f32_out ? LaunchProduct<ProductConfig<__half, float, kProduct>>(params, num_sms, stream)
                 : LaunchProduct<ProductConfig<__half, __half, kProduct>>(params, num_sms, stream);
}

}  // namespace
}  // namespace wideep
