// The low-latency kernels in the emulator, against the host's.
#include <cstdlib>

#include "tests/kernels/low_latency_interleaved.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using Ranks = VirtualRanks<SimtMachine>;

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 4 * num_ranks;
  group.num_sms = 2;
  group.chunk = 6;
  // Never: a deadlock is reported with where every thread waits.
  group.deadline_s = 1e9;
  return group;
}

TEST(Quantize) { RunQuantize<SimtMachine>(1, 9, 512); }

TEST(OneRank) {
  Random random(1);
  Ranks ranks(Small(1));
  RunLowLatencyCase(ranks, LowLatencyCase{}, random);
}

TEST(EveryWire) {
  uint64_t seed = 0;
  for (const bool once : {true, false}) {
    for (const DType dtype : kFloatDTypes) {
      for (int wire = 0; wire < 3; ++wire) {
        GroupSettings group = Small(3);
        group.once_per_rank = once;
        Random random(++seed);
        Ranks ranks(group, seed);
        LowLatencyCase c;
        c.dtype = dtype;
        c.quantize = wire > 0;
        c.dequantize = wire == 1;
        RunLowLatencyCase(ranks, c, random);
      }
    }
  }
}

TEST(Lopsided) { RunLopsidedLowLatency<SimtMachine>(3); }

TEST(OverlappedHalves) {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    Random random(seed);
    Ranks ranks(Small(2), seed);
    RunOverlappedHalves(ranks, LowLatencyCase{}, 4, random);
  }
}

TEST(DispatchHalvesAlone) {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    Random random(seed);
    Ranks ranks(Small(2), seed);
    RunDispatchHalvesAlone(ranks, LowLatencyCase{}, 4, random);
  }
}

TEST(InterleavedWithPlans) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    Random random(seed);
    Ranks ranks(Small(3), seed);
    RunInterleaved(ranks, LowLatencyCase{}, 4, random);
  }
}

TEST(RandomShapes) {
  const char* first_seed = std::getenv("SIMT_SEED");
  const char* count = std::getenv("SIMT_COUNT");
  RunRandomLowLatency<SimtMachine>(count ? std::atoi(count) : 6,
                                   first_seed ? std::atoi(first_seed) : 100, 6, 512, 3, 0);
}

TEST(RandomMasks) {
  const char* first_seed = std::getenv("SIMT_SEED");
  const char* count = std::getenv("SIMT_COUNT");
  RunMaskedLowLatency<SimtMachine>(count ? std::atoi(count) : 5,
                                   first_seed ? std::atoi(first_seed) : 700, 5, 256, 3, 0);
}

/// In the middle of a call; the others mask it and go on.
TEST(KilledRankIsMasked) {
  int num_failed = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const check::Context context(Labelled("seed", static_cast<int64_t>(seed)));
    GroupSettings group = Small(3);
    group.deadline_s = 20;
    Random random(seed);
    Ranks ranks(group, seed);
    LowLatencyRun<SimtMachine> run(ranks, LowLatencyCase{}, random);
    run.Dispatch();
    run.Combine();
    ranks.machine().device().KillAt(1, seed * 20'000);
    if (!ranks.machine().Synchronize()) continue;
    num_failed += ranks.record(0).failure != 0;
    LowLatencyCase c;
    c.masked = 0b010;
    c.masked_run = false;
    for (int repeat = 0; repeat < 3; ++repeat) RunLowLatencyCase(ranks, c, random);
  }
  CHECK(num_failed > 0);
}

TEST(RepeatedExpertIsReported) {
  GroupSettings group = Small(2);
  group.deadline_s = 5;
  Ranks ranks(group);
  for (int rank = 0; rank < 2; ++rank) {
    LowLatencyDispatchParams p;
    p.peers = ranks.context(rank);
    p.tokens = {2, group.top_k, group.num_experts, 128};
    p.x = ranks.Take<char>(rank, 2 * 256);
    std::vector<int32_t> topk_idx = {0, 1, 2, 3, 4, 5, 6, 7};
    if (rank == 1) topk_idx[6] = 4;
    p.topk_idx = ranks.TakeCopy(rank, topk_idx);
    p.rows = ranks.Take<char>(rank, 4 * 12 * 256);
    p.counts = ranks.Take<int32_t>(rank, 4);
    p.row_source = ranks.Take<int32_t>(rank, 48);
    CHECK(LaunchLowLatencyDispatch(p, ranks.stream(rank)).ok());
  }
  CHECK(ranks.machine().Synchronize());
  const std::string own = Describe(ranks.record(1), group.deadline_s, group.top_k);
  CHECK_CONTAINS(own, "twice in a token on rank 1: expert 4 in token 1");
}

TEST(MissingRankIsNamed) {
  GroupSettings group = Small(3);
  group.deadline_s = 0.2;
  Ranks ranks(group);
  Random random(2);
  for (const int rank : {0, 2}) {
    LowLatencyDispatchParams p;
    p.peers = ranks.context(rank);
    p.tokens = {2, group.top_k, group.num_experts, 128};
    p.x = ranks.Take<char>(rank, 2 * 256);
    p.topk_idx = ranks.TakeCopy(rank, std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7});
    p.rows = ranks.Take<char>(rank, 4 * 18 * 256);
    p.counts = ranks.Take<int32_t>(rank, 4);
    p.row_source = ranks.Take<int32_t>(rank, 72);
    CHECK(LaunchLowLatencyDispatch(p, ranks.stream(rank)).ok());
  }
  CHECK(ranks.machine().Synchronize());
  for (const int rank : {0, 2}) {
    CHECK_EQ(ranks.record(rank).failure, static_cast<uint32_t>(Failure::kDeadline));
    CHECK_CONTAINS(Describe(ranks.record(rank), group.deadline_s, group.top_k), "ll_dispatch: ");
    CHECK_CONTAINS(Describe(ranks.record(rank), group.deadline_s, group.top_k), "for rank 1 ");
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
