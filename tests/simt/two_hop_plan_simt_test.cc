// The plan over virtual nodes in the emulator, against the host's.
#include <cstdlib>

#include "tests/kernels/two_hop_plan_cases.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using Plans = NodesPlans<NetworkedMachine>;

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 3 * num_ranks;
  group.num_sms = 2;
  // Never: a deadlock is reported with where every thread waits.
  group.deadline_s = 1e9;
  return group;
}

/// `late`: over a network that delivers late and in any order, also while the next plan runs.
void RunPlans(const GroupSettings& group, const std::vector<int>& node_sizes, uint64_t seed,
              bool late, int64_t max_tokens = 40, int delay_us = 0) {
  const Context context(Labelled("seed", static_cast<int64_t>(seed)));
  Plans plans(group, node_sizes, seed);
  if (late) plans.nodes().DeliverLate();
  RunNodesPlans(plans, max_tokens, delay_us);
}

TEST(TwoNodesOfTwo) {
  RunPlans(Small(4), {2, 2}, 1, /*late=*/false);
  RunPlans(Small(4), {2, 2}, 2, /*late=*/true);
}

TEST(EveryRankANode) {
  RunPlans(Small(3), {1, 1, 1}, 3, /*late=*/false);
  RunPlans(Small(3), {1, 1, 1}, 4, /*late=*/true);
}

TEST(UnevenNodes) {
  RunPlans(Small(3), {2, 1}, 5, /*late=*/true);
  RunPlans(Small(4), {1, 3}, 6, /*late=*/false, 40, 50);
  RunPlans(Small(4), {1, 3}, 7, /*late=*/true);
}

TEST(OneNode) { RunPlans(Small(2), {2}, 8, /*late=*/false); }

/// Slots of fewer entries than a warp has lanes: rings wrap many times.
TEST(SmallSlots) {
  GroupSettings group = Small(3);
  group.top_k = 6;
  group.max_row_bytes = 16;
  RunPlans(group, {2, 1}, 9, /*late=*/false, 160);
  RunPlans(group, {1, 2}, 10, /*late=*/true, 100);
}

/// More than two blocks, and a channel for each.
TEST(ManyBlocks) {
  GroupSettings group = Small(3);
  group.num_sms = 4;
  group.top_k = 8;
  Plans plans(group, {1, 2}, 8);
  NodesPlanCase c;
  c.num_tokens = 1200;
  for (const int64_t capacity : {0, 9000}) {
    c.capacity = capacity;
    plans.Run({c});
  }
}

TEST(Masked) {
  uint64_t seed = 10;
  for (const bool masked_run : {true, false}) {
    Plans plans(Small(4), {2, 2}, ++seed);
    for (const uint32_t masked : {0b0010u, 0b0011u, 0b0110u, 0b0000u}) {
      NodesPlanCase c;
      c.masked = masked;
      c.masked_run = masked_run;
      NodesPlanCase drops = c;
      drops.capacity = 14;
      plans.Run({c, drops});
    }
  }
}

/// Nodes, shapes, networks and masks by chance.
TEST(RandomGroups) {
  const char* first_seed = std::getenv("SIMT_SEED");
  const char* count = std::getenv("SIMT_COUNT");
  const uint64_t begin = first_seed ? std::strtoull(first_seed, nullptr, 10) : 900;
  for (uint64_t seed = begin; seed < begin + (count ? std::atoi(count) : 4); ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    Random random(seed);
    std::vector<int> node_sizes;
    int num_ranks = 0;
    for (auto nodes = Uniform(random, 2, 3); nodes > 0; --nodes) {
      node_sizes.push_back(static_cast<int>(Uniform(random, 1, 3)));
      num_ranks += node_sizes.back();
    }
    GroupSettings group = Small(num_ranks);
    group.num_experts = num_ranks * static_cast<int>(Uniform(random, 1, 12));
    group.top_k = static_cast<int>(Uniform(random, 1, 9));
    group.num_sms = static_cast<int>(Uniform(random, 1, 3));
    group.max_row_bytes = 16 * Uniform(random, 1, 40);
    Plans plans(group, node_sizes, seed);
    if (seed % 2 == 0) plans.nodes().DeliverLate();
    NodesPlanCase c;
    // The last one has all ranks again.
    for (const bool masks : {false, true, true, false}) {
      if (masks) c.masked = static_cast<uint32_t>(Uniform(random, 0, (1 << num_ranks) - 2));
      if (!masks) c.masked = 0;
      std::vector<NodesPlanCase> cases;
      for (int i = 0; i < 3; ++i) {
        c.num_tokens = Uniform(random, 1, 60);
        c.routing = kAllRoutings[Uniform(random, 0, 5)];
        c.capacity = Uniform(random, 0, 1) * Uniform(random, 1, c.num_tokens * group.top_k);
        c.masked_run = Uniform(random, 0, 1) != 0;
        cases.push_back(c);
      }
      if (!plans.Run(cases)) return;
    }
  }
}

