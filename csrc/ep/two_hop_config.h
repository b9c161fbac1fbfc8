// How the exchange between nodes is set up on a rank: nodes among the ranks that are not masked,
// and rings that its warps and its registered memory have room for. The same on every rank.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/core/layout.h"
#include "csrc/core/status.h"
#include "csrc/ep/two_hop_layout.h"

namespace wideep::two_hop {

/// Nodes of the given sizes. Fails, saying what is wrong, for none, for more than kMaxNodes, for an
/// empty one and for one of more than kMaxNodeRanks.
Status MakeNodes(const std::vector<int>& node_sizes, Nodes& nodes);

struct GroupShape {
  /// Of it: num_ranks, num_experts, top_k, max_row_bytes, num_sms.
  ArenaConfig arena{};
  std::vector<int> node_of_rank;  // [num_ranks], never falling
  /// Room in a rank's rings, in tokens, about: enough for a network, and so few that they can stay
  /// in the GPU's cache.
  int tokens_under_way = 800;

  int num_nodes() const {
    int nodes = 1;
    for (size_t rank = 1; rank < node_of_rank.size(); ++rank) {
      nodes += node_of_rank[rank] != node_of_rank[rank - 1];
    }
    return nodes;
  }
};

/// A rank as its kernels know it. They read it in registered memory, where a mask changes it: what
/// XLA has recorded is launched again with the parameters that it had.
struct Context {
  Layout layout;
  char* memory = nullptr;   // layout.num_bytes(), a RankState; at the end of all, this
  uint32_t node_ranks = 0;  // PeerContext's
  int32_t number = -1;      // this rank's among those that are not masked; -1: it is masked
  int8_t rank_of[kMaxRanks] = {};
  int8_t number_of[kMaxRanks] = {};  // -1: masked
  /// The numbers of the ranks on other nodes that this one stands for.
  int32_t num_sources = 0;
  int8_t sources[kMaxRanks] = {};
};

constexpr int64_t kContextBytes = (static_cast<int64_t>(sizeof(Context)) + 127) / 128 * 128;
/// Where it lies in registered memory of `num_bytes`, whatever the mask.
inline Context* ContextIn(char* memory, int64_t num_bytes) {
  return reinterpret_cast<Context*>(memory + num_bytes / 128 * 128 - kContextBytes);
}

/// Without the ranks whose bit is set, in at most `num_bytes` of memory (0: as much as is good).
/// Fails if a rank has too few warps for its ends of rings, or the memory does not suffice.
Status MakeConfig(const GroupShape& shape, uint32_t masked, int64_t num_bytes, Config& config);

/// As above, for one rank with this memory.
Status MakeContext(const GroupShape& shape, int rank, uint32_t masked, char* memory,
                   int64_t num_bytes, Context& context);

/// Registered memory that a rank needs, for any ranks that may be masked later.
Status MemoryBytes(const GroupShape& shape, int64_t& num_bytes);

}  // namespace wideep::two_hop
