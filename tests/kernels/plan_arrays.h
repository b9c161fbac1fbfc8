// A rank's plan as the host makes it, and what a kernel made of the same choice of experts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/ep/plan_host.h"
#include "tests/cpp/check.h"
#include "tests/cpp/exchange_testing.h"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace testing {

/// One rank's arrays of the plan on the host.
struct HostPlan {
  std::vector<int32_t> topk_idx, group_sizes, num_rows, overflow, tokens_per_expert, dest_rank,
      dest_row, row_source, arrival_rows, rows_per_source;

  /// Chooses experts, and makes room for the rest.
  void Draw(Random& random, const GroupSettings& group, Routing routing, int64_t num_tokens,
            int64_t capacity) {
    topk_idx =
        ChooseExperts(random, routing, num_tokens, group.top_k, group.num_experts, group.num_ranks);
    group_sizes.resize(group.num_experts / group.num_ranks);
    num_rows.resize(1);
    overflow.resize(1);
    tokens_per_expert.resize(group.num_experts);
    dest_rank.resize(topk_idx.size());
    dest_row.resize(topk_idx.size());
    row_source.resize(capacity);
    arrival_rows.resize(capacity);
    rows_per_source.resize(group.num_ranks);
  }
  PlanBuffers Buffers() {
    return {topk_idx.data(),          group_sizes.data(),    num_rows.data(), overflow.data(),
            tokens_per_expert.data(), dest_rank.data(),      dest_row.data(), row_source.data(),
            arrival_rows.data(),      rows_per_source.data()};
  }
};

template <typename T>
void CheckSame(const char* name, int rank, const std::vector<T>& got, const T* want,
               int64_t count) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong += std::memcmp(&got[i], &want[i], sizeof(T)) != 0;
  if (wrong == 0) return;
  const auto first = static_cast<int64_t>(
      std::mismatch(got.begin(), got.begin() + count, want).first - got.begin());
  check::Fail(__FILE__, __LINE__,
              std::string(name) + " of rank " + std::to_string(rank) + ": " +
                  std::to_string(wrong) + " of " + std::to_string(count) +
                  " are wrong, the first at " + std::to_string(first));
}

/// Every array of the plan, bit for bit.
template <typename Machine>
void CheckPlan(VirtualRanks<Machine>& ranks, int rank, const PlanParams& got,
               const HostPlan& want) {
  const auto same = [&](const char* name, const int32_t* device, const std::vector<int32_t>& host) {
    const auto count = static_cast<int64_t>(host.size());
    CheckSame(name, rank, ranks.Read(device, count), host.data(), count);
  };
  same("group_sizes", got.group_sizes, want.group_sizes);
  same("num_rows", got.num_rows, want.num_rows);
  same("overflow", got.overflow, want.overflow);
  same("tokens_per_expert", got.tokens_per_expert, want.tokens_per_expert);
  same("dest_rank", got.dest_rank, want.dest_rank);
  same("dest_row", got.dest_row, want.dest_row);
  same("row_source", got.row_source, want.row_source);
  same("arrival_rows", got.arrival_rows, want.arrival_rows);
  same("rows_per_source", got.rows_per_source, want.rows_per_source);
}

}  // namespace testing
}  // namespace wideep
