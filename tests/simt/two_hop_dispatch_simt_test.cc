// Dispatch and combine's gradient over virtual nodes in the emulator, against the host's.
#include "tests/kernels/two_hop_dispatch_cases.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using Ranks = VirtualRanks<NetworkedMachine>;
using Nodes = VirtualNodes<NetworkedMachine>;

GroupSettings Small(int num_ranks, int num_sms = 1) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 3 * num_ranks;
  group.num_sms = num_sms;
  group.max_row_bytes = 128;
  // Never: a deadlock is reported with where every thread waits.
  group.deadline_s = 1e9;
  return group;
}

int NumRanks(const std::vector<int>& node_sizes) {
  int num_ranks = 0;
  for (const int size : node_sizes) num_ranks += size;
  return num_ranks;
}

const std::vector<int> kNodes[] = {{2, 2}, {1, 1, 1}, {2, 1}, {1, 3}, {2}};

/// Every dtype; so many tokens that rings go round; several ops after another.
TEST(NodesOfManySizes) {
  uint64_t seed = 0;
  for (const std::vector<int>& sizes : kNodes) {
    const Context context(Labelled("nodes", static_cast<int64_t>(sizes.size())));
    Random random(++seed);
    Ranks ranks(Small(NumRanks(sizes)), seed);
    Nodes nodes(ranks, sizes);
    ExchangeCase c;
    for (const int64_t num_tokens : {60, 0, 7}) {
      c.num_tokens = num_tokens;
      if (!RunTwoHopDispatch(ranks, nodes, c, random)) return;
    }
    c.dtype = DType::kF32;
    c.hidden = 32;
    c.zero_tail = false;
    if (!RunTwoHopDispatch(ranks, nodes, c, random)) return;
  }
}

/// Messages arrive late and in any order, also while the next op runs.
TEST(LateNetwork) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const std::vector<int>& sizes = kNodes[seed - 1];
    Random random(seed);
    Ranks ranks(Small(NumRanks(sizes)), seed);
    Nodes nodes(ranks, sizes);
    nodes.DeliverLate();
    ExchangeCase c;
    for (const int64_t num_tokens : {60, 13, 40}) {
      c.num_tokens = num_tokens;
      if (!RunTwoHopDispatch(ranks, nodes, c, random)) return;
    }
  }
}

/// One hot expert, capacities that drop, ranks without tokens, rows in several pieces.
TEST(RandomShapes) {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    Random random(seed);
    const std::vector<int>& sizes = kNodes[seed % 5];
    GroupSettings group = Small(NumRanks(sizes), seed % 3 == 0 ? 2 : 1);
    group.top_k = static_cast<int>(Uniform(random, 1, 5));
    group.max_row_bytes = 16 * Uniform(random, 8, 64);
    Ranks ranks(group, seed);
    Nodes nodes(ranks, sizes);
    if (seed % 4 < 2) nodes.DeliverLate();
    for (int repeat = 0; repeat < 3; ++repeat) {
      ExchangeCase c;
      c.dtype = kFloatDTypes[Uniform(random, 0, 2)];
      c.hidden = 8 * Uniform(random, 1, group.max_row_bytes / 32);
      c.num_tokens = Uniform(random, 0, 40);
      c.routing = static_cast<Routing>(Uniform(random, 0, 5));
      c.capacity = Uniform(random, 0, 1) == 0 ? 0 : Uniform(random, 1, 60);
      c.delay_us = seed % 2 == 0 ? 50 : 0;
      if (!RunTwoHopDispatch(ranks, nodes, c, random)) return;
    }
  }
}

/// Ranks are left out and taken back; nodes get uneven, or vanish.
TEST(MaskedRanks) {
  for (const std::vector<int>& sizes : {std::vector<int>{2, 2}, {2, 1}}) {
    Random random(5);
    Ranks ranks(Small(NumRanks(sizes)), 5);
    Nodes nodes(ranks, sizes);
    ExchangeCase c;
    c.num_tokens = 24;
    for (const uint32_t masked : {0b010u, 0b100u, 0b011u, 0b000u}) {
      c.masked = masked;
      c.masked_run = masked != 0b100u;
      if (!RunTwoHopDispatch(ranks, nodes, c, random)) return;
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
