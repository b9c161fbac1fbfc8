// Shared memory of the kernels that bring tokens to their rows: a pipe (bulk_pipe.cuh) for each
// warp.
#pragma once

#include <cstdint>

#include "csrc/core/launch.cuh"
#include "csrc/core/layout.h"
#include "csrc/ep/bulk_pipe.cuh"
#include "csrc/ep/exchange_protocol.cuh"

namespace wideep {

constexpr int kDispatchThreads = 32 * kWarpsPerBlock;
constexpr int kMaxStages = 8;

struct DispatchShared {
  char* here[kMaxPublished * kMaxRanks];
  uint32_t flags[kProtocolFlags];
  uint64_t barriers[kWarpsPerBlock * kMaxStages];
  // Followed, from the next multiple of 128, by num_stages * piece_bytes for each warp.

  static constexpr int64_t kBuffers = 2048;
  __device__ char* buffers(int warp, int64_t bytes_per_warp) {
    return reinterpret_cast<char*>(this) + kBuffers + warp * bytes_per_warp;
  }
};
static_assert(sizeof(DispatchShared) <= DispatchShared::kBuffers);

/// Chooses what the caller left open, of any params with row_bytes, piece_bytes and num_stages.
template <typename Params>
Params WithBuffers(Params p) {
  // What a block may use less the fixed part, for each warp.
  constexpr int64_t kBytesPerWarp =
      (kMaxSharedBytes - DispatchShared::kBuffers) / kWarpsPerBlock / 128 * 128;
  if (p.num_stages == 0) p.num_stages = 2;
  if (p.piece_bytes == 0) {
    const int64_t most = kBytesPerWarp / p.num_stages / 128 * 128;
    const int64_t pieces = (p.row_bytes + most - 1) / most;
    p.piece_bytes = static_cast<int32_t>(((p.row_bytes + pieces - 1) / pieces + 127) / 128 * 128);
  }
  return p;
}
template <typename Params>
int64_t DispatchSharedBytes(const Params& p) {
  return DispatchShared::kBuffers + int64_t{kWarpsPerBlock} * p.num_stages * p.piece_bytes;
}

}  // namespace wideep
