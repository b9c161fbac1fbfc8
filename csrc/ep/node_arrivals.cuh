// The rows of one home's tokens on a node, token by token: the hosts' orders of arrival, merged.
//
// Rows from one source lie in order of (token, k) in each host's order of arrival (plan:
// arrival_rows). Lane i follows host i; the arrivals that come next are in shared memory, since
// finding one takes two loads that depend on each other.
#pragma once

#include <cstdint>

#include "csrc/ep/row_sum.cuh"
#include "csrc/ep/two_hop_layout.h"

namespace wideep::two_hop {

/// What a host publishes on its node.
struct HostArrays {
  const char* rows;                // [capacity, hidden]
  const float* scalars;            // [capacity]
  const int32_t* arrival_rows;     // [capacity]
  const int32_t* row_source;       // [capacity]
  const int32_t* rows_per_source;  // [num_ranks]
};

/// Arrival i of a host is in place i % kPlaces.
struct ArrivalWindow {
  static constexpr int kPlaces = 32;
  int32_t rows[kMaxNodeRanks][kPlaces];
  int32_t selections[kMaxNodeRanks][kPlaces];  // token * top_k + k at the home
  float scalars[kMaxNodeRanks][kPlaces];
};
static_assert(ArrivalWindow::kPlaces >= kMaxKernelTopK, "a token's rows at a host");

/// One warp's way through the tokens [begin, end) of `home`, a rank as the plan numbers them.
class NodeArrivals {
 public:
  /// `hosts` [num_hosts] and `window` in shared memory. All lanes.
  __device__ NodeArrivals(const HostArrays* hosts, int num_hosts, ArrivalWindow& window, int home,
                          int64_t num_tokens, int top_k, int64_t begin, int64_t end)
      : hosts_(hosts),
        window_(window),
        lane_(threadIdx.x % 32),
        num_hosts_(num_hosts),
        top_k_(top_k),
        first_source_(static_cast<int32_t>(home * num_tokens * top_k)),
        end_token_(static_cast<int32_t>(end)) {
    if (lane_ >= num_hosts) return;
    const HostArrays& host = hosts[lane_];
    for (int src = 0; src < home; ++src) at_ += host.rows_per_source[src];
    end_ = at_ + host.rows_per_source[home];
    const auto source = static_cast<int32_t>(first_source_ + begin * top_k);
    for (int32_t high = end_; at_ < high;) {
      const int32_t middle = at_ + (high - at_) / 2;
      if (host.row_source[host.arrival_rows[middle]] < source) {
        at_ = middle + 1;
      } else {
        high = middle;
      }
    }
    loaded_ = at_;
  }

  /// On to the next token with rows on the node; false: there is none. All lanes.
  __device__ bool Next() {
    Load();
    const int32_t next = at_ < end_ ? window_.selections[lane_][PlaceOf(at_)] / top_k_ : end_token_;
    token_ = __reduce_min_sync(~0u, next);
    return token_ < end_token_;
  }
  __device__ int32_t token() const { return token_; }

  /// Fills the list with the token's rows in order of (host, k) and their scalars; `entries`, if
  /// not null, with their k and scalar. Returns how many there are. All lanes, which have to meet
  /// (__syncwarp) afterwards: before they read what others wrote, and before Next.
  __device__ int Take(int64_t row_bytes, SumList& list, SlotHeader::Entry* entries) {
    const int32_t selections_end = (token_ + 1) * top_k_;
    int count = 0;
    while (at_ + count < loaded_ &&
           window_.selections[lane_][PlaceOf(at_ + count)] < selections_end) {
      ++count;
    }
    int place = count;
#pragma unroll
    for (int step = 1; step < kMaxNodeRanks; step *= 2) {
      const int before = __shfl_up_sync(~0u, place, step);
      if (lane_ >= step) place += before;
    }
    const int total = __shfl_sync(~0u, place, kMaxNodeRanks - 1);
    place -= count;
#pragma unroll 1
    for (; count > 0; --count, ++place, ++at_) {
      const int i = PlaceOf(at_);
      const int64_t row = window_.rows[lane_][i];
      const float scalar = window_.scalars[lane_][i];
      list.rows[place] = hosts_[lane_].rows + row * row_bytes;
      list.weights[place] = scalar;
      if (entries == nullptr) continue;
      entries[place].k = static_cast<int16_t>(window_.selections[lane_][i] % top_k_);
      entries[place].word = __float_as_int(scalar);
    }
    return total;
  }

 private:
  static constexpr int kPlaces = ArrivalWindow::kPlaces;

  static __device__ int PlaceOf(int arrival) { return arrival & (kPlaces - 1); }

  /// Sees to it that all of a token's rows are in the window.
  __device__ void Load() {
    if (!__any_sync(~0u, loaded_ < end_ && loaded_ - at_ < top_k_)) return;
    constexpr int kAtOnce = 4;
    for (int first = 0; first < num_hosts_; first += kAtOnce) {
      int32_t rows[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        // Lanes past the last host have no arrivals.
        const int32_t at = __shfl_sync(~0u, at_, first + i);
        const int32_t loaded = __shfl_sync(~0u, loaded_, first + i);
        const int32_t end = __shfl_sync(~0u, end_, first + i);
        const int32_t arrival = at + ((lane_ - at) & (kPlaces - 1));
        const bool loads = arrival >= loaded && arrival < end;
        rows[i] = loads ? hosts_[first + i].arrival_rows[arrival] : -1;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (rows[i] < 0) continue;
        const HostArrays& host = hosts_[first + i];
        window_.rows[first + i][lane_] = rows[i];
        window_.selections[first + i][lane_] = host.row_source[rows[i]] - first_source_;
        window_.scalars[first + i][lane_] = host.scalars[rows[i]];
      }
    }
    loaded_ = min(end_, at_ + kPlaces);
    __syncwarp();
  }

  const HostArrays* const hosts_;
  ArrivalWindow& window_;
  const int lane_;
  const int num_hosts_;
  const int top_k_;
  const int32_t first_source_;
  const int32_t end_token_;
  // Of host `lane_`: arrivals [at_, loaded_) are in the window, and those up to end_ are to come.
  int32_t at_ = 0;
  int32_t loaded_ = 0;
  int32_t end_ = 0;
  int32_t token_ = -1;
};

}  // namespace wideep::two_hop
