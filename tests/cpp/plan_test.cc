// The coordination pass, compared with one that sorts.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/ep/plan_host.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using Routed = std::vector<std::vector<int32_t>>;  // by rank: topk_idx

struct RankPlan {
  std::vector<int32_t> group_sizes;
  int32_t num_rows;
  int32_t overflow;
  std::vector<int32_t> tokens_per_expert;
  std::vector<int32_t> dest_rank;
  std::vector<int32_t> dest_row;
  std::vector<int32_t> row_source;
  std::vector<int32_t> arrival_rows;
  std::vector<int32_t> rows_per_source;
};

// The definition, taken literally: list what each rank is sent, cut the list, sort it by expert.
std::vector<RankPlan> NaivePlan(const PlanShape& shape, const Routed& topk_idx) {
  struct Selection {
    int src;
    int64_t index;
    int32_t expert;
  };
  const int64_t selections = shape.num_tokens * shape.top_k;
  std::vector<RankPlan> plan(shape.num_ranks);
  for (RankPlan& rank : plan) {
    rank.dest_rank.assign(selections, -1);
    rank.dest_row.assign(selections, -1);
    rank.row_source.assign(shape.capacity, -1);
    rank.arrival_rows.assign(shape.capacity, -1);
    rank.rows_per_source.assign(shape.num_ranks, 0);
    rank.group_sizes.assign(shape.local_experts(), 0);
    rank.tokens_per_expert.assign(shape.num_experts, 0);
  }
  for (int dst = 0; dst < shape.num_ranks; ++dst) {
    std::vector<Selection> sent;
    for (int src = 0; src < shape.num_ranks; ++src) {
      for (int64_t s = 0; s < selections; ++s) {
        const int32_t expert = topk_idx[src][s];
        if (expert < dst * shape.local_experts() || expert >= (dst + 1) * shape.local_experts())
          continue;
        sent.push_back({src, s, expert});
        for (RankPlan& rank : plan) ++rank.tokens_per_expert[expert];
      }
    }
    const int64_t kept = std::min<int64_t>(shape.capacity, static_cast<int64_t>(sent.size()));
    plan[dst].overflow = static_cast<int32_t>(static_cast<int64_t>(sent.size()) - kept);
    plan[dst].num_rows = static_cast<int32_t>(kept);
    sent.resize(kept);
    const std::vector<Selection> arrived = sent;
    std::stable_sort(sent.begin(), sent.end(),
                     [](const Selection& a, const Selection& b) { return a.expert < b.expert; });
    for (int64_t row = 0; row < kept; ++row) {
      ++plan[dst].group_sizes[sent[row].expert - dst * shape.local_experts()];
      plan[dst].row_source[row] =
          static_cast<int32_t>(sent[row].src * selections + sent[row].index);
      plan[sent[row].src].dest_rank[sent[row].index] = dst;
      plan[sent[row].src].dest_row[sent[row].index] = static_cast<int32_t>(row);
    }
    for (int64_t i = 0; i < kept; ++i) {
      plan[dst].arrival_rows[i] = plan[arrived[i].src].dest_row[arrived[i].index];
      ++plan[dst].rows_per_source[arrived[i].src];
    }
  }
  return plan;
}

