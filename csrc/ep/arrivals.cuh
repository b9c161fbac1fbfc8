// The receiver's way through its rows, token by token: rows of one token lie next to each other in
// arrival order (plan: arrival_rows), so that its row need cross only once.
#pragma once

#include <cstdint>

#include "csrc/ep/dispatch.h"
#include "csrc/ep/exchange_protocol.cuh"

namespace wideep {

/// 32 consecutive arrivals, one a lane.
struct Arrivals {
  int32_t row;     // -1 past the end
  int32_t source;  // (source rank * num_tokens + token) * top_k + k
  int32_t token;   // source / top_k; -1 past the end
};

/// The arrivals from one source rank, or a part of them that does not cut a token.
class SourceArrivals {
 public:
  __device__ SourceArrivals(const PlanArrays& plan, int src, int top_k)
      : plan_(plan), top_k_(top_k) {
    int32_t begin = 0;
    for (int r = 0; r < src; ++r) begin += plan.rows_per_source[r];
    begin_ = begin;
    end_ = begin + plan.rows_per_source[src];
  }
  __device__ SourceArrivals(const PlanArrays& plan, int32_t begin, int32_t end, int top_k)
      : plan_(plan), begin_(begin), end_(end), top_k_(top_k) {}
  __device__ int32_t begin() const { return begin_; }
  __device__ int32_t end() const { return end_; }

  /// Arrivals first + lane; none outside of this source's. All lanes.
  __device__ Arrivals At(int32_t first) const {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x % 32);
    Arrivals a{-1, -1, -1};
    if (i >= begin_ && i < end_) {
      a.row = plan_.arrival_rows[i];
      a.source = plan_.row_source[a.row];
      a.token = a.source / top_k_;
    }
    return a;
  }

  /// First arrival whose source is at least `source`. All lanes: 32 places are tried at a time.
  __device__ int32_t LowerBound(int32_t source) const {
    const int lane = threadIdx.x % 32;
    int32_t low = begin_;  // everything before it is smaller
    int32_t high = end_;   // it, if it is not the end, and everything after it is not
    while (low < high) {
      const int32_t step = (high - low + 31) / 32;
      const int32_t i = low + lane * step;
      const bool smaller = i < high && plan_.row_source[plan_.arrival_rows[i]] < source;
      const int tried = __popc(__ballot_sync(~0u, smaller));  // smaller ones come first
      if (tried == 0) return low;
      const int32_t last_smaller = low + (tried - 1) * step;
      high = min(high, last_smaller + step);
      low = last_smaller + 1;
    }
    return low;
  }

 private:
  const PlanArrays& plan_;
  int32_t begin_;
  int32_t end_;
  int top_k_;
};

/// Arrivals that a warp looks at together. Few, so that all ranks read about the same part of a
/// source's tokens at the same time: with 8 dispatch took 1588 us, with 32 1678
/// (docs/performance_exchange.md).
constexpr int kArrivalWindow = 8;
static_assert(kArrivalWindow + kMaxKernelTopK <= 32, "a window and the rest of its last token");

/// Windows that ForEachToken cuts `arrivals` into.
__device__ __forceinline__ int32_t NumWindows(const SourceArrivals& arrivals) {
  return (arrivals.end() - arrivals.begin() + kArrivalWindow - 1) / kArrivalWindow;
}

/// Visits this warp's tokens of one source rank: visit(arrivals of the lanes, lanes that hold rows
/// of the token, the first of them). Tokens belong to the window in which their first row lies;
/// windows go round `num_stripes` warps.
template <typename Visit>
__device__ __forceinline__ void ForEachToken(const SourceArrivals& arrivals, int stripe,
                                             int num_stripes, Visit visit) {
  const int lane = threadIdx.x % 32;
  const int32_t stride = kArrivalWindow * num_stripes;
  int32_t first = arrivals.begin() + kArrivalWindow * stripe;
  // Lane 0 has the arrival before the window: whose token is not this window's.
  Arrivals next = arrivals.At(first - 1);
  for (; first < arrivals.end(); first += stride) {
    const Arrivals now = next;
    next = arrivals.At(first + stride - 1);  // early: two dependent loads
    const int32_t token_before = __shfl_up_sync(~0u, now.token, 1);
    uint32_t leaders = __ballot_sync(
        ~0u, lane >= 1 && lane <= kArrivalWindow && now.token >= 0 && now.token != token_before);
    while (leaders != 0) {
      const int leader = __ffs(leaders) - 1;
      const int32_t token = __shfl_sync(~0u, now.token, leader);
      visit(now, __ballot_sync(~0u, now.token == token), leader);
      leaders &= leaders - 1;
    }
  }
}

}  // namespace wideep
