#include "csrc/ep/two_hop_config.h"

#include <algorithm>
#include <string>

namespace wideep::two_hop {
namespace {

/// Of a ring.
constexpr int kMinSlots = 2;
constexpr int kMaxSlots = 8;

Status NodesWithout(const GroupShape& shape, uint32_t masked, Nodes& nodes) {
  std::vector<int> sizes;
  int last = -1;
  for (int rank = 0; rank < shape.arena.num_ranks; ++rank) {
    const int node = shape.node_of_rank[rank];
    if ((masked >> rank & 1) != 0) continue;
    if (node != last) sizes.push_back(0);
    ++sizes.back();
    last = node;
  }
  return MakeNodes(sizes, nodes);
}

/// Ranks on other nodes that `number` stands for.
std::vector<int> SourcesOf(const Nodes& nodes, int number) {
  std::vector<int> sources;
  for (int input = 0; input < nodes.num_inputs(); ++input) {
    if (input / nodes.fan == nodes.NodeOf(number)) continue;
    const int source = nodes.SourceOf(number, input);
    if (source >= 0) sources.push_back(source);
  }
  return sources;
}

/// Most ends of rings that a channel has at a rank, each with a warp of its own.
int EndsPerChannel(const Nodes& nodes) {
  int most = 0;
  for (int number = 0; number < nodes.num_ranks; ++number) {
    const auto sources = static_cast<int>(SourcesOf(nodes, number).size());
    most = std::max(most, nodes.num_nodes - 1 + sources);
  }
  return most;
}

int64_t BytesOf(const Config& config) {
  return Layout(config).num_bytes() + static_cast<int64_t>(sizeof(RankState)) + kContextBytes;
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
    nodes.first_rank[node + 1] = static_cast<int16_t>(nodes.first_rank[node] + num_ranks);
    nodes.max_node_ranks = std::max(nodes.max_node_ranks, num_ranks);
    smallest = std::min(smallest, num_ranks);
  }
  nodes.num_nodes = static_cast<int32_t>(num_nodes);
  nodes.num_ranks = nodes.first_rank[num_nodes];
  nodes.fan = (nodes.max_node_ranks + smallest - 1) / smallest;
  return Status();
}

Status MakeConfig(const GroupShape& shape, uint32_t masked, int64_t num_bytes, Config& config) {
  const ArenaConfig& arena = shape.arena;
  config = Config();
  if (Status status = NodesWithout(shape, masked, config.nodes); !status.ok()) return status;
  config.num_experts = arena.num_experts;
  config.node_slots = 0;
  config.slot_bytes = (SlotHeaderBytes(arena.top_k) + arena.max_row_bytes + 127) / 128 * 128;
  const int num_warps = arena.num_sms * kWarpsPerBlock;
  const int num_ends = EndsPerChannel(config.nodes);
  if (num_warps < num_ends) {
    return Status::InvalidArgument(
        "nodes: expected num_sms of at least " +
        std::to_string((num_ends + kWarpsPerBlock - 1) / kWarpsPerBlock) + " for " +
        std::to_string(config.nodes.num_nodes) + " nodes of up to " +
        std::to_string(config.nodes.max_node_ranks) + " ranks, got " +
        std::to_string(arena.num_sms) + "; raise num_sms on the ExpertGroup");
  }
  // As many as there are warps for, in whole blocks where there are enough: two_hop_roles.h.
  const int blocks_to_an_end = num_ends == 0 ? arena.num_sms : arena.num_sms / num_ends;
  config.num_channels =
      blocks_to_an_end > 0 ? blocks_to_an_end * kWarpsPerBlock : num_warps / num_ends;
  const int num_rings = config.num_channels * std::max(config.nodes.num_nodes - 1, 1);
  config.across_slots = std::clamp(shape.tokens_under_way / num_rings, kMinSlots, kMaxSlots);
  // A part of a ring: others are read, and on their way, meanwhile.
  config.across_batch = std::max(1, config.across_slots / 4);
  if (num_bytes == 0) return Status();
  // Ranks left in nodes of very different sizes need more rings: shorter ones, then fewer.
  while (BytesOf(config) > num_bytes && config.across_slots > 1) {
    config.across_batch = std::max(1, --config.across_slots / 4);
  }
  while (BytesOf(config) > num_bytes && config.num_channels > 1) --config.num_channels;
  if (BytesOf(config) > num_bytes) {
    return Status::InvalidArgument("nodes: expected " + std::to_string(BytesOf(config)) +
                                   " bytes of registered memory, got " + std::to_string(num_bytes));
  }
  return Status();
}

Status MakeContext(const GroupShape& shape, int rank, uint32_t masked, char* memory,
                   int64_t num_bytes, Context& context) {
  Config config;
  if (Status status = MakeConfig(shape, masked, num_bytes, config); !status.ok()) return status;
  context = Context();
  context.layout = Layout(config);
  context.memory = memory;
  int number = 0;
  for (int other = 0; other < shape.arena.num_ranks; ++other) {
    if (shape.node_of_rank[other] == shape.node_of_rank[rank]) context.node_ranks |= 1u << other;
    context.number_of[other] = -1;
    if ((masked >> other & 1) != 0) continue;
    context.rank_of[number] = static_cast<int8_t>(other);
    context.number_of[other] = static_cast<int8_t>(number++);
  }
  context.number = context.number_of[rank];
  if (context.number < 0) return Status();
  for (const int source : SourcesOf(config.nodes, context.number)) {
    context.sources[context.num_sources++] = static_cast<int8_t>(source);
  }
  return Status();
}

Status MemoryBytes(const GroupShape& shape, int64_t& num_bytes) {
  Config config;
  if (Status status = MakeConfig(shape, 0, 0, config); !status.ok()) return status;
  num_bytes = BytesOf(config);
  // The least that may do for the worst case: one rank left of a node.
  config.nodes.fan = config.nodes.max_node_ranks;
  config.num_channels = 1;
  config.across_slots = 1;
  config.across_batch = 1;
  num_bytes = std::max(num_bytes, BytesOf(config));
  return Status();
}

}  // namespace wideep::two_hop