// Outputs of MakePlan, filled with a pattern beforehand so that an element never written is seen.
class PlanOutputs {
 public:
  PlanOutputs(const PlanShape& shape, const Routed& topk_idx) : shape_(shape) {
    const int64_t selections = shape.num_tokens * shape.top_k;
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      Arrays arrays;
      const int64_t lengths[] = {shape.local_experts(),
                                 1,
                                 1,
                                 shape.num_experts,
                                 selections,
                                 selections,
                                 shape.capacity,
                                 shape.capacity,
                                 shape.num_ranks};
      for (int64_t length : lengths) arrays.outputs.emplace_back(length * 4);
      PlanBuffers buffers;
      buffers.topk_idx = topk_idx[rank].data();
      buffers.group_sizes = arrays.outputs[0].as<int32_t>();
      buffers.num_rows = arrays.outputs[1].as<int32_t>();
      buffers.overflow = arrays.outputs[2].as<int32_t>();
      buffers.tokens_per_expert = arrays.outputs[3].as<int32_t>();
      buffers.dest_rank = arrays.outputs[4].as<int32_t>();
      buffers.dest_row = arrays.outputs[5].as<int32_t>();
      buffers.row_source = arrays.outputs[6].as<int32_t>();
      buffers.arrival_rows = arrays.outputs[7].as<int32_t>();
      buffers.rows_per_source = arrays.outputs[8].as<int32_t>();
      ranks_.push_back(std::move(arrays));
      buffers_.push_back(buffers);
    }
  }

  Status Make() { return MakePlan(shape_, buffers_); }

  void CheckSame(const std::vector<RankPlan>& expected) {
    for (int rank = 0; rank < shape_.num_ranks; ++rank) {
      const Context context(Labelled("rank", rank));
      const RankPlan& want = expected[rank];
      CheckArray("group_sizes", buffers_[rank].group_sizes, want.group_sizes);
      CHECK_EQ(*buffers_[rank].num_rows, want.num_rows);
      CHECK_EQ(*buffers_[rank].overflow, want.overflow);
      CheckArray("tokens_per_expert", buffers_[rank].tokens_per_expert, want.tokens_per_expert);
      CheckArray("dest_rank", buffers_[rank].dest_rank, want.dest_rank);
      CheckArray("dest_row", buffers_[rank].dest_row, want.dest_row);
      CheckArray("row_source", buffers_[rank].row_source, want.row_source);
      CheckArray("arrival_rows", buffers_[rank].arrival_rows, want.arrival_rows);
      CheckArray("rows_per_source", buffers_[rank].rows_per_source, want.rows_per_source);
      for (const GuardedBytes& output : ranks_[rank].outputs) CHECK(output.GuardsIntact());
    }
  }

 private:
  struct Arrays {
    std::vector<GuardedBytes> outputs;
  };

  static void CheckArray(const char* name, const int32_t* got,
                         const std::vector<int32_t>& expected) {
    for (size_t i = 0; i < expected.size(); ++i) {
      if (got[i] == expected[i]) continue;
      const Context context(Labelled(name, static_cast<int64_t>(i)));
      CHECK_EQ(got[i], expected[i]);
    }
  }

  PlanShape shape_;
  std::vector<Arrays> ranks_;
  std::vector<PlanBuffers> buffers_;
};

std::string Describe(const PlanShape& shape) {
  return std::to_string(shape.num_ranks) + " ranks, " + std::to_string(shape.num_tokens) +
         " tokens, top " + std::to_string(shape.top_k) + ", " + std::to_string(shape.num_experts) +
         " experts, capacity " + std::to_string(shape.capacity);
}

Routed RouteAll(Random& random, const PlanShape& shape, Routing routing) {
  Routed topk_idx;
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    topk_idx.push_back(ChooseExperts(random, routing, shape.num_tokens, shape.top_k,
                                     shape.num_experts, shape.num_ranks));
  }
  return topk_idx;
}

void CheckAgainstNaive(const PlanShape& shape, const Routed& topk_idx) {
  const Context context(Describe(shape));
  PlanOutputs outputs(shape, topk_idx);
  const Status status = outputs.Make();
  CHECK(status.ok());
  CHECK_EQ(status.message(), "");
  outputs.CheckSame(NaivePlan(shape, topk_idx));
}

TEST(RandomShapesMatchTheSortedPlan) {
  for (int seed = 0; seed < 400; ++seed) {
    Random random(seed);
    PlanShape shape;
    shape.num_ranks = static_cast<int>(Uniform(random, 1, 9));
    shape.num_tokens = Uniform(random, 0, 40);
    shape.top_k = static_cast<int>(Uniform(random, 1, 9));
    shape.num_experts = shape.num_ranks * static_cast<int>(Uniform(random, 1, 6));
    const int64_t selections = shape.num_ranks * shape.num_tokens * shape.top_k;
    // From nothing, through drops on most ranks, to the no-drop worst case and beyond.
    shape.capacity = Uniform(random, 0, 3) == 0 ? selections + 3 : Uniform(random, 0, selections);
    if (Uniform(random, 0, 1)) shape.capacity = shape.capacity / shape.num_ranks;
    shape.overflow_is_error = false;
    for (Routing routing : kAllRoutings) {
      const Context context(Labelled("seed", seed) + ", routing " + NameOf(routing));
      CheckAgainstNaive(shape, RouteAll(random, shape, routing));
    }
  }
}

