#include "csrc/ep/plan_host.h"

#include <algorithm>
#include <string>

namespace wideep {
namespace {

Status IndexOutOfRange(const PlanShape& shape, size_t rank, int64_t selection, int32_t expert) {
  return Status::OutOfRange(
      "make_plan: topk_idx must lie in [-1, " + std::to_string(shape.num_experts) + "), got " +
      std::to_string(expert) + " on rank " + std::to_string(rank) + ", token " +
      std::to_string(selection / shape.top_k) + ", k " + std::to_string(selection % shape.top_k) +
      ". Use -1 for a masked selection");
}

Status CapacityExceeded(int rank, int64_t wanted, int64_t capacity) {
  return Status::OutOfRange("make_plan: rank " + std::to_string(rank) + " is sent " +
                            std::to_string(wanted) + " rows but has capacity " +
                            std::to_string(capacity) +
                            ". Raise capacity, leave it None (no drops), or use overflow='drop'");
}

// Whether the rank takes part and its outputs are in this process.
// (By an array that is never empty: those of tokens are null where there are none.)
bool Here(const PlanBuffers& rank) { return !rank.masked && rank.num_rows != nullptr; }

}  // namespace

Status MakePlan(const PlanShape& shape, const std::vector<PlanBuffers>& ranks) {
  const int num_ranks = shape.num_ranks;
  const int num_experts = shape.num_experts;
  const int local_experts = shape.local_experts();
  const int64_t selections = shape.num_tokens * shape.top_k;

  // Ranks of other processes have no outputs here; where their selections go still decides about
  // rows.
  std::vector<std::vector<int32_t>> elsewhere(num_ranks);
  std::vector<int32_t*> dest_ranks(num_ranks);
  for (int src = 0; src < num_ranks; ++src) {
    dest_ranks[src] = ranks[src].dest_rank;
    if (ranks[src].dest_rank != nullptr || ranks[src].masked) continue;
    elsewhere[src].resize(selections);
    dest_ranks[src] = elsewhere[src].data();
  }

  // Pass 1: who wants whom. accepted[src][expert] counts what the receiver's capacity admits.
  std::vector<int32_t> wanted(num_experts, 0);
  std::vector<std::vector<int32_t>> accepted(num_ranks, std::vector<int32_t>(num_experts, 0));
  std::vector<int64_t> filled(num_ranks, 0);
  std::vector<int32_t> masked_selections(num_ranks, 0);
  for (int src = 0; src < num_ranks; ++src) {
    if (ranks[src].masked) continue;
    const int32_t* idx = ranks[src].topk_idx;
    int32_t* dest_rank = dest_ranks[src];
    for (int64_t s = 0; s < selections; ++s) {
      const int32_t expert = idx[s];
      if (expert < -1 || expert >= num_experts) return IndexOutOfRange(shape, src, s, expert);
      dest_rank[s] = -1;
      if (expert == -1) continue;
      ++wanted[expert];
      const int dst = expert / local_experts;
      if (ranks[dst].masked) {
        ++masked_selections[src];
        continue;
      }
      if (filled[dst] == shape.capacity) continue;
      ++filled[dst];
      ++accepted[src][expert];
      dest_rank[s] = dst;
    }
  }

  // Prefix sums: next_row[src][expert] is the first row of that block, on the expert's rank.
  std::vector<std::vector<int32_t>> next_row(num_ranks, std::vector<int32_t>(num_experts));
  for (int dst = 0; dst < num_ranks; ++dst) {
    if (ranks[dst].masked) continue;
    int32_t row = 0;
    int64_t total_wanted = 0;
    for (int e = 0; e < local_experts; ++e) {
      const int expert = dst * local_experts + e;
      const int32_t begin = row;
      for (int src = 0; src < num_ranks; ++src) {
        next_row[src][expert] = row;
        row += accepted[src][expert];
      }
      if (Here(ranks[dst])) ranks[dst].group_sizes[e] = row - begin;
      total_wanted += wanted[expert];
    }
    if (shape.overflow_is_error && total_wanted > row) {
      return CapacityExceeded(dst, total_wanted, shape.capacity);
    }
    if (!Here(ranks[dst])) continue;
    *ranks[dst].num_rows = row;
    *ranks[dst].overflow = static_cast<int32_t>(total_wanted - row) + masked_selections[dst];
    std::copy(wanted.begin(), wanted.end(), ranks[dst].tokens_per_expert);
    std::fill(ranks[dst].row_source + row, ranks[dst].row_source + shape.capacity, -1);
    std::fill(ranks[dst].arrival_rows + row, ranks[dst].arrival_rows + shape.capacity, -1);
    std::fill_n(ranks[dst].rows_per_source, num_ranks, 0);
  }

  // Pass 2: every selection's row, taken in order of arrival.
  std::vector<int32_t> arrived(num_ranks, 0);
  for (int src = 0; src < num_ranks; ++src) {
    const PlanBuffers& rank = ranks[src];
    const auto count_arrived = [&](int sign) {
      for (int dst = 0; dst < num_ranks; ++dst) {
        if (Here(ranks[dst])) ranks[dst].rows_per_source[src] += sign * arrived[dst];
      }
    };
    count_arrived(-1);
    for (int64_t s = 0; s < selections && !rank.masked; ++s) {
      const int dst = dest_ranks[src][s];
      if (dst == -1) {
        if (Here(rank)) rank.dest_row[s] = -1;
        continue;
      }
      if (!Here(rank) && !Here(ranks[dst])) continue;
      const int32_t row = next_row[src][rank.topk_idx[s]]++;
      if (Here(rank)) rank.dest_row[s] = row;
      if (!Here(ranks[dst])) continue;
      ranks[dst].row_source[row] = static_cast<int32_t>(src * selections + s);
      ranks[dst].arrival_rows[arrived[dst]++] = row;
    }
    count_arrived(+1);
  }
  return Status();
}

void MakeEmptyPlan(const PlanShape& shape, const PlanBuffers& rank) {
  const int64_t selections = shape.num_tokens * shape.top_k;
  std::fill_n(rank.group_sizes, shape.local_experts(), 0);
  *rank.num_rows = 0;
  *rank.overflow = static_cast<int32_t>(std::count_if(rank.topk_idx, rank.topk_idx + selections,
                                                      [](int32_t expert) { return expert >= 0; }));
  std::fill_n(rank.tokens_per_expert, shape.num_experts, 0);
  std::fill_n(rank.dest_rank, selections, -1);
  std::fill_n(rank.dest_row, selections, -1);
  std::fill_n(rank.row_source, shape.capacity, -1);
  std::fill_n(rank.arrival_rows, shape.capacity, -1);
  std::fill_n(rank.rows_per_source, shape.num_ranks, 0);
}

}  // namespace wideep
