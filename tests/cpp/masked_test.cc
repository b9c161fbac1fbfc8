// Masked ranks: an exchange that leaves ranks out gives what one without masks gives for selections
// that are -1: those of the masked ranks' experts, and all of the masked ranks' own.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/ep/combine_host.h"
#include "csrc/ep/dispatch_host.h"
#include "csrc/ep/low_latency_host.h"
#include "csrc/ep/plan_host.h"
#include "tests/cpp/check.h"
#include "tests/cpp/exchange_testing.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

struct Shape {
  int num_ranks;
  int64_t num_tokens;
  int top_k;
  int num_experts;
  int64_t hidden;
  int64_t capacity;
  DType dtype;
  std::vector<bool> masked;  // by rank

  int64_t selections() const { return num_tokens * top_k; }
  int64_t row_bytes() const { return Bytes(dtype, hidden); }
  int local_experts() const { return num_experts / num_ranks; }
};

Shape RandomShape(Random& random) {
  Shape shape;
  shape.num_ranks = static_cast<int>(Uniform(random, 2, 6));
  shape.num_tokens = Uniform(random, 0, 9);
  shape.num_experts = shape.num_ranks * static_cast<int>(Uniform(random, 1, 4));
  shape.top_k = static_cast<int>(Uniform(random, 1, std::min(shape.num_experts, 6)));
  shape.hidden = 128 * Uniform(random, 1, 2);
  const int64_t all = shape.num_ranks * shape.selections();
  shape.capacity = Uniform(random, 0, 1) == 0 ? all : Uniform(random, 1, all / 2 + 2);
  shape.dtype = kFloatDTypes[Uniform(random, 0, 2)];
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    shape.masked.push_back(Uniform(random, 0, 1) != 0);
  }
  return shape;
}

using Ints = std::vector<int32_t>;

/// topk_idx of all ranks, and the same without what the mask drops.
struct Choices {
  std::vector<Ints> wanted;
  std::vector<Ints> kept;
  Ints dropped;             // by rank
  Ints wanted_by_unmasked;  // by expert

  Choices(Random& random, const Shape& shape, bool distinct)
      : dropped(shape.num_ranks, 0), wanted_by_unmasked(shape.num_experts, 0) {
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      Ints idx = ChooseExperts(random, kAllRoutings[Uniform(random, 0, 5)], shape.num_tokens,
                               shape.top_k, shape.num_experts, shape.num_ranks);
      if (distinct) MaskDuplicates(idx, shape.top_k);
      wanted.push_back(idx);
      for (int32_t& expert : idx) {
        if (expert < 0) continue;
        if (!shape.masked[rank]) ++wanted_by_unmasked[expert];
        if (shape.masked[rank] || shape.masked[expert / shape.local_experts()]) {
          expert = -1;
          ++dropped[rank];
        }
      }
      kept.push_back(idx);
    }
  }
};

/// A rank's arrays of one run, filled with a pattern first.
struct ThroughputRank {
  Ints group_sizes, num_rows, overflow, tokens_per_expert, dest_rank, dest_row, row_source,
      arrival_rows, rows_per_source;
  std::vector<char> rows, out, dx, dy;
  std::vector<float> row_weights, dweights, drow_weights;

  explicit ThroughputRank(const Shape& s)
      : group_sizes(s.local_experts(), 77),
        num_rows(1, 77),
        overflow(1, 77),
        tokens_per_expert(s.num_experts, 77),
        dest_rank(s.selections(), 77),
        dest_row(s.selections(), 77),
        row_source(s.capacity, 77),
        arrival_rows(s.capacity, 77),
        rows_per_source(s.num_ranks, 77),
        rows(s.capacity * s.row_bytes(), 77),
        out(s.num_tokens * s.row_bytes(), 77),
        dx(out),
        dy(rows),
        row_weights(s.capacity, 77),
        dweights(s.selections(), 77),
        drow_weights(s.capacity, 77) {}
};

struct Inputs {
  std::vector<std::vector<char>> x, y;
  std::vector<std::vector<float>> weights, row_scalars;
};

