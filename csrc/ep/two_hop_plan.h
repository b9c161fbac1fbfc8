// The plan of the two-hop exchange on the host: nodes, counts, and from all ranks' counts the place
// of every row and what crosses to which node.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/ep/two_hop_layout.h"

namespace wideep::two_hop {

/// Nodes of the given sizes. Fails, saying what is wrong, for none, for more than kMaxNodes, for an
/// empty one and for one of more than kMaxNodeRanks.
Status MakeNodes(const std::vector<int>& node_sizes, Nodes& nodes);
/// Nodes of `node_size` ranks each; the last one has what is left.
Status SplitIntoNodes(int num_ranks, int node_size, Nodes& nodes);
/// Fails unless rings and slots of these sizes work.
Status CheckConfig(const Config& config);

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

/// Selections per expert, [num_experts]. `capacity`: only those that it allows; null: all.
std::vector<int32_t> CountSelections(const PlanInput& input, const Capacity* capacity);
/// `counts`: [num_ranks][num_experts] of all selections.
Capacity FillRanks(const Nodes& nodes, const PlanInput& input, int rank, const int32_t* counts);
/// `counts`: as above, of the selections that capacities allow.
RankPlan PlaceRows(const Nodes& nodes, const PlanInput& input, int rank, const int32_t* counts,
                   const Capacity& capacity);

/// Hosts of the token on `node`, a bit each, from one token's destinations.
WIDEEP_HOST_DEVICE constexpr uint32_t HostsOn(const Nodes& nodes, int node,
                                              const int32_t* dest_rank, int top_k) {
  uint32_t hosts = 0;
  for (int k = 0; k < top_k; ++k) {
    const int index = dest_rank[k] - nodes.first_rank[node];
    if (index >= 0 && index < nodes.SizeOf(node)) hosts |= 1u << index;
  }
  return hosts;
}

/// The part of a rank's tokens that travels in a channel.
struct ChannelTokens {
  int64_t begin;
  int64_t end;
};
WIDEEP_HOST_DEVICE constexpr ChannelTokens TokensOf(int64_t num_tokens, int channel,
                                                    int num_channels) {
  return {num_tokens * channel / num_channels, num_tokens * (channel + 1) / num_channels};
}

}  // namespace wideep::two_hop
