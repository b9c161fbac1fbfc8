// Combine over virtual nodes in the emulator.
#include <cstdlib>

#include "tests/kernels/two_hop_combine_cases.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using Ranks = VirtualRanks<NetworkedMachine>;

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 4 * num_ranks;
  // Few warps: few channels, whose rings go round.
  group.num_sms = 1;
  group.deadline_s = 1e9;  // never: a deadlock is reported with where every thread waits
  return group;
}

/// One group through several cases, so that rings go on where they were.
class Group {
 public:
  /// `late`: the network delivers late and in any order.
  Group(const GroupSettings& settings, const std::vector<int>& node_sizes, uint64_t seed,
        bool late = false)
      : random_(seed), ranks_(settings, seed), nodes_(ranks_, node_sizes) {
    if (late) nodes_.DeliverLate();
  }
  bool Run(const ExchangeCase& c, int num_calls = 2) {
    return RunTwoHopCombine(ranks_, nodes_, c, num_calls, random_);
  }
  /// All ranks but one launch combine, and name it.
  void CheckFails(int missing) {
    ExchangeCase c;
    const HostExchange host(ranks_.settings(), c, random_);
    for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
      if (rank == missing) continue;
      const CombineParams p = TakeCombine(ranks_, host, c, rank);
      CHECK(LaunchTwoHopCombine(nodes_.Params(rank, p), ranks_.stream(rank)).ok());
    }
    CHECK(ranks_.machine().Synchronize());
    for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
      if (rank == missing) continue;
      CHECK_EQ(ranks_.record(rank).failure, static_cast<uint32_t>(Failure::kDeadline));
      // In its node those who wait for it are named, too: the emulator's time runs too fast for the
      // patience of ring waits to count.
      const std::vector<int>& node_of = nodes_.shape().node_of_rank;
      CHECK_EQ(node_of[ranks_.record(rank).peer], node_of[missing]);
      CHECK_EQ(ranks_.record(rank).op, static_cast<uint32_t>(ExchangeOp::kCombine));
    }
  }
  Status Launch(int64_t hidden, DType dtype) {
    CombineParams p;
    p.peers = ranks_.context(0);
    p.dtype = dtype;
    p.hidden = hidden;
    p.top_k = ranks_.settings().top_k;
    return LaunchTwoHopCombine(nodes_.Params(0, p), ranks_.stream(0));
  }

 private:
  Random random_;
  Ranks ranks_;
  VirtualNodes<NetworkedMachine> nodes_;
};

TEST(TwoNodesOfTwo) {
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    Group group(Small(4), {2, 2}, seed, /*late=*/seed == 2);
    for (const DType dtype : kFloatDTypes) {
      ExchangeCase c;
      c.dtype = dtype;
      c.num_tokens = 37;
      if (!group.Run(c)) return;
    }
  }
}

TEST(EveryRouting) {
  Group group(Small(4), {2, 2}, 3);
  for (const Routing routing : kAllRoutings) {
    for (const int64_t capacity : {0, 21}) {  // 21: rows are dropped
      ExchangeCase c;
      c.routing = routing;
      c.capacity = capacity;
      c.num_tokens = 17;
      if (!group.Run(c, 1)) return;
    }
  }
}

TEST(OtherNodes) {
  uint64_t seed = 10;
  for (const std::vector<int>& node_sizes : std::vector<std::vector<int>>{
           {1, 1, 1}, {2, 1}, {1, 2}, {3, 1}, {2, 3}, {3}, {1, 1, 1, 1, 1}, {1}}) {
    const Context context("nodes " + std::to_string(seed));
    ++seed;
    Group group(Small(NumRanks(node_sizes)), node_sizes, seed,
                /*late=*/seed % 2 == 0);
    for (const int64_t num_tokens : {0, 1, 12}) {
      ExchangeCase c;
      c.num_tokens = num_tokens;
      if (!group.Run(c, 1)) return;
    }
  }
}

/// The window of arrivals goes round, with tokens that have as many rows at a host as can be.
TEST(ManySelections) {
  for (const int top_k : {1, 4, kMaxKernelTopK}) {
    GroupSettings settings = Small(3);
    settings.top_k = top_k;
    settings.num_experts = 3 * kMaxKernelTopK;
    Group group(settings, {2, 1}, top_k);
    for (const Routing routing : {Routing::kUniform, Routing::kOneHotRank}) {
      ExchangeCase c;
      c.routing = routing;
      c.num_tokens = 40;
      if (!group.Run(c, 1)) return;
    }
  }
}

