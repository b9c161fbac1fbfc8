// The plan over virtual nodes against the host's (csrc/ep/plan_host.h), bit for bit.
#pragma once

#include <string>
#include <vector>

#include "csrc/ep/two_hop_plan.cuh"
#include "tests/kernels/plan_arrays.h"
#include "tests/kernels/virtual_nodes.h"

namespace wideep {
namespace testing {

struct NodesPlanCase {
  int64_t num_tokens = 8;
  int64_t capacity = 0;  // 0: the worst case
  Routing routing = Routing::kUniform;
  uint32_t none = 0;       // bit r: rank r selects no expert
  uint32_t masked = 0;     // bit r: rank r is masked
  bool masked_run = true;  // masked ranks launch the plan too
  int delay_us = 0;        // each rank is held up by as much at random

  bool IsMasked(int rank) const { return (masked >> rank & 1) != 0; }
};

inline std::string Describe(const NodesPlanCase& c) {
  return std::to_string(c.num_tokens) + " tokens, capacity " + std::to_string(c.capacity) + ", " +
         NameOf(c.routing) + ", none at " + std::to_string(c.none) + ", masked " +
         std::to_string(c.masked) + (c.masked_run ? "" : ", not running");
}

/// Ranks of one group on virtual nodes, and plans over them.
template <typename Machine>
class NodesPlans {
 public:
  NodesPlans(const GroupSettings& group, const std::vector<int>& node_sizes, uint64_t seed)
      : random_(seed), ranks_(group, seed), nodes_(ranks_, node_sizes) {
    const Status status = LoadTwoHopPlan<RingNet>();
    if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
  }

  /// Plans on all ranks, one after the other, and nobody waits in between. All have the mask of the
  /// first. False if one failed.
  bool Run(const std::vector<NodesPlanCase>& cases) {
    const uint32_t masked = cases[0].masked;
    if (masked != ranks_.masked()) {
      ranks_.Mask(masked);
      nodes_.Reset(masked);
    }
    ranks_.ReleaseAll();
    std::vector<OnePlan> plans;
    for (const NodesPlanCase& c : cases) plans.push_back(Draw(c));
    nodes_.BeginOps();
    for (const OnePlan& plan : plans) {
      for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
        if (!Runs(plan.c, rank)) continue;
        if (plan.c.delay_us > 0) {
          ranks_.machine().Delay(rank, static_cast<int>(Uniform(random_, 0, plan.c.delay_us)));
        }
        Launch(rank, plan.device[rank]);
      }
    }
    nodes_.EndOps();
    if (!ranks_.machine().Synchronize()) {
      check::Fail(__FILE__, __LINE__, "the machine failed");
      return false;
    }
    for (const OnePlan& plan : plans) {
      const check::Context context(Describe(plan.c));
      for (int rank = 0; rank < ranks_.num_ranks(); ++rank) {
        if (!Runs(plan.c, rank)) continue;
        if (ranks_.record(rank).failure != 0) {
          const GroupSettings& group = ranks_.settings();
          check::Fail(__FILE__, __LINE__,
                      Describe(ranks_.record(rank), group.deadline_s, group.top_k));
          return false;
        }
        CheckPlan(ranks_, rank, plan.device[rank], plan.host[rank]);
      }
    }
    return true;
  }

  void Launch(int rank, const PlanParams& params) {
    const Status status = LaunchTwoHopPlan(nodes_.Params(rank, params), ranks_.stream(rank));
    if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
  }

  VirtualRanks<Machine>& ranks() { return ranks_; }
  VirtualNodes<Machine>& nodes() { return nodes_; }
  Random& random() { return random_; }

 private:
  struct OnePlan {
    NodesPlanCase c;
    std::vector<HostPlan> host;
    std::vector<PlanParams> device;
  };

  OnePlan Draw(const NodesPlanCase& c) {
    const GroupSettings& group = ranks_.settings();
    const int64_t selections = c.num_tokens * group.top_k;
    const int64_t capacity = c.capacity > 0 ? c.capacity : group.num_ranks * selections;
    OnePlan plan{c, std::vector<HostPlan>(group.num_ranks), {}};
    std::vector<PlanBuffers> buffers;
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      HostPlan& host = plan.host[rank];
      host.Draw(random_, group, c.routing, c.num_tokens, capacity);
      if (c.none >> rank & 1) std::fill(host.topk_idx.begin(), host.topk_idx.end(), -1);
      buffers.push_back(host.Buffers());
      buffers.back().masked = c.IsMasked(rank);
      plan.device.push_back(TakePlan(ranks_, rank, host.topk_idx, capacity));
    }
    const PlanShape shape{group.num_ranks,   c.num_tokens, group.top_k,
                          group.num_experts, capacity,     /*overflow_is_error=*/false};
    CHECK(MakePlan(shape, buffers).ok());
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      if (c.IsMasked(rank)) MakeEmptyPlan(shape, buffers[rank]);
    }
    return plan;
  }
  static bool Runs(const NodesPlanCase& c, int rank) { return c.masked_run || !c.IsMasked(rank); }

  Random random_;
  VirtualRanks<Machine> ranks_;
  VirtualNodes<Machine> nodes_;
};

/// Several plans over one group: rings and counts go on from where they were.
template <typename Machine>
void RunNodesPlans(NodesPlans<Machine>& plans, int64_t max_tokens, int delay_us) {
  const GroupSettings& group = plans.ranks().settings();
  Random& random = plans.random();
  for (int run = 0; run < 2; ++run) {
    std::vector<NodesPlanCase> cases;
    for (int i = 0; i < 4; ++i) {
      NodesPlanCase c;
      c.num_tokens = i == 1 ? 0 : Uniform(random, 1, max_tokens);
      c.routing = kAllRoutings[Uniform(random, 0, 5)];
      c.delay_us = delay_us;
      const int64_t selections = group.num_ranks * c.num_tokens * group.top_k;
      if (selections > 0 && i % 2 == 0) c.capacity = Uniform(random, 1, selections) / 2 + 1;
      if (i == 3) c.none = 1u << Uniform(random, 0, group.num_ranks - 1);
      cases.push_back(c);
    }
    if (!plans.Run(cases)) return;
  }
}

}  // namespace testing
}  // namespace wideep