// ---- ranks that give up, or do not come ----

/// Plans of 8 tokens, one of them changed, without the ranks of `missing`.
struct FailingPlan {
  FailingPlan(const GroupSettings& group, const std::vector<int>& node_sizes, uint64_t seed)
      : plans(group, node_sizes, seed) {}

  PlanParams Plan(int rank, int bad_expert = -1) {
    const GroupSettings& group = plans.ranks().settings();
    std::vector<int32_t> topk_idx = ChooseExperts(plans.random(), Routing::kUniform, 8, group.top_k,
                                                  group.num_experts, group.num_ranks);
    if (bad_expert >= 0) topk_idx[5] = bad_expert;
    return TakePlan(plans.ranks(), rank, topk_idx);
  }
  void CheckRecords(Failure failure, int reporter, int peer, uint32_t without = 0) {
    CHECK(plans.ranks().machine().Synchronize());
    for (int rank = 0; rank < plans.ranks().num_ranks(); ++rank) {
      if (without >> rank & 1) continue;
      const Context context(Labelled("rank", rank));
      const ErrorRecord& record = plans.ranks().record(rank);
      CHECK_EQ(record.failure, static_cast<uint32_t>(failure));
      CHECK_EQ(record.rank, rank);
      if (reporter >= 0) CHECK_EQ(record.reporter, reporter);
      if (peer >= 0) CHECK_EQ(record.peer, peer);
    }
  }

  Plans plans;
};

TEST(IndexOutOfRange) {
  for (int bad = 0; bad < 4; ++bad) {
    const Context context(Labelled("bad", bad));
    GroupSettings group = Small(4);
    group.deadline_s = 20;
    FailingPlan f(group, {2, 2}, 20 + bad);
    for (int rank = 0; rank < 4; ++rank) {
      f.plans.Launch(rank, f.Plan(rank, rank == bad ? group.num_experts : -1));
    }
    f.CheckRecords(Failure::kIndexRange, bad, bad);
    const ErrorRecord& record = f.plans.ranks().record(bad);
    CHECK_EQ(record.expected, 5u);
    CHECK_EQ(record.got, static_cast<uint64_t>(group.num_experts));
  }
}

TEST(OverflowIsAnError) {
  GroupSettings group = Small(3);
  group.deadline_s = 20;
  FailingPlan f(group, {2, 1}, 30);
  for (int rank = 0; rank < 3; ++rank) {
    // All to rank 2: 3 * 32 selections.
    PlanParams p = TakePlan(f.plans.ranks(), rank, std::vector<int32_t>(32, 7), 90);
    p.overflow_is_error = true;
    f.plans.Launch(rank, p);
  }
  f.CheckRecords(Failure::kOverflow, 2, 2);
  CHECK_EQ(f.plans.ranks().record(2).expected, 90u);
  CHECK_EQ(f.plans.ranks().record(2).got, 96u);
}

/// Whoever it is, a home or a forwarder of others.
TEST(MissingRankIsNamed) {
  for (const std::vector<int>& node_sizes : {std::vector<int>{2, 2}, {1, 3}}) {
    for (int missing = 0; missing < 4; ++missing) {
      const Context context(Labelled("missing", missing));
      GroupSettings group = Small(4);
      group.deadline_s = 20;
      FailingPlan f(group, node_sizes, 40 + missing);
      for (int rank = 0; rank < 4; ++rank) {
        if (rank != missing) f.plans.Launch(rank, f.Plan(rank));
      }
      f.CheckRecords(Failure::kDeadline, -1, missing, 1u << missing);
    }
  }
}

/// In the middle of a plan, at a time that differs from seed to seed; the others mask it and go on.
TEST(KilledRankIsMasked) {
  int num_failed = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    GroupSettings group = Small(3);
    group.deadline_s = 20;
    FailingPlan f(group, {2, 1}, seed);
    for (int rank = 0; rank < 3; ++rank) f.plans.Launch(rank, f.Plan(rank));
    f.plans.ranks().machine().device().KillAt(1, seed * 60'000);
    if (!f.plans.ranks().machine().Synchronize()) continue;
    num_failed += f.plans.ranks().record(0).failure != 0 && f.plans.ranks().record(2).failure != 0;
    NodesPlanCase c;
    c.masked = 0b010;
    c.masked_run = false;
    f.plans.Run({c, c});
  }
  CHECK(num_failed > 0);
}

TEST(BuffersThatAreNotMapped) {
  GroupSettings group = Small(3);
  group.zero_copy = false;
  group.deadline_s = 20;
  FailingPlan f(group, {2, 1}, 50);
  for (int rank = 0; rank < 3; ++rank) f.plans.Launch(rank, f.Plan(rank));
  f.CheckRecords(Failure::kNotMapped, -1, -1);
}

}  // namespace
}  // namespace testing
}  // namespace wideep