std::vector<char> Rows(Random& random, const Shape& shape, int64_t count) {
  std::vector<char> rows(count * shape.row_bytes());
  FillValues(random, shape.dtype, rows.data(), count * shape.hidden);
  return rows;
}

/// All ops over `topk_idx`, under the shape's mask or without.
std::vector<ThroughputRank> RunThroughput(const Shape& shape, const std::vector<Ints>& topk_idx,
                                          const Inputs& in, bool mask) {
  std::vector<ThroughputRank> ranks(shape.num_ranks, ThroughputRank(shape));
  std::vector<PlanBuffers> plan;
  std::vector<DispatchBuffers> dispatch;
  std::vector<CombineBuffers> combine;
  std::vector<DispatchGradBuffers> dispatch_grad;
  std::vector<CombineGradBuffers> combine_grad;
  for (int i = 0; i < shape.num_ranks; ++i) {
    ThroughputRank& r = ranks[i];
    const bool masked = mask && shape.masked[i];
    plan.push_back({topk_idx[i].data(), r.group_sizes.data(), r.num_rows.data(), r.overflow.data(),
                    r.tokens_per_expert.data(), r.dest_rank.data(), r.dest_row.data(),
                    r.row_source.data(), r.arrival_rows.data(), r.rows_per_source.data(), masked});
    dispatch.push_back({in.x[i].data(), in.weights[i].data(), r.dest_rank.data(), r.dest_row.data(),
                        r.num_rows.data(), r.rows.data(), r.row_weights.data(), masked});
    combine.push_back({in.y[i].data(), in.row_scalars[i].data(), r.dest_rank.data(),
                       r.dest_row.data(), r.out.data(), masked});
    dispatch_grad.push_back({in.y[i].data(), in.row_scalars[i].data(), r.dest_rank.data(),
                             r.dest_row.data(), r.dx.data(), r.dweights.data(), masked});
    combine_grad.push_back({in.x[i].data(), in.y[i].data(), in.row_scalars[i].data(),
                            r.dest_rank.data(), r.dest_row.data(), r.num_rows.data(), r.dy.data(),
                            r.drow_weights.data(), masked});
  }
  const PlanShape plan_shape{shape.num_ranks,   shape.num_tokens, shape.top_k,
                             shape.num_experts, shape.capacity,   false};
  const DispatchShape to{shape.num_tokens, shape.top_k, shape.hidden,
                         shape.capacity,   shape.dtype, true};
  const CombineShape home{shape.num_tokens, shape.top_k, shape.hidden, shape.dtype};
  CHECK(MakePlan(plan_shape, plan).ok());
  for (int i = 0; i < shape.num_ranks; ++i) {
    if (!plan[i].masked) continue;
    CHECK(ranks[i].num_rows[0] == 77 && ranks[i].rows_per_source[0] == 77);
    MakeEmptyPlan(plan_shape, plan[i]);
  }
  WorkerPool& pool = PoolOf(1);
  Finish([&](auto done) { Dispatch(to, dispatch, pool, done); });
  Finish([&](auto done) { Combine(home, combine, pool, done); });
  Finish([&](auto done) { DispatchGrad(home, dispatch_grad, pool, done); });
  Finish([&](auto done) { CombineGrad(to, combine_grad, pool, done); });
  for (int i = 0; i < shape.num_ranks; ++i) {
    if (!plan[i].masked) continue;
    const auto untouched = [](const auto& array) {
      return std::all_of(array.begin(), array.end(), [](auto value) { return value == 77; });
    };
    CHECK(untouched(ranks[i].rows) && untouched(ranks[i].out) && untouched(ranks[i].dy));
    CHECK(untouched(ranks[i].dx) && untouched(ranks[i].dweights));
    EmptyDispatch(to, dispatch[i]);
    EmptyCombine(home, combine[i]);
    EmptyDispatchGrad(home, dispatch_grad[i]);
    EmptyCombineGrad(to, combine_grad[i]);
  }
  return ranks;
}

