// Low-latency calls and ops of the throughput shape of one group, in turn on each rank's stream.
#pragma once

#include <vector>

#include "csrc/ep/plan.h"
#include "csrc/ep/plan_host.h"
#include "tests/kernels/low_latency_cases.h"

namespace wideep {
namespace testing {

/// Plans of changing routing between the halves of low-latency calls.
template <typename Machine>
bool RunInterleaved(VirtualRanks<Machine>& ranks, const LowLatencyCase& c, int repeats,
                    Random& random) {
  const GroupSettings& group = ranks.settings();
  const int64_t selections = c.num_tokens * group.top_k;
  const int64_t capacity = group.num_ranks * selections;
  const int local_experts = group.num_experts / group.num_ranks;
  ranks.ReleaseAll();
  LowLatencyCase no_gradient = c;
  no_gradient.gradient = false;
  LowLatencyRun<Machine> run(ranks, no_gradient, random);

  struct Plan {
    std::vector<PlanParams> device;
    std::vector<PlanBuffers> host;
    std::vector<std::vector<int32_t>> arrays;  // that `host` points to
  };
  std::vector<Plan> plans(repeats);
  const auto queue_plan = [&](Plan& plan) {
    plan.device.resize(group.num_ranks);
    plan.arrays.reserve(10 * group.num_ranks);
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      const auto host = [&](int64_t count) {
        plan.arrays.emplace_back(count);
        return plan.arrays.back().data();
      };
      PlanParams& p = plan.device[rank];
      p.peers = ranks.context(rank);
      p.num_tokens = c.num_tokens;
      p.top_k = group.top_k;
      p.num_experts = group.num_experts;
      p.capacity = capacity;
      plan.arrays.push_back(ChooseExperts(random, Routing::kUniform, c.num_tokens, group.top_k,
                                          group.num_experts, group.num_ranks));
      p.topk_idx = ranks.TakeCopy(rank, plan.arrays.back());
      const int32_t* topk_idx = plan.arrays.back().data();
      p.group_sizes = ranks.template Take<int32_t>(rank, local_experts);
      p.num_rows = ranks.template Take<int32_t>(rank, 1);
      p.overflow = ranks.template Take<int32_t>(rank, 1);
      p.tokens_per_expert = ranks.template Take<int32_t>(rank, group.num_experts);
      p.dest_rank = ranks.template Take<int32_t>(rank, selections);
      p.dest_row = ranks.template Take<int32_t>(rank, selections);
      p.row_source = ranks.template Take<int32_t>(rank, capacity);
      p.arrival_rows = ranks.template Take<int32_t>(rank, capacity);
      p.rows_per_source = ranks.template Take<int32_t>(rank, group.num_ranks);
      plan.host.push_back({topk_idx, host(local_experts), host(1), host(1), host(group.num_experts),
                           host(selections), host(selections), host(capacity), host(capacity),
                           host(group.num_ranks)});
      if (c.delay_us > 0) {
        ranks.machine().Delay(rank, static_cast<int>(Uniform(random, 0, c.delay_us)));
      }
      CHECK(LaunchPlan(p, ranks.stream(rank)).ok());
    }
  };
  for (Plan& plan : plans) {
    run.Dispatch(LowLatencyPart::kSend);
    queue_plan(plan);
    run.Dispatch(LowLatencyPart::kReceive);
    run.Combine();
  }
  const check::Context context("interleaved");
  if (!ranks.machine().Synchronize() || !run.Check()) return false;
  for (Plan& plan : plans) {
    CHECK(MakePlan({group.num_ranks, c.num_tokens, group.top_k, group.num_experts, capacity, false},
                   plan.host)
              .ok());
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      const auto same = [&](const int32_t* got, const int32_t* want, int64_t count) {
        const std::vector<int32_t> values = ranks.Read(got, count);
        CHECK(std::equal(values.begin(), values.end(), want));
      };
      same(plan.device[rank].dest_row, plan.host[rank].dest_row, selections);
      same(plan.device[rank].row_source, plan.host[rank].row_source, capacity);
    }
  }
  return true;
}

}  // namespace testing
}  // namespace wideep
