// All ops of a group over virtual nodes one after the other, as handlers launch them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/ep/two_hop_launch.cuh"
#include "tests/kernels/exchange_cases.h"
#include "tests/kernels/virtual_nodes.h"

namespace wideep {
namespace testing {

template <typename Machine, typename Net>
std::vector<std::shared_ptr<TwoHop>> MakeTwoHops(const VirtualNodes<Machine, Net>& nodes) {
  std::vector<std::shared_ptr<TwoHop>> two_hops(nodes.shape().node_of_rank.size());
  for (size_t rank = 0; rank < two_hops.size(); ++rank) {
    const Net net = nodes.NetOf(static_cast<int>(rank));
    const TwoHopSettings settings{nodes.shape(), static_cast<int>(rank), net.memory[rank],
                                  nodes.memory_bytes()};
    const Status status = MakeTwoHop(settings, net, two_hops[rank]);
    if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
  }
  return two_hops;
}

/// One group over nodes through several cases, so that rings go on where they were.
template <typename Machine, typename Net = RingNet>
class TwoHopGroup {
 public:
  TwoHopGroup(const GroupSettings& settings, const std::vector<int>& node_sizes, uint64_t seed)
      : random_(seed),
        ranks_(settings, seed),
        nodes_(ranks_, node_sizes),
        over_nodes_{MakeTwoHops(nodes_)} {}

  /// From now on messages between nodes arrive late and in any order.
  void DeliverLate() {
    nodes_.DeliverLate();
    over_nodes_ = {MakeTwoHops(nodes_), [this] { nodes_.BeginOps(); }, [this] { nodes_.EndOps(); }};
  }

  bool Run(ExchangeCase c) {
    c.over_nodes = &over_nodes_;
    return RunExchangeCase(ranks_, c, random_);
  }
  /// The same, and what crossed: each (token, node) once a way and op.
  bool RunAndCount(const ExchangeCase& c) {
    Random same = random_;
    const HostExchange host(ranks_.settings(), c, same);
    const std::vector<int>& node_of = nodes_.shape().node_of_rank;
    const int top_k = ranks_.settings().top_k;
    uint64_t pairs = 0;
    for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
      const std::vector<int32_t>& dest = host.ranks[rank].dest_rank;
      for (int64_t token = 0; token < c.num_tokens; ++token) {
        uint32_t nodes = 0;
        for (int k = 0; k < top_k; ++k) {
          const int32_t dst = dest[token * top_k + k];
          if (dst >= 0) nodes |= 1u << node_of[dst];
        }
        pairs += __builtin_popcount(nodes & ~(1u << node_of[rank]));
      }
    }
    const CrossedNodes before = Crossed();
    if (!Run(c)) return false;
    const CrossedNodes after = Crossed();
    // Two ops each way.
    CHECK_EQ(after.tokens_out - before.tokens_out, 2 * pairs);
    CHECK_EQ(after.tokens_back - before.tokens_back, 2 * pairs);
    return true;
  }

 private:
  CrossedNodes Crossed() {
    CrossedNodes sum;
    for (const auto& two_hop : over_nodes_.ranks) {
      CrossedNodes of_rank;
      CHECK(two_hop->Crossed(of_rank).ok());
      sum.tokens_out += of_rank.tokens_out;
      sum.tokens_back += of_rank.tokens_back;
    }
    return sum;
  }

  Random random_;
  VirtualRanks<Machine> ranks_;
  VirtualNodes<Machine, Net> nodes_;
  OverNodes over_nodes_;
};

}  // namespace testing
}  // namespace wideep