TEST(LongRows) {
  GroupSettings settings = Small(3);
  settings.max_row_bytes = 4096;
  Group group(settings, {1, 2}, 5);
  for (const int64_t hidden : {1024, 676, 4}) {
    ExchangeCase c;
    c.dtype = DType::kF32;
    c.hidden = hidden;
    c.num_tokens = 6;
    if (!group.Run(c, 1)) return;
  }
}

TEST(RanksThatComeLate) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    Group group(Small(3), {2, 1}, seed, /*late=*/seed > 1);
    ExchangeCase c;
    c.num_tokens = 23;
    c.delay_us = 100;
    if (!group.Run(c, 3)) return;
  }
}

/// Nodes of what is left: a node loses a rank, its first one, or falls away; then all are back.
TEST(MaskedRanks) {
  uint64_t seed = 0;
  for (const bool masked_after_plan : {false, true}) {
    for (const bool masked_run : {false, true}) {
      Group group(Small(4), {2, 2}, ++seed, masked_run);
      for (const uint32_t masked : {0b0010u, 0b0001u, 0b1100u, 0b0110u, 0b0000u}) {
        ExchangeCase c;
        c.num_tokens = 13;
        c.masked = masked;
        c.masked_after_plan = masked_after_plan;
        c.masked_run = masked_run;
        if (!group.Run(c, 1)) return;
      }
    }
  }
}

TEST(RandomGroups) {
  const char* first_seed = std::getenv("SIMT_SEED");
  const char* count = std::getenv("SIMT_COUNT");
  const int first = first_seed ? std::atoi(first_seed) : 100;
  for (int seed = first; seed < first + (count ? std::atoi(count) : 6); ++seed) {
    const Context context(Labelled("seed", seed));
    Random random(seed);
    std::vector<int> node_sizes;
    for (int left = static_cast<int>(Uniform(random, 2, 6)); left > 0; left -= node_sizes.back()) {
      node_sizes.push_back(static_cast<int>(Uniform(random, 1, std::min(left, 4))));
    }
    GroupSettings settings = Small(NumRanks(node_sizes));
    settings.num_sms = static_cast<int>(Uniform(random, 1, 2));
    settings.num_experts = settings.num_ranks * static_cast<int>(Uniform(random, 2, 8));
    settings.top_k = static_cast<int>(Uniform(random, 1, std::min(8, settings.num_experts)));
    Group group(settings, node_sizes, seed, /*late=*/seed % 3 != 0);
    for (int i = 0; i < 3; ++i) {
      ExchangeCase c;
      c.num_tokens = Uniform(random, 0, 40);
      c.dtype = kFloatDTypes[Uniform(random, 0, 2)];
      c.hidden = 8 * Uniform(random, 1, 32);
      c.routing = kAllRoutings[Uniform(random, 0, 5)];
      c.capacity =
          Uniform(random, 0, 2) == 0 ? Uniform(random, 1, c.num_tokens * settings.top_k + 1) : 0;
      c.delay_us = Uniform(random, 0, 1) == 0 ? 30 : 0;
      if (i == 1) {
        c.masked = static_cast<uint32_t>(Uniform(random, 0, (1 << settings.num_ranks) - 2));
        c.masked_after_plan = Uniform(random, 0, 1) == 0;
        c.masked_run = Uniform(random, 0, 1) == 0;
      }
      if (!group.Run(c)) return;
    }
  }
}

/// Everyone ends, on both nodes, and names it.
TEST(MissingRank) {
  for (int missing = 0; missing < 3; ++missing) {
    const Context context(Labelled("missing", missing));
    GroupSettings settings = Small(3);
    settings.deadline_s = 20;
    Group group(settings, {2, 1}, missing + 1);
    group.CheckFails(missing);
  }
}

TEST(RowsThatDoNotFit) {
  GroupSettings settings = Small(2);
  settings.max_row_bytes = 128;
  Group group(settings, {1, 1}, 1);
  CHECK_CONTAINS(group.Launch(72, DType::kBF16).message(), "expected slots of at most 256 bytes");
  CHECK_CONTAINS(group.Launch(60, DType::kBF16).message(), "of a multiple of 16 bytes");
}

}  // namespace
}  // namespace testing
}  // namespace wideep