TEST(MaskedRanksAreMaskedSelections) {
  for (int seed = 0; seed < 120; ++seed) {
    const check::Context context("seed " + std::to_string(seed));
    Random random(seed);
    const Shape shape = RandomShape(random);
    const Choices choices(random, shape, /*distinct=*/false);
    Inputs in;
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      in.x.push_back(Rows(random, shape, shape.num_tokens));
      in.y.push_back(Rows(random, shape, shape.capacity));
      in.weights.push_back(RandomFloats(random, shape.selections()));
      in.row_scalars.push_back(RandomFloats(random, shape.capacity));
    }
    const auto got = RunThroughput(shape, choices.wanted, in, /*mask=*/true);
    const auto want = RunThroughput(shape, choices.kept, in, /*mask=*/false);
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      const ThroughputRank& g = got[rank];
      const ThroughputRank& w = want[rank];
      CHECK_EQ(g.overflow[0], w.overflow[0] + choices.dropped[rank]);
      CHECK(g.tokens_per_expert ==
            (shape.masked[rank] ? Ints(shape.num_experts, 0) : choices.wanted_by_unmasked));
      CHECK(g.group_sizes == w.group_sizes && g.num_rows == w.num_rows);
      CHECK(g.dest_rank == w.dest_rank && g.dest_row == w.dest_row);
      CHECK(g.row_source == w.row_source && g.arrival_rows == w.arrival_rows);
      CHECK(g.rows_per_source == w.rows_per_source);
      CHECK(g.rows == w.rows && g.row_weights == w.row_weights);
      CHECK(g.out == w.out && g.dx == w.dx && g.dweights == w.dweights);
      CHECK(g.dy == w.dy && g.drow_weights == w.drow_weights);
    }
  }
}

/// Rows that a rank would have sent which was masked after the plan was made are zero.
TEST(PlanOlderThanTheMask) {
  Random random(7);
  Shape shape{3, 5, 2, 6, 16, 30, DType::kF32, {false, true, false}};
  Ints dest_rank[3], dest_row[3];
  const int32_t num_rows[3] = {10, 10, 10};  // each token to the two next ranks
  for (int rank = 0; rank < 3; ++rank) {
    for (int token = 0; token < 5; ++token) {
      for (int k = 0; k < 2; ++k) {
        dest_rank[rank].push_back((rank + k + 1) % 3);
        dest_row[rank].push_back(token * 2 + k);
      }
    }
  }
  const std::vector<float> ones(30, 1.0f);
  std::vector<float> x(5 * 16, 1.0f);
  std::vector<std::vector<float>> rows(3, std::vector<float>(30 * 16, 7.0f));
  std::vector<std::vector<float>> row_weights(3, std::vector<float>(30, 7.0f));
  std::vector<std::vector<float>> out(3, std::vector<float>(5 * 16, 7.0f));
  std::vector<DispatchBuffers> there;
  std::vector<CombineBuffers> back;
  for (int rank = 0; rank < 3; ++rank) {
    there.push_back({x.data(), ones.data(), dest_rank[rank].data(), dest_row[rank].data(),
                     &num_rows[rank], rows[rank].data(), row_weights[rank].data(),
                     bool{shape.masked[rank]}});
    back.push_back({rows[rank].data(), row_weights[rank].data(), dest_rank[rank].data(),
                    dest_row[rank].data(), out[rank].data(), bool{shape.masked[rank]}});
  }
  Finish([&](auto done) { Dispatch({5, 2, 16, 30, DType::kF32, true}, there, PoolOf(0), done); });
  Finish([&](auto done) { Combine({5, 2, 16, DType::kF32}, back, PoolOf(0), done); });
  for (const int rank : {0, 2}) {
    // From the other rank that is there, k is 0 or 1; the rows of the other k are the masked
    // rank's.
    const int from_other = rank == 0 ? 0 : 1;
    for (int row = 0; row < 30; ++row) {
      const float expected = row < 10 && row % 2 == from_other ? 1.0f : 0.0f;
      CHECK_EQ(row_weights[rank][row], expected);
      for (int i = 0; i < 16; ++i) CHECK_EQ(rows[rank][row * 16 + i], expected);
    }
    for (const float value : out[rank]) CHECK_EQ(value, 1.0f);  // of two rows, one is dropped
  }
  for (const float value : rows[1]) CHECK_EQ(value, 7.0f);
}

