// The plan of the two-hop exchange as each rank makes it from all ranks' counts, for tests of the
// protocol: nodes, and the place of every row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/ep/two_hop_config.h"
#include "csrc/ep/two_hop_layout.h"

namespace wideep::two_hop {

/// Nodes of `node_size` ranks each; the last one has what is left.
inline Status SplitIntoNodes(int num_ranks, int node_size, Nodes& nodes) {
  if (num_ranks < 1 || node_size < 1) {
    return Status::InvalidArgument("two-hop: node size: expected at least 1 rank a node, got " +
                                   std::to_string(node_size) + " for " + std::to_string(num_ranks) +
                                   " ranks");
  }
  std::vector<int> sizes(num_ranks / node_size, node_size);
  if (num_ranks % node_size != 0) sizes.push_back(num_ranks % node_size);
  return MakeNodes(sizes, nodes);
}

/// Fails unless rings and slots of these sizes work.
inline Status CheckConfig(const Config& config) {
  const auto expect = [](const char* name, const std::string& expected, int64_t got) {
    return Status::InvalidArgument("two-hop: " + std::string(name) + ": expected " + expected +
                                   ", got " + std::to_string(got));
  };
  if (config.nodes.num_ranks < 1) return expect("nodes", "at least one rank", 0);
  if (config.num_experts < 1 || config.num_experts % config.nodes.num_ranks != 0) {
    return expect("num_experts",
                  "a multiple of the " + std::to_string(config.nodes.num_ranks) + " ranks",
                  config.num_experts);
  }
  if (config.num_channels < 1) return expect("num_channels", "at least 1", config.num_channels);
  if (config.across_slots < 1) return expect("across_slots", "at least 1", config.across_slots);
  if (config.across_batch < 1 || config.across_batch > config.across_slots) {
    return expect("across_batch",
                  "1 to the " + std::to_string(config.across_slots) + " slots of a ring",
                  config.across_batch);
  }
  if (config.node_slots < 0) return expect("node_slots", "0 or more", config.node_slots);
  if (config.slot_bytes < 16 || config.slot_bytes % 16 != 0) {
    return expect("slot_bytes", "a multiple of 16", config.slot_bytes);
  }
  return Status();
}

/// The tokens of one rank and the rules of the plan, the same on every rank but for topk_idx.
struct PlanInput {
  const int32_t* topk_idx = nullptr;  // [num_tokens, top_k]; outside [0, num_experts) = masked
  int64_t num_tokens = 0;             // of this rank
  int32_t top_k = 0;
  int32_t num_experts = 0;
  int64_t capacity = 0;  // rows that a rank can receive
};

/// Selections that a rank receives from all, and how many of this rank's fit: sources fill a rank
/// in order until it is full.
struct Capacity {
  std::vector<int32_t> first_arrival;  // [num_ranks] place of this rank's first row there
  std::vector<int32_t> allowance;      // [num_ranks] of this rank's selections
  std::vector<int32_t> num_rows;       // [num_ranks] received by each rank
  bool is_short = false;               // some rank's; all ranks see it alike
};

/// What one rank's tokens and all counts make.
struct RankPlan {
  std::vector<int32_t> dest_rank;    // [num_tokens, top_k]; -1 = masked or dropped
  std::vector<int32_t> dest_row;     // [num_tokens, top_k]
  std::vector<int32_t> group_sizes;  // [local experts]
  /// Tokens of this rank that go to each rank, and to each node: what the hops carry.
  std::vector<int32_t> tokens_to_rank;  // [num_ranks]
  std::vector<int32_t> tokens_to_node;  // [num_nodes]
};

/// Hosts of the token on `node`, a bit each, from one token's destinations.
constexpr uint32_t HostsOn(const Nodes& nodes, int node, const int32_t* dest_rank, int top_k) {
  uint32_t hosts = 0;
  for (int k = 0; k < top_k; ++k) {
    const int index = dest_rank[k] - nodes.first_rank[node];
    if (index >= 0 && index < nodes.SizeOf(node)) hosts |= 1u << index;
  }
  return hosts;
}

inline bool IsExpert(const PlanInput& input, int64_t selection) {
  const int32_t expert = input.topk_idx[selection];
  return expert >= 0 && expert < input.num_experts;
}

/// Calls visit(selection, expert, destination) for those that capacities allow, in order.
template <typename Visit>
void ForEachAllowed(const PlanInput& input, int num_ranks, const Capacity* capacity, Visit visit) {
  const int local_experts = input.num_experts / num_ranks;
  std::vector<int32_t> before(num_ranks, 0);
  for (int64_t s = 0; s < input.num_tokens * input.top_k; ++s) {
    if (!IsExpert(input, s)) continue;
    const int dst = input.topk_idx[s] / local_experts;
    if (capacity != nullptr && before[dst] >= capacity->allowance[dst]) continue;
    ++before[dst];
    visit(s, input.topk_idx[s], dst);
  }
}

/// Selections per expert, [num_experts]. `capacity`: only those that it allows; null: all.
inline std::vector<int32_t> CountSelections(const PlanInput& input, const Capacity* capacity) {
  std::vector<int32_t> counts(input.num_experts, 0);
  if (capacity == nullptr) {
    for (int64_t s = 0; s < input.num_tokens * input.top_k; ++s) {
      if (IsExpert(input, s)) ++counts[input.topk_idx[s]];
    }
  } else {
    ForEachAllowed(input, static_cast<int>(capacity->allowance.size()), capacity,
                   [&](int64_t, int32_t expert, int) { ++counts[expert]; });
  }
  return counts;
}

/// `counts`: [num_ranks][num_experts] of all selections.
inline Capacity FillRanks(const Nodes& nodes, const PlanInput& input, int rank,
                          const int32_t* counts) {
  const int local_experts = input.num_experts / nodes.num_ranks;
  Capacity result;
  for (int dst = 0; dst < nodes.num_ranks; ++dst) {
    int64_t filled = 0;
    for (int src = 0; src < nodes.num_ranks; ++src) {
      int64_t sent = 0;
      const int32_t* of_source = counts + int64_t{src} * input.num_experts;
      for (int e = 0; e < local_experts; ++e) sent += of_source[dst * local_experts + e];
      if (src == rank) {
        const int64_t left = std::max<int64_t>(0, input.capacity - filled);
        result.first_arrival.push_back(static_cast<int32_t>(std::min(filled, input.capacity)));
        result.allowance.push_back(static_cast<int32_t>(std::min(sent, left)));
      }
      filled += sent;
    }
    result.num_rows.push_back(static_cast<int32_t>(std::min(filled, input.capacity)));
    result.is_short |= filled > input.capacity;
  }
  return result;
}

/// `counts`: as above, of the selections that capacities allow.
inline RankPlan PlaceRows(const Nodes& nodes, const PlanInput& input, int rank,
                          const int32_t* counts, const Capacity& capacity) {
  const int local_experts = input.num_experts / nodes.num_ranks;
  // First row of this rank's block of each expert: the expert's own first row, after earlier
  // ranks'.
  std::vector<int32_t> next_row(input.num_experts);
  RankPlan plan;
  for (int dst = 0; dst < nodes.num_ranks; ++dst) {
    int32_t row = 0;
    for (int e = 0; e < local_experts; ++e) {
      const int32_t begin = row;
      for (int src = 0; src < nodes.num_ranks; ++src) {
        const int expert = dst * local_experts + e;
        if (src == rank) next_row[expert] = row;
        row += counts[int64_t{src} * input.num_experts + expert];
      }
      if (dst == rank) plan.group_sizes.push_back(row - begin);
    }
  }

  plan.dest_rank.assign(input.num_tokens * input.top_k, -1);
  plan.dest_row.assign(input.num_tokens * input.top_k, -1);
  ForEachAllowed(input, nodes.num_ranks, &capacity, [&](int64_t s, int32_t expert, int dst) {
    plan.dest_rank[s] = dst;
    plan.dest_row[s] = next_row[expert]++;
  });

  plan.tokens_to_rank.assign(nodes.num_ranks, 0);
  plan.tokens_to_node.assign(nodes.num_nodes, 0);
  for (int64_t token = 0; token < input.num_tokens; ++token) {
    for (int node = 0; node < nodes.num_nodes; ++node) {
      const uint32_t hosts =
          HostsOn(nodes, node, &plan.dest_rank[token * input.top_k], input.top_k);
      plan.tokens_to_node[node] += hosts != 0;
      for (int i = 0; i < nodes.SizeOf(node); ++i) {
        plan.tokens_to_rank[nodes.first_rank[node] + i] += hosts >> i & 1;
      }
    }
  }
  return plan;
}

}  // namespace wideep::two_hop