TEST(ZeroTokens) {
  CheckAgainstNaive({4, 0, 2, 8, 16, true}, Routed(4));
  CheckAgainstNaive({4, 0, 2, 8, 0, true}, Routed(4));
}

// By hand, so that a mistake shared with NaivePlan would show.
TEST(OrderIsSourceRankThenTokenThenK) {
  const PlanShape shape{2, 2, 2, 4, 4, false};
  // Experts 0, 1 live on rank 0 and 2, 3 on rank 1. Rank 0 is sent five rows and keeps four.
  const Routed topk_idx = {{1, 0, 0, 3}, {1, -1, 0, 2}};
  std::vector<RankPlan> expected(2);
  expected[0] = {{2, 2},       4,     1, {3, 2, 1, 1}, {0, 0, 0, 1}, {2, 0, 1, 1}, {1, 2, 0, 4},
                 {2, 0, 1, 3}, {3, 1}};
  expected[1] = {
      {1, 1},         2,     0, {3, 2, 1, 1}, {0, -1, -1, 1}, {3, -1, -1, 0}, {7, 3, -1, -1},
      {1, 0, -1, -1}, {1, 1}};
  PlanOutputs outputs(shape, topk_idx);
  CHECK(outputs.Make().ok());
  outputs.CheckSame(expected);
}

TEST(SameInputsGiveTheSamePlan) {
  Random random(1);
  const PlanShape shape{8, 64, 8, 32, 300, false};
  const Routed topk_idx = RouteAll(random, shape, Routing::kOneHotExpert);
  for (int repeat = 0; repeat < 3; ++repeat) CheckAgainstNaive(shape, topk_idx);
}

TEST(IndexOutsideTheExpertsIsNamed) {
  const PlanShape shape{3, 5, 2, 6, 30, false};
  for (const int32_t bad : {6, 7, -2, INT32_MAX, INT32_MIN}) {
    Random random(7);
    Routed topk_idx = RouteAll(random, shape, Routing::kUniform);
    topk_idx[1][3 * 2 + 1] = bad;
    PlanOutputs outputs(shape, topk_idx);
    const Status status = outputs.Make();
    CHECK_EQ(status.code(), Code::kOutOfRange);
    CHECK_CONTAINS(status.message(), "make_plan: topk_idx");
    CHECK_CONTAINS(status.message(), "[-1, 6), got " + std::to_string(bad) + " ");
    CHECK_CONTAINS(status.message(), "rank 1, token 3, k 1");
  }
}

TEST(IndicesAtTheEdgesAreAccepted) {
  CheckAgainstNaive({3, 2, 2, 6, 12, true}, {{-1, 0, 5, -1}, {5, 0, 0, 5}, {-1, -1, 5, 5}});
}

TEST(OverflowIsAnErrorOnRequest) {
  PlanShape shape{2, 4, 1, 2, 6, true};
  // Rank 1 is sent seven rows, rank 0 one.
  const Routed topk_idx = {{1, 1, 1, 1}, {1, 0, 1, 1}};
  {
    PlanOutputs outputs(shape, topk_idx);
    const Status status = outputs.Make();
    CHECK_EQ(status.code(), Code::kOutOfRange);
    CHECK_CONTAINS(status.message(), "make_plan: rank 1 is sent 7 rows but has capacity 6");
  }
  shape.capacity = 7;  // fits exactly
  CheckAgainstNaive(shape, topk_idx);
  shape.capacity = 6;
  shape.overflow_is_error = false;
  CheckAgainstNaive(shape, topk_idx);
}

}  // namespace
}  // namespace testing
}  // namespace wideep
