// What combine's kernels share, and its form pull: the home rank's warps read a token's rows
// wherever they lie, and sum them.
#pragma once

#include "csrc/core/launch.cuh"
#include "csrc/ep/combine.h"
#include "csrc/ep/combine_order.cuh"
#include "csrc/ep/exchange_protocol.cuh"
#include "csrc/ep/row_sum.cuh"

namespace wideep {

constexpr int kCombineThreads = 32 * kWarpsPerBlock;
constexpr int kWarpsPerGroup = kWarpsPerBlock / kCombineGroupsPerBlock;

struct CombineShared {
  char* here[kMaxPublished * kMaxRanks];
  uint32_t flags[kProtocolFlags];
  static constexpr int kBarriersPerWarp = 5;
  uint64_t barriers[kWarpsPerBlock * kBarriersPerWarp];
  /// Form reduce: where the arrivals of each source's tokens of a chunk begin; then the end.
  int32_t chunk_begins[kMaxRanks][kMaxSumChunks + 1];
  // Followed, from kBuffers on, by kBytesPerWarp for each warp: rows or sums on their way through
  // rings, or else a SumList.

  static constexpr int64_t kBuffers = 3072;
  static constexpr int64_t kBytesPerWarp =
      (kMaxSharedBytes - kBuffers) / kWarpsPerBlock / 512 * 512;
  static constexpr int64_t kNumBytes = kBuffers + kWarpsPerBlock * kBytesPerWarp;
  __device__ char* buffer(int warp) {
    return reinterpret_cast<char*>(this) + kBuffers + warp * kBytesPerWarp;
  }
  __device__ SumList& list(int warp) { return *reinterpret_cast<SumList*>(buffer(warp)); }
};
static_assert(sizeof(CombineShared) <= CombineShared::kBuffers);

/// Fails unless the kernels can sum such rows.
inline Status CheckCombineShape(const char* op, DType dtype, int64_t hidden, int32_t top_k) {
  const int64_t row_bytes = hidden * static_cast<int64_t>(SizeOf(dtype));
  if (row_bytes % 16 == 0 && top_k <= kMaxKernelTopK && dtype != DType::kF8E4M3) return Status();
  return Status::InvalidArgument(std::string(op) +
                                 ": expected rows of bfloat16, float16 or float32, of a multiple "
                                 "of 16 bytes, and top_k of at most " +
                                 std::to_string(kMaxKernelTopK) + " on CUDA, got " +
                                 std::to_string(row_bytes) + " bytes and top_k " +
                                 std::to_string(top_k));
}

/// Where a selection's row lies, -1 if it has none or its rank is masked.
__device__ __forceinline__ int32_t HostOf(const PlanArrays& plan, int64_t selection,
                                          const Exchange& exchange) {
  const int32_t dst = plan.dest_rank[selection];
  return dst >= 0 && !exchange.IsMasked(dst) ? dst : -1;
}

/// out[token]: the sum of its rows wherever they lie, or, if kReduced, of what combine_reduce.cuh
/// has made of them. One warp. `here`: y, row_scalars and sums of each rank.
template <DType kDType, bool kWeighted, bool kReduced>
__device__ __forceinline__ void PullToken(const CombineParams& p, const Exchange& exchange,
                                          char* const* here, int64_t token, SumList& list) {
  const int lane = threadIdx.x % 32;
  const int64_t row_bytes = p.hidden * static_cast<int64_t>(SizeOf(kDType));
  const auto* row_scalars = reinterpret_cast<const float* const*>(here + kMaxRanks);
  const int64_t s = token * p.top_k + lane;
  const int32_t dst = lane < p.top_k ? HostOf(p.plan, s, exchange) : -1;
  bool is_term = dst >= 0;
  bool is_sum = false;  // of this selection's row and those of later ones at the same rank
  if constexpr (kReduced) {
    const uint32_t at_dst = __match_any_sync(~0u, dst);
    const bool summed = is_term && dst != exchange.rank() && __popc(at_dst) > 1;
    is_sum = summed && lane == __ffs(at_dst) - 1;
    is_term = is_term && (is_sum || !summed);
  }
  const SumOrder order = OrderByRank(is_term ? dst : -1, p.top_k);
  float scalar = 0;
  if (dst >= 0) {
    const int64_t row = p.plan.dest_row[s];
    if (!kWeighted || (is_term && !is_sum)) scalar = row_scalars[dst][row];
    if (is_term) {
      list.rows[order.place] = here[(is_sum ? 2 * kMaxRanks : 0) + dst] + row * row_bytes;
      list.weights[order.place] = is_sum ? 1.0f : scalar;
    }
  }
  if (!kWeighted && lane < p.top_k) p.dweights[s] = scalar;
  __syncwarp();
  SumRows<kDType, kWeighted>(p.out + token * row_bytes, list, order.count, 0,
                             static_cast<int>(row_bytes), lane, 32);
  __syncwarp();  // the list is read
}

template <DType kDType, bool kWeighted>
__device__ void PullSums(const CombineParams& p, const Exchange& exchange, char* const* here,
                         SumList& list) {
  const int64_t num_warps = int64_t{gridDim.x} * kWarpsPerBlock;
  for (int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
       token < p.num_tokens; token += num_warps) {
    PullToken<kDType, kWeighted, /*kReduced=*/false>(p, exchange, here, token, list);
  }
}

}  // namespace wideep
