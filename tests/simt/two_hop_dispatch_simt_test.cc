// Dispatch and combine's gradient over virtual nodes in the emulator, against the host's.
#include <cstdlib>

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
  const char* first_seed = std::getenv("SIMT_SEED");
  const char* count = std::getenv("SIMT_COUNT");
  const uint64_t first = first_seed ? std::atoi(first_seed) : 1;
  for (uint64_t seed = first; seed < first + (count ? std::atoi(count) : 8); ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    Random random(seed);
    const std::vector<int>& sizes = kNodes[Uniform(random, 0, 4)];
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

// ---- ranks that do not come, or that go ----

/// Nobody blames a rank of another node than the one that is missing. (Within that node the
/// emulator cannot tell: its time runs too fast for the patience of ring waits to count.)
void CheckBlamed(const Nodes& nodes, const ErrorRecord& record, int missing) {
  const std::vector<int>& node_of = nodes.shape().node_of_rank;
  CHECK_EQ(record.failure, static_cast<uint32_t>(Failure::kDeadline));
  CHECK_EQ(node_of[record.peer], node_of[missing]);
}

/// All ranks but `missing` (-1: none) launch a dispatch.
struct Failing {
  Failing(const std::vector<int>& sizes, uint64_t seed, bool zero_copy = true)
      : random(seed), ranks(Settings(sizes, zero_copy), seed), nodes(ranks, sizes) {}
  void Dispatch(int missing) {
    ExchangeCase c;
    c.num_tokens = 40;
    const HostExchange host(ranks.settings(), c, random);
    for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
      if (rank == missing) continue;
      const DispatchParams p = TakeDispatch(ranks, rank, host, c);
      CHECK(LaunchTwoHopDispatch(nodes.Params(rank, p), ranks.stream(rank)).ok());
    }
  }
  static GroupSettings Settings(const std::vector<int>& sizes, bool zero_copy) {
    GroupSettings group = Small(NumRanks(sizes));
    group.deadline_s = 20;
    group.zero_copy = zero_copy;
    return group;
  }

  Random random;
  Ranks ranks;
  Nodes nodes;
};

/// Also on other nodes, whose ranks may wait for those that wait for it.
TEST(MissingRankIsFound) {
  uint64_t seed = 0;
  for (const std::vector<int>& sizes : {std::vector<int>{2, 2}, {1, 1, 1}, {2, 1}}) {
    for (int missing = 0; missing < NumRanks(sizes); ++missing) {
      const Context context(Labelled("nodes", static_cast<int64_t>(sizes.size())) + ", " +
                            Labelled("missing", missing));
      Failing group(sizes, ++seed);
      group.Dispatch(missing);
      if (!group.ranks.machine().Synchronize()) return;
      for (int rank = 0; rank < group.ranks.num_ranks(); ++rank) {
        if (rank == missing) continue;
        CheckBlamed(group.nodes, group.ranks.record(rank), missing);
      }
    }
  }
}

/// In the middle of a dispatch. The others end, and go on without it.
TEST(KilledRankIsMasked) {
  int num_failed = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    Failing group({2, 2}, seed);
    group.Dispatch(-1);
    group.ranks.machine().device().KillAt(1, seed * 20'000);
    if (!group.ranks.machine().Synchronize()) return;
    int num_records = 0;
    for (const int rank : {0, 2, 3}) {
      const ErrorRecord& record = group.ranks.record(rank);
      num_records += record.failure == static_cast<uint32_t>(Failure::kDeadline);
    }
    num_failed += num_records > 0;
    ExchangeCase c;
    c.num_tokens = 20;
    c.masked = 0b0010;
    c.masked_run = false;
    for (int repeat = 0; repeat < 2; ++repeat) {
      if (!RunTwoHopDispatch(group.ranks, group.nodes, c, group.random)) return;
    }
  }
  CHECK(num_failed > 0);
}

TEST(BuffersHaveToBeMapped) {
  Failing group({2, 1}, 1, /*zero_copy=*/false);
  group.Dispatch(-1);
  CHECK(group.ranks.machine().Synchronize());
  for (int rank = 0; rank < 3; ++rank) {
    const ErrorRecord& record = group.ranks.record(rank);
    CHECK_EQ(record.failure, static_cast<uint32_t>(Failure::kNotMapped));
    CHECK_CONTAINS(Describe(record, 20, 4), "cannot be mapped");
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