struct LowLatencyRank {
  Ints counts, row_source;
  std::vector<char> rows, out, dy;
  std::vector<float> dweights;
};

std::vector<LowLatencyRank> RunLowLatency(const Shape& shape, int64_t chunk,
                                          const std::vector<Ints>& topk_idx, const Inputs& in,
                                          bool mask) {
  std::vector<LowLatencyRank> ranks(shape.num_ranks);
  std::vector<LowLatencyDispatchBuffers> dispatch;
  std::vector<LowLatencyCombineBuffers> combine;
  const LowLatencyShape wire{shape.num_ranks,
                             shape.num_tokens,
                             shape.top_k,
                             shape.num_experts,
                             chunk,
                             shape.hidden,
                             shape.dtype,
                             false,
                             true};
  const int64_t num_rows = wire.local_experts() * wire.rows_per_expert();
  for (int i = 0; i < shape.num_ranks; ++i) {
    LowLatencyRank& r = ranks[i];
    r.counts.assign(wire.local_experts(), 77);
    r.row_source.assign(num_rows, 77);
    r.rows.assign(num_rows * shape.row_bytes(), 77);
    r.dy = r.rows;
    r.out.assign(shape.num_tokens * shape.row_bytes(), 77);
    r.dweights.assign(shape.selections(), 77);
    const bool masked = mask && shape.masked[i];
    dispatch.push_back({in.x[i].data(), nullptr, topk_idx[i].data(), r.rows.data(), nullptr,
                        r.counts.data(), r.row_source.data(), masked});
    combine.push_back({in.y[i].data(), in.weights[i].data(), r.counts.data(), r.row_source.data(),
                       in.x[i].data(), r.out.data(), r.dy.data(), r.dweights.data(), masked});
  }
  const auto run = [](auto start) {
    Finish([&](auto done) {
      start([done](const Status& status) {
        CHECK_EQ(status.message(), "");
        done();
      });
    });
  };
  run([&](StatusCallback done) { LowLatencyDispatch(wire, dispatch, PoolOf(1), done); });
  for (int i = 0; i < shape.num_ranks; ++i) {
    if (!dispatch[i].masked) continue;
    CHECK(ranks[i].counts[0] == 77 && ranks[i].row_source[0] == 77);
    EmptyLowLatencyDispatch(wire, dispatch[i]);
  }
  run([&](StatusCallback done) { LowLatencyCombine(wire, combine, PoolOf(1), done); });
  run([&](StatusCallback done) { LowLatencyCombineGrad(wire, combine, PoolOf(1), done); });
  for (int i = 0; i < shape.num_ranks; ++i) {
    if (!combine[i].masked) continue;
    EmptyLowLatencyCombine(wire, combine[i]);
    EmptyLowLatencyCombineGrad(wire, combine[i]);
  }
  return ranks;
}

TEST(MaskedRanksAreMaskedSelectionsInLowLatency) {
  for (int seed = 0; seed < 60; ++seed) {
    const check::Context context("seed " + std::to_string(seed));
    Random random(seed);
    const Shape shape = RandomShape(random);
    const int64_t chunk = shape.num_tokens + Uniform(random, 0, 2) + (shape.num_tokens == 0);
    const Choices choices(random, shape, /*distinct=*/true);
    Inputs in;
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      in.x.push_back(Rows(random, shape, shape.num_tokens));
      in.y.push_back(Rows(random, shape, shape.num_experts * chunk));
      in.weights.push_back(RandomFloats(random, shape.selections()));
    }
    const auto got = RunLowLatency(shape, chunk, choices.wanted, in, /*mask=*/true);
    const auto want = RunLowLatency(shape, chunk, choices.kept, in, /*mask=*/false);
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      CHECK(got[rank].counts == want[rank].counts);
      CHECK(got[rank].row_source == want[rank].row_source);
      CHECK(got[rank].rows == want[rank].rows);
      CHECK(got[rank].out == want[rank].out);
      CHECK(got[rank].dy == want[rank].dy && got[rank].dweights == want[rank].dweights);
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
