// The exchange kernels in the emulator, against the host's.
#include <cstdlib>

#include "tests/kernels/exchange_sweep.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using Ranks = VirtualRanks<SimtMachine>;

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 4 * num_ranks;
  group.num_sms = 2;
  // Never: a deadlock is reported with where every thread waits.
  group.deadline_s = 1e9;
  return group;
}

TEST(OneRank) {
  Random random(1);
  Ranks ranks(Small(1));
  ExchangeCase c;
  c.num_tokens = 9;
  RunExchangeCase(ranks, c, random);
}

TEST(EveryForm) {
  uint64_t seed = 0;
  for (const bool zero_copy : {true, false}) {
    for (const auto dispatch : {DispatchForm::kPush, DispatchForm::kPull}) {
      for (const auto combine : kCombineForms) {
        GroupSettings group = Small(3);
        group.zero_copy = zero_copy;
        Random random(++seed);
        Ranks ranks(group, seed);
        ExchangeCase c;
        c.num_tokens = 11;
        c.dispatch_form = dispatch;
        c.combine_form = combine;
        c.num_chunks = 3;
        RunExchangeCase(ranks, c, random);
      }
    }
  }
}

TEST(RandomShapes) { RunRandomExchanges<SimtMachine>(4, 100, 16, 128, 2, 0); }

TEST(RandomShapesWithDelays) { RunRandomExchanges<SimtMachine>(2, 1000, 12, 80, 2, 50); }

/// Sums of two and more rows at every rank, in as many chunks as there can be.
TEST(ReduceInChunks) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    GroupSettings group = Small(2);
    group.num_sms = seed % 2 == 0 ? 2 : 4;
    Random random(seed);
    Ranks ranks(group, seed);
    ExchangeCase c;
    c.combine_form = CombineForm::kReduce;
    c.delay_us = seed % 3 == 0 ? 50 : 0;
    for (const int num_chunks : {kMaxSumChunks, 5}) {
      c.num_tokens = 40;
      c.num_chunks = num_chunks;
      RunExchangeCase(ranks, c, random);
    }
  }
}

// ---- masked ranks ----

TEST(MaskedInEveryForm) {
  uint64_t seed = 0;
  for (const bool zero_copy : {true, false}) {
    for (const auto dispatch : {DispatchForm::kPush, DispatchForm::kPull}) {
      for (const bool masked_after_plan : {false, true}) {
        GroupSettings group = Small(3);
        group.zero_copy = zero_copy;
        Random random(++seed);
        Ranks ranks(group, seed);
        ExchangeCase c;
        c.num_tokens = 7;
        c.dispatch_form = dispatch;
        c.combine_form = kCombineForms[seed % 3];
        c.masked_after_plan = masked_after_plan;
        c.masked_run = seed % 2 == 0;
        for (const uint32_t masked : {0b010u, 0b011u, 0b000u}) {
          c.masked = masked;
          RunExchangeCase(ranks, c, random);
        }
      }
    }
  }
}

TEST(RandomMasks) {
  const char* first_seed = std::getenv("SIMT_SEED");
  const char* count = std::getenv("SIMT_COUNT");
  RunMaskedExchanges<SimtMachine>(count ? std::atoi(count) : 5,
                                  first_seed ? std::atoi(first_seed) : 300, 12, 96, 4, 0);
}

// ---- ranks that do not come, or that go ----

struct Exchange {
  explicit Exchange(Ranks& ranks, uint64_t seed) : ranks(ranks), random(seed) {}

  PlanParams Plan(int rank) {
    const GroupSettings& group = ranks.settings();
    return TakePlan(ranks, rank,
                    ChooseExperts(random, Routing::kUniform, /*num_tokens=*/8, group.top_k,
                                  group.num_experts, group.num_ranks));
  }

  Ranks& ranks;
  Random random;
};

/// Everyone but `missing` has a record that blames it.
void CheckBlamed(Ranks& ranks, int missing) {
  for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
    if (rank == missing) continue;
    const Context context(Labelled("rank", rank));
    const ErrorRecord& record = ranks.record(rank);
    CHECK_EQ(record.failure, static_cast<uint32_t>(Failure::kDeadline));
    CHECK_EQ(record.peer, missing);
    CHECK_EQ(record.rank, rank);
  }
}

TEST(MissingRankIsNamed) {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    GroupSettings group = Small(3);
    group.deadline_s = 20;
    Ranks ranks(group, seed);
    Exchange exchange(ranks, seed);
    for (const int rank : {0, 2}) {
      CHECK(LaunchPlan(exchange.Plan(rank), ranks.stream(rank)).ok());
    }
    if (ranks.machine().Synchronize()) CheckBlamed(ranks, 1);
  }
}

