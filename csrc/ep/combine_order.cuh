// The order in which a token's rows are summed.
#pragma once

#include <cstdint>

namespace wideep {

/// The selections of one token in order of (rank, k). Lane k brings its destination rank, -1 for
/// none; gets back its place, and how many there are.
struct SumOrder {
  int place;
  int count;
};
__device__ __forceinline__ SumOrder OrderByRank(int32_t dst, int top_k) {
  const int lane = threadIdx.x % 32;
  const uint32_t valid = __ballot_sync(~0u, dst >= 0);
  int place = 0;
  for (int k = 0; k < top_k; ++k) {
    const int32_t other = __shfl_sync(~0u, dst, k);
    if ((valid >> k & 1) != 0 && (other < dst || (other == dst && k < lane))) ++place;
  }
  return {place, __popc(valid)};
}

}  // namespace wideep
