// All ops of a group over virtual nodes one after the other, as handlers launch them, in the
// emulator.
#include "csrc/ep/two_hop_launch.cuh"
#include "tests/kernels/exchange_cases.h"
#include "tests/kernels/virtual_nodes.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 3 * num_ranks;
  group.num_sms = 2;
  // Never: a deadlock is reported with where every thread waits.
  group.deadline_s = 1e9;
  return group;
}

class Group {
 public:
  Group(const GroupSettings& settings, const std::vector<int>& node_sizes, uint64_t seed)
      : random_(seed), ranks_(settings, seed), nodes_(ranks_, node_sizes) {
    for (int rank = 0; rank < settings.num_ranks; ++rank) {
      const RingNet net = nodes_.NetOf(rank);
      const TwoHopSettings two_hop{nodes_.shape(), rank, net.memory[rank], nodes_.memory_bytes()};
      std::shared_ptr<TwoHop>& made = two_hops_.emplace_back();
      const Status status = MakeTwoHop(two_hop, net, made);
      if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
    }
  }

  bool Run(ExchangeCase c) {
    c.over_nodes = &two_hops_;
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
    for (const auto& two_hop : two_hops_) {
      CrossedNodes of_rank;
      CHECK(two_hop->Crossed(of_rank).ok());
      sum.tokens_out += of_rank.tokens_out;
      sum.tokens_back += of_rank.tokens_back;
    }
    return sum;
  }

  Random random_;
  VirtualRanks<SimtMachine> ranks_;
  VirtualNodes<SimtMachine> nodes_;
  std::vector<std::shared_ptr<TwoHop>> two_hops_;
};

const std::vector<int> kNodes[] = {{2, 2}, {1, 1, 1}, {2, 1}, {3}};

TEST(EveryOp) {
  uint64_t seed = 0;
  for (const std::vector<int>& sizes : kNodes) {
    int num_ranks = 0;
    for (const int size : sizes) num_ranks += size;
    Group group(Small(num_ranks), sizes, ++seed);
    for (const DType dtype : kFloatDTypes) {
      const Context context(Labelled("nodes", static_cast<int64_t>(sizes.size())));
      ExchangeCase c;
      c.dtype = dtype;
      c.num_tokens = dtype == DType::kF16 ? 0 : 33;
      c.capacity = dtype == DType::kF32 ? 60 : 0;
      c.delay_us = dtype == DType::kF32 ? 50 : 0;
      if (!group.RunAndCount(c)) return;
    }
  }
}

/// Plans that are older than the mask, too.
TEST(Masks) {
  uint64_t seed = 0;
  for (const bool masked_after_plan : {false, true}) {
    Group group(Small(4), {2, 2}, ++seed);
    ExchangeCase c;
    c.num_tokens = 17;
    c.masked_after_plan = masked_after_plan;
    c.zero_tail = masked_after_plan;
    for (const uint32_t masked : {0b0100u, 0b0011u, 0b0110u, 0b0000u}) {
      c.masked = masked;
      c.masked_run = masked != 0b0100u;
      if (!group.Run(c)) return;
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