/// The others mask it and go on, whatever it left half done.
TEST(KilledRankIsMasked) {
  int num_failed = 0;
  for (uint64_t seed = 1; seed <= 9; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    GroupSettings group = Small(3);
    group.deadline_s = 20;
    group.zero_copy = seed % 3 != 0;
    Ranks ranks(group, seed);
    Exchange exchange(ranks, seed);
    for (int rank = 0; rank < 3; ++rank) {
      CHECK(LaunchPlan(exchange.Plan(rank), ranks.stream(rank)).ok());
    }
    ranks.machine().device().KillAt(1, seed * 40'000);
    if (!ranks.machine().Synchronize()) continue;
    num_failed += ranks.record(0).failure != 0;
    ExchangeCase c;
    c.masked = 0b010;
    c.masked_run = false;
    c.dispatch_form = seed % 2 == 0 ? DispatchForm::kPush : DispatchForm::kPull;
    for (int repeat = 0; repeat < 2; ++repeat) RunExchangeCase(ranks, c, exchange.random);
  }
  CHECK(num_failed > 0);
}

/// Ranks that give up under a mask tell each other, and not those that are masked.
TEST(FailureUnderAMask) {
  GroupSettings group = Small(3);
  group.deadline_s = 20;
  Ranks ranks(group, 5);
  ranks.Mask(0b010);
  ranks.PoisonMaskedArenas();
  for (const int rank : {0, 2}) {
    std::vector<int32_t> topk_idx(8, 3);
    if (rank == 2) topk_idx[5] = group.num_experts;
    CHECK(LaunchPlan(TakePlan(ranks, rank, topk_idx), ranks.stream(rank)).ok());
  }
  CHECK(ranks.machine().Synchronize());
  for (const int rank : {0, 2}) {
    CHECK_EQ(ranks.record(rank).failure, static_cast<uint32_t>(Failure::kIndexRange));
    CHECK_EQ(ranks.record(rank).reporter, 2);
  }
  CHECK(ranks.ArenasUntouched());
}

/// A masked rank that never heard of its mask runs into its deadline, and nobody else notices.
TEST(LateMaskedRankStopsNobody) {
  GroupSettings group = Small(3);
  group.deadline_s = 20;
  Ranks ranks(group, 3);
  Exchange exchange(ranks, 3);
  ranks.Mask(0b010);
  const uint32_t unaware = 0;
  ranks.machine().CopyIn(ranks.context(1).arena + offsetof(Control, masked), &unaware, 4);
  CHECK(LaunchPlan(exchange.Plan(1), ranks.stream(1)).ok());
  CHECK(ranks.machine().Synchronize());
  CHECK_EQ(ranks.record(1).failure, static_cast<uint32_t>(Failure::kDeadline));
  ExchangeCase c;
  c.masked = 0b010;
  c.masked_run = false;
  RunExchangeCase(ranks, c, exchange.random);
}

/// In the middle of a plan, at a time that differs from seed to seed. Whoever has not finished by
/// then gives up.
TEST(KilledRankIsNamed) {
  int num_blamed = 0;
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    GroupSettings group = Small(2);
    group.deadline_s = 20;
    group.zero_copy = seed % 3 != 0;
    Ranks ranks(group, seed);
    Exchange exchange(ranks, seed);
    for (int rank = 0; rank < 2; ++rank) {
      CHECK(LaunchPlan(exchange.Plan(rank), ranks.stream(rank)).ok());
    }
    ranks.machine().device().KillAt(1, seed * 50'000);
    if (!ranks.machine().Synchronize()) continue;
    if (ranks.record(0).failure == 0) continue;
    ++num_blamed;
    CheckBlamed(ranks, 1);
  }
  CHECK(num_blamed > 0);
}

/// In the middle of combine, when homes wait for its sums.
TEST(KilledRankOwesSums) {
  int num_owed = 0;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    GroupSettings group = Small(2);
    group.deadline_s = 20;
    Ranks ranks(group, seed);
    Exchange exchange(ranks, seed);
    std::vector<CombineParams> combine;
    for (int rank = 0; rank < 2; ++rank) {
      const PlanParams plan = exchange.Plan(rank);
      CHECK(LaunchPlan(plan, ranks.stream(rank)).ok());
      CombineParams& p = combine.emplace_back();
      p.peers = plan.peers;
      p.plan = {plan.dest_rank,  plan.dest_row,     plan.num_rows,
                plan.row_source, plan.arrival_rows, plan.rows_per_source};
      p.form = CombineForm::kReduce;
      p.num_tokens = plan.num_tokens;
      p.top_k = plan.top_k;
      p.hidden = 64;
      p.num_chunks = 4;
      p.y = ranks.Take<char>(rank, plan.capacity * 128);
      p.sums = ranks.Take<char>(rank, plan.capacity * 128);
      p.row_scalars = ranks.Take<float>(rank, plan.capacity);
      p.out = ranks.Take<char>(rank, plan.num_tokens * 128);
    }
    CHECK(ranks.machine().Synchronize());
    for (int rank = 0; rank < 2; ++rank) {
      CHECK(LaunchCombine(combine[rank], ranks.stream(rank)).ok());
    }
    simt::Device& device = ranks.machine().device();
    device.KillAt(1, device.stats().now_ns + seed * 10'000);
    if (!ranks.machine().Synchronize()) continue;
    const ErrorRecord& record = ranks.record(0);
    if (record.failure == 0) continue;
    CheckBlamed(ranks, 1);
    if (record.phase != static_cast<uint32_t>(Phase::kSums)) continue;
    ++num_owed;
    CHECK_CONTAINS(Describe(record, group.deadline_s, group.top_k), "for rank 1 to sum its rows");
  }
  CHECK(num_owed > 0);
}

}  // namespace
}  // namespace testing
}  // namespace wideep
