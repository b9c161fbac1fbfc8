// Virtual ranks on virtual nodes: what the kernels of the exchange between nodes need beside
// virtual_ranks.h.
#pragma once

#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "csrc/ep/two_hop_rank.cuh"
#include "tests/cpp/check.h"
#include "tests/kernels/ring_net.h"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace testing {

inline int NumRanks(const std::vector<int>& node_sizes) {
  return std::accumulate(node_sizes.begin(), node_sizes.end(), 0);
}

/// Nodes of the given sizes over `ranks`. Other nodes' arenas have no address. `Net`: RingNet,
/// which puts from staging memory, or MappedNet, which writes in place.
template <typename Machine, typename Net = RingNet>
class VirtualNodes {
 public:
  /// By default rings are short, and go round with few tokens.
  VirtualNodes(VirtualRanks<Machine>& ranks, const std::vector<int>& node_sizes,
               int tokens_under_way = 20)
      : ranks_(ranks) {
    const GroupSettings& group = ranks.settings();
    shape_.arena = {group.num_ranks,     group.num_experts, group.top_k,
                    group.max_row_bytes, group.num_sms,     group.chunk};
    shape_.tokens_under_way = tokens_under_way;
    for (size_t node = 0; node < node_sizes.size(); ++node) {
      for (int i = 0; i < node_sizes[node]; ++i) {
        shape_.node_of_rank.push_back(static_cast<int>(node));
      }
    }
    CHECK_EQ(static_cast<int>(shape_.node_of_rank.size()), group.num_ranks);
    const Status status = two_hop::MemoryBytes(shape_, memory_bytes_);
    if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      net_.memory[rank] =
          static_cast<char*>(ranks.machine().Allocate(rank, static_cast<uint64_t>(memory_bytes_)));
      net_.arenas[rank] = ranks.context(rank).arena;
      ForgetOtherNodes(rank);
    }
    contexts_.resize(group.num_ranks);
    Reset(0);
  }

  /// What TwoHop::Reset does on every rank; VirtualRanks::Mask comes with it.
  void Reset(uint32_t masked) {
    for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
      const Status status = two_hop::MakeContext(shape_, rank, masked, net_.memory[rank],
                                                 memory_bytes_, contexts_[rank]);
      if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
      ranks_.machine().Fill(net_.memory[rank], 0, memory_bytes_);
      ranks_.machine().CopyIn(ContextOnGpu(rank), &contexts_[rank], sizeof(two_hop::Context));
    }
  }

  const two_hop::GroupShape& shape() const { return shape_; }
  const two_hop::Context& context(int rank) const { return contexts_[rank]; }
  const two_hop::Nodes& nodes() const { return contexts_[0].layout.config().nodes; }
  Net NetOf(int rank) const {
    Net net = net_;
    if constexpr (std::is_same_v<Net, RingNet>) {
      if (!outboxes_.empty()) net.outbox = outboxes_[rank];
    }
    return net;
  }
  int64_t memory_bytes() const { return memory_bytes_; }

  /// From now on messages are late. The machine has a NetworkStream for each rank.
  void DeliverLate() {
    static_assert(std::is_same_v<Net, RingNet>, "stores are not delivered");
    for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
      outboxes_.push_back(static_cast<Outbox*>(ranks_.machine().Allocate(rank, sizeof(Outbox))));
    }
  }
  /// Around the ops of all ranks that are launched until the machine is synchronized.
  void BeginOps() {
    for (size_t rank = 0; rank < outboxes_.size(); ++rank) {
      ranks_.machine().Fill(outboxes_[rank], 0, sizeof(Outbox));
      CHECK(Launch(NetworkKernel<NetworkParams>, 1, 32, 0,
                   ranks_.machine().NetworkStream(static_cast<int>(rank)),
                   NetworkParams{outboxes_[rank]}, "network")
                .ok());
    }
  }
  void EndOps() {
    for (size_t rank = 0; rank < outboxes_.size(); ++rank) {
      CHECK(Launch(CloseNetworkKernel<NetworkParams>, 1, 32, 0,
                   ranks_.stream(static_cast<int>(rank)), NetworkParams{outboxes_[rank]},
                   "end of the network")
                .ok());
    }
  }

  /// What LaunchTwoHop.. take, from an op's params.
  template <typename Op>
  two_hop::Params<Op, Net> Params(int rank, const Op& op) const {
    two_hop::Params<Op, Net> params{op, ContextOnGpu(rank),
                                    contexts_[rank].layout.config().slot_bytes, shape_.num_nodes(),
                                    NetOf(rank)};
    params.op.peers.node_ranks = contexts_[rank].node_ranks;
    return params;
  }
  two_hop::RankState State(int rank) {
    const auto* state = reinterpret_cast<const two_hop::RankState*>(
        net_.memory[rank] + contexts_[rank].layout.num_bytes());
    return ranks_.template Read<two_hop::RankState>(state, 1)[0];
  }

 private:
  two_hop::Context* ContextOnGpu(int rank) const {
    return two_hop::ContextIn(net_.memory[rank], memory_bytes_);
  }
  void ForgetOtherNodes(int rank) {
    char* const at = ranks_.context(rank).arena + ranks_.context(rank).layout.peer_table;
    PeerTable table;
    ranks_.machine().CopyOut(&table, at, sizeof(table));
    for (int peer = 0; peer < ranks_.num_ranks(); ++peer) {
      if (shape_.node_of_rank[peer] == shape_.node_of_rank[rank]) continue;
      table.arena[peer] = nullptr;
      table.num_regions[peer] = 0;
    }
    ranks_.machine().CopyIn(at, &table, sizeof(table));
  }

  VirtualRanks<Machine>& ranks_;
  two_hop::GroupShape shape_;
  Net net_{};
  int64_t memory_bytes_ = 0;
  std::vector<two_hop::Context> contexts_;
  std::vector<Outbox*> outboxes_;  // none: messages are not late
};

}  // namespace testing
}  // namespace wideep
