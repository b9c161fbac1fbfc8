// The exchange kernels with virtual ranks on one GPU, against the host's. What sanitizers and
// profilers run on.
#include <vector>

#include "tests/gpu/cuda_machine.h"
#include "tests/kernels/exchange_sweep.h"

namespace wideep {
namespace testing {
namespace {

using Ranks = VirtualRanks<CudaMachine>;

GroupSettings EightRanks() {
  GroupSettings group;
  group.num_ranks = 8;
  group.num_experts = 64;
  group.top_k = 8;
  group.num_sms = 16;
  group.max_row_bytes = 4096;
  group.pool_bytes = 256 << 20;
  return group;
}

TEST(OneRank) {
  GroupSettings group;
  group.num_ranks = 1;
  Random random(1);
  Ranks ranks(group);
  ExchangeCase c;
  c.num_tokens = 37;
  RunExchangeCase(ranks, c, random);
}

TEST(TwoRanksEveryForm) {
  for (const bool zero_copy : {true, false}) {
    for (const auto dispatch : {DispatchForm::kPush, DispatchForm::kPull}) {
      for (const auto combine : kCombineForms) {
        GroupSettings group;
        group.num_ranks = 2;
        group.zero_copy = zero_copy;
        Ranks ranks(group);
        Random random(2);
        ExchangeCase c;
        c.num_tokens = 40;
        c.dispatch_form = dispatch;
        c.combine_form = combine;
        c.num_chunks = 3;
        if (!RunExchangeCase(ranks, c, random)) return;
      }
    }
  }
}

TEST(EightRanksEveryRouting) {
  for (const bool zero_copy : {true, false}) {
    GroupSettings group = EightRanks();
    group.zero_copy = zero_copy;
    Ranks ranks(group);
    Random random(3);
    for (const Routing routing : kAllRoutings) {
      for (const int64_t capacity : {int64_t{0}, int64_t{300}}) {
        ExchangeCase c;
        c.num_tokens = 100;
        c.hidden = 64;
        c.routing = routing;
        c.capacity = capacity;
        c.dispatch_form = capacity == 0 ? DispatchForm::kPull : DispatchForm::kPush;
        c.combine_form = capacity == 0 ? CombineForm::kPush : CombineForm::kPull;
        if (!RunExchangeCase(ranks, c, random)) return;
      }
    }
  }
}

TEST(RandomShapes) { RunRandomExchanges<CudaMachine>(40, 100, 100, 300, 8, 0); }

TEST(RandomShapesWithDelays) { RunRandomExchanges<CudaMachine>(40, 1000, 60, 200, 8, 300); }

TEST(RandomMasks) { RunMaskedExchanges<CudaMachine>(30, 300, 80, 256, 8, 0); }

TEST(RandomMasksWithDelays) { RunMaskedExchanges<CudaMachine>(20, 2000, 40, 128, 8, 300); }

/// Rows of more than one piece, and a plan of more than one block.
TEST(LargeRows) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    GroupSettings group = EightRanks();
    group.num_experts = 256;
    group.max_row_bytes = 4 * 7168;
    group.pool_bytes = uint64_t{3} << 30;
    Ranks ranks(group);
    Random random(4);
    ExchangeCase c;
    c.num_tokens = 20;
    c.hidden = 7168;
    c.capacity = 200;
    c.dtype = dtype;
    for (const auto form : {DispatchForm::kPush, DispatchForm::kPull}) {
      c.dispatch_form = form;
      if (!RunExchangeCase(ranks, c, random)) return;
    }
  }
}

/// The same bits 200 times, whoever comes late.
TEST(RepeatsAreBitwiseEqual) {
  for (const bool zero_copy : {true, false}) {
    GroupSettings group = EightRanks();
    group.zero_copy = zero_copy;
    group.num_sms = 8;
    Ranks ranks(group);
    for (int repeat = 0; repeat < 100; ++repeat) {
      Random random(5);  // the same inputs; the host's results are the same bits each time
      ExchangeCase c;
      c.num_tokens = 24;
      c.hidden = 64;
      c.delay_us = 1 + repeat;
      c.dispatch_form = repeat % 2 ? DispatchForm::kPull : DispatchForm::kPush;
      if (!RunExchangeCase(ranks, c, random)) return;
    }
  }
}

/// All ranks' plans; taking memory waits for the device, so before the first launch.
std::vector<PlanParams> Plans(Ranks& ranks, const std::vector<std::vector<int32_t>>& topk_idx) {
  std::vector<PlanParams> plans;
  for (int rank = 0; rank < ranks.num_ranks(); ++rank) {
    plans.push_back(TakePlan(ranks, rank, topk_idx[rank]));
  }
  return plans;
}

TEST(MissingRankIsNamed) {
  GroupSettings group;
  group.num_ranks = 4;
  group.deadline_s = 0.2;
  Ranks ranks(group);
  const std::vector<PlanParams> plans =
      Plans(ranks, std::vector<std::vector<int32_t>>(4, std::vector<int32_t>(16, 3)));
  for (const int rank : {0, 1, 3}) CHECK(LaunchPlan(plans[rank], ranks.stream(rank)).ok());
  CHECK(ranks.machine().Synchronize());
  for (const int rank : {0, 1, 3}) {
    CHECK_EQ(ranks.record(rank).failure, static_cast<uint32_t>(Failure::kDeadline));
    const std::string text = Describe(ranks.record(rank), group.deadline_s, group.top_k);
    CHECK_CONTAINS(text, "make_plan: ");
    CHECK_CONTAINS(text, "for rank 2 to start");
  }
  // The GPU is as usable as before, and a later op of the group ends at once.
  for (const int rank : {0, 1, 3}) CHECK(LaunchPlan(plans[rank], ranks.stream(rank)).ok());
  CHECK(ranks.machine().Synchronize());
  // Without the rank the others go on, and then with it.
  Random random(6);
  ExchangeCase c;
  c.masked_run = false;
  for (const uint32_t masked : {0b0100u, 0u}) {
    c.masked = masked;
    RunExchangeCase(ranks, c, random);
  }
}

TEST(IndexOutOfRangeIsReportedOnEveryRank) {
  GroupSettings group;
  group.num_ranks = 2;
  group.deadline_s = 5;
  Ranks ranks(group);
  std::vector<std::vector<int32_t>> topk_idx(2, std::vector<int32_t>(16, 3));
  topk_idx[1][6] = group.num_experts;
  const std::vector<PlanParams> plans = Plans(ranks, topk_idx);
  for (const int rank : {0, 1}) CHECK(LaunchPlan(plans[rank], ranks.stream(rank)).ok());
  CHECK(ranks.machine().Synchronize());
  CHECK_CONTAINS(Describe(ranks.record(1), group.deadline_s, group.top_k),
                 "out of range on rank 1: got 16 at token 1, k 2");
  CHECK_CONTAINS(Describe(ranks.record(0), group.deadline_s, group.top_k),
                 "topk_idx out of range on rank 1");
}

}  // namespace
}  // namespace testing
}  // namespace wideep
