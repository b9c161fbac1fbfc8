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

/// The arrivals from one source rank.
class SourceArrivals {
 public:
  __device__ SourceArrivals(const PlanArrays& plan, int src, int top_k)
      : plan_(plan), top_k_(top_k) {
    int32_t begin = 0;
    for (int r = 0; r < src; ++r) begin += plan.rows_per_source[r];
    begin_ = begin;
    end_ = begin + plan.rows_per_source[src];
  }
  __device__ int32_t begin() const { return begin_; }
  __device__ int32_t end() const { return end_; }

  /// Arrivals first + lane. All lanes.
  __device__ Arrivals At(int32_t first) const {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x % 32);
    Arrivals a{-1, -1, -1};
    if (i < end_) {
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

/// Visits the tokens that begin in [begin, end) of `arrivals`, 32 arrivals at a time:
/// visit(arrivals of the lanes, lanes that hold rows of the token, its first lane). A token that
/// goes on past the 32 is visited with its first rows, then with the rest. `stride`: from one 32 to
/// this warp's next.
template <typename Visit>
__device__ __forceinline__ void ForEachToken(const SourceArrivals& arrivals, int32_t begin,
                                             int32_t end, int32_t stride, Visit visit) {
  Arrivals next = arrivals.At(begin);
  for (int32_t first = begin; first < end; first += stride) {
    Arrivals now = next;
    next = arrivals.At(first + stride);  // early: two dependent loads
    if (first + static_cast<int32_t>(threadIdx.x % 32) >= end) now = {-1, -1, -1};
    uint32_t left = __ballot_sync(~0u, now.token >= 0);
    while (left != 0) {
      const int leader = __ffs(left) - 1;
      const int32_t token = __shfl_sync(~0u, now.token, leader);
      const uint32_t lanes = __ballot_sync(~0u, now.token == token);
      visit(now, lanes, leader);
      left &= ~lanes;
    }
  }
}

}  // namespace wideep
