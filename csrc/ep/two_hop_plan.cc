#include "csrc/ep/two_hop_plan.h"

#include <algorithm>
#include <string>

namespace wideep::two_hop {
namespace {

bool IsExpert(const PlanInput& input, int64_t selection) {
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

}  // namespace

Status MakeNodes(const std::vector<int>& node_sizes, Nodes& nodes) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  const auto num_nodes = static_cast<int64_t>(node_sizes.size());
  if (num_nodes < 1 || num_nodes > kMaxNodes) {
    return Status::InvalidArgument("two-hop: nodes: expected 1 to " + number(kMaxNodes) +
                                   " of them, got " + number(num_nodes) +
                                   "; use fewer, larger nodes");
  }
  nodes = Nodes();
  int smallest = kMaxNodeRanks;
  for (int64_t node = 0; node < num_nodes; ++node) {
    const int num_ranks = node_sizes[node];
    if (num_ranks < 1 || num_ranks > kMaxNodeRanks) {
      return Status::InvalidArgument("two-hop: node size: expected 1 to " + number(kMaxNodeRanks) +
                                     " ranks in each node, got " + number(num_ranks) + " in node " +
                                     number(node) + "; set node_size to what shares NVLink");
    }
    nodes.first_rank[node + 1] = nodes.first_rank[node] + num_ranks;
    nodes.max_node_ranks = std::max(nodes.max_node_ranks, num_ranks);
    smallest = std::min(smallest, num_ranks);
  }
  nodes.num_nodes = static_cast<int32_t>(num_nodes);
  nodes.num_ranks = nodes.first_rank[num_nodes];
  nodes.fan = (nodes.max_node_ranks + smallest - 1) / smallest;
  return Status();
}

Status SplitIntoNodes(int num_ranks, int node_size, Nodes& nodes) {
  if (num_ranks < 1 || node_size < 1) {
    return Status::InvalidArgument("two-hop: node size: expected at least 1 rank a node, got " +
                                   std::to_string(node_size) + " for " + std::to_string(num_ranks) +
                                   " ranks");
  }
  std::vector<int> sizes(num_ranks / node_size, node_size);
  if (num_ranks % node_size != 0) sizes.push_back(num_ranks % node_size);
  return MakeNodes(sizes, nodes);
}

Status CheckConfig(const Config& config) {
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

std::vector<int32_t> CountSelections(const PlanInput& input, const Capacity* capacity) {
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

Capacity FillRanks(const Nodes& nodes, const PlanInput& input, int rank, const int32_t* counts) {
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

RankPlan PlaceRows(const Nodes& nodes, const PlanInput& input, int rank, const int32_t* counts,
                   const Capacity& capacity) {
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
