// dispatch, combine and their gradients, compared with loops over single elements.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/float_env.h"
#include "csrc/ep/combine_host.h"
#include "csrc/ep/dispatch_host.h"
#include "csrc/ep/plan_host.h"
#include "tests/cpp/check.h"
#include "tests/cpp/exchange_testing.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;

// ---- where rows go: as a plan says it, but the rows of a rank in any order ----

struct Shape {
  int num_ranks;
  int64_t num_tokens;
  int top_k;
  int num_experts;
  int64_t hidden;
  int64_t capacity;
  DType dtype;
  bool zero_tail;

  int64_t selections() const { return num_tokens * top_k; }
  int64_t row_bytes() const { return Bytes(dtype, hidden); }
  DispatchShape dispatch() const { return {num_tokens, top_k, hidden, capacity, dtype, zero_tail}; }
  CombineShape combine() const { return {num_tokens, top_k, hidden, dtype}; }
};

std::string Describe(const Shape& s) {
  return std::to_string(s.num_ranks) + " ranks, " + std::to_string(s.num_tokens) + " tokens, top " +
         std::to_string(s.top_k) + ", hidden " + std::to_string(s.hidden) + ", capacity " +
         std::to_string(s.capacity) + ", " + NameOf(s.dtype) + (s.zero_tail ? ", zero tail" : "");
}

struct Placement {
  std::vector<std::vector<int32_t>> dest_rank;  // by rank
  std::vector<std::vector<int32_t>> dest_row;
  std::vector<int32_t> num_rows;
};

Placement PlaceAtRandom(Random& random, const Shape& shape, Routing routing) {
  Placement placement;
  placement.dest_rank.resize(shape.num_ranks);
  placement.dest_row.resize(shape.num_ranks);
  placement.num_rows.assign(shape.num_ranks, 0);
  const int local_experts = shape.num_experts / shape.num_ranks;
  for (int src = 0; src < shape.num_ranks; ++src) {
    for (int32_t expert : ChooseExperts(random, routing, shape.num_tokens, shape.top_k,
                                        shape.num_experts, shape.num_ranks)) {
      int32_t dst = expert < 0 ? -1 : expert / local_experts;
      if (dst >= 0 && placement.num_rows[dst] == shape.capacity) dst = -1;  // dropped
      placement.dest_rank[src].push_back(dst);
      placement.dest_row[src].push_back(dst < 0 ? -1 : placement.num_rows[dst]++);
    }
  }
  for (int dst = 0; dst < shape.num_ranks; ++dst) {
    std::vector<int32_t> shuffled(placement.num_rows[dst]);
    std::iota(shuffled.begin(), shuffled.end(), 0);
    std::shuffle(shuffled.begin(), shuffled.end(), random);
    for (int src = 0; src < shape.num_ranks; ++src) {
      for (size_t s = 0; s < placement.dest_row[src].size(); ++s) {
        int32_t& row = placement.dest_row[src][s];
        if (placement.dest_rank[src][s] == dst) row = shuffled[row];
      }
    }
  }
  return placement;
}

// ---- one check per op ----

void CheckTail(const Shape& shape, const GuardedBytes& rows, const GuardedBytes& scalars,
               int64_t num_rows) {
  CHECK(rows.GuardsIntact());
  CHECK(scalars.GuardsIntact());
  const int64_t row_tail = num_rows * shape.row_bytes();
  if (shape.zero_tail) {
    CHECK(rows.AllZero(row_tail, rows.num_bytes()));
    CHECK(scalars.AllZero(num_rows * 4, scalars.num_bytes()));
  } else {
    CHECK(rows.Untouched(row_tail, rows.num_bytes()));
    CHECK(scalars.Untouched(num_rows * 4, scalars.num_bytes()));
  }
}

void CheckDispatch(Random& random, const Shape& shape, const Placement& placement,
                   WorkerPool& pool) {
  const Context context("dispatch");
  std::vector<GuardedBytes> x, weights, rows, row_weights;
  std::vector<DispatchBuffers> buffers;
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    x.push_back(RandomRows(random, shape.dtype, shape.num_tokens * shape.hidden));
    weights.push_back(RandomWeights(random, shape.selections()));
    rows.emplace_back(shape.capacity * shape.row_bytes());
    row_weights.emplace_back(shape.capacity * 4);
    buffers.push_back({x[rank].data(), weights[rank].as<float>(), placement.dest_rank[rank].data(),
                       placement.dest_row[rank].data(), &placement.num_rows[rank],
                       rows[rank].data(), row_weights[rank].as<float>()});
  }
  Finish([&](std::function<void()> done) {
    Dispatch(shape.dispatch(), buffers, pool, std::move(done));
  });
  for (int src = 0; src < shape.num_ranks; ++src) {
    for (int64_t s = 0; s < shape.selections(); ++s) {
      const int dst = placement.dest_rank[src][s];
      if (dst < 0) continue;
      const int64_t row = placement.dest_row[src][s];
      CHECK(std::memcmp(rows[dst].data() + row * shape.row_bytes(),
                        x[src].data() + s / shape.top_k * shape.row_bytes(),
                        shape.row_bytes()) == 0);
      CHECK_EQ(row_weights[dst].as<float>()[row], weights[src].as<float>()[s]);
    }
  }
  for (int dst = 0; dst < shape.num_ranks; ++dst) {
    CheckTail(shape, rows[dst], row_weights[dst], placement.num_rows[dst]);
  }
}

void CheckCombine(Random& random, const Shape& shape, const Placement& placement,
                  WorkerPool& pool) {
  const Context context("combine");
  std::vector<GuardedBytes> y, row_weights, out;
  std::vector<CombineBuffers> buffers;
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    y.push_back(RandomRows(random, shape.dtype, shape.capacity * shape.hidden));
    row_weights.push_back(RandomWeights(random, shape.capacity));
    out.emplace_back(shape.num_tokens * shape.row_bytes());
    buffers.push_back({y[rank].data(), row_weights[rank].as<float>(),
                       placement.dest_rank[rank].data(), placement.dest_row[rank].data(),
                       out[rank].data()});
  }
  Finish([&](std::function<void()> done) {
    Combine(shape.combine(), buffers, pool, std::move(done));
  });
  for (int home = 0; home < shape.num_ranks; ++home) {
    CHECK(out[home].GuardsIntact());
    const int32_t* dest_rank = placement.dest_rank[home].data();
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      const auto order =
          InOrderOfRank(dest_rank, token * shape.top_k, shape.top_k, shape.num_ranks);
      for (int64_t i = 0; i < shape.hidden; ++i) {
        Sum sum;
        for (int64_t s : order) {
          const int64_t row = placement.dest_row[home][s];
          sum.Add(row_weights[dest_rank[s]].as<float>()[row], shape.dtype,
                  y[dest_rank[s]].data() + row * shape.row_bytes(), i);
        }
        sum.CheckStored(shape.dtype, out[home].data() + token * shape.row_bytes(), i);
      }
    }
  }
}

void CheckDispatchGrad(Random& random, const Shape& shape, const Placement& placement,
                       WorkerPool& pool) {
  const Context context("dispatch's gradient");
  std::vector<GuardedBytes> drows, drow_weights, dx, dweights;
  std::vector<DispatchGradBuffers> buffers;
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    drows.push_back(RandomRows(random, shape.dtype, shape.capacity * shape.hidden));
    drow_weights.push_back(RandomWeights(random, shape.capacity));
    dx.emplace_back(shape.num_tokens * shape.row_bytes());
    dweights.emplace_back(shape.selections() * 4);
    buffers.push_back({drows[rank].data(), drow_weights[rank].as<float>(),
                       placement.dest_rank[rank].data(), placement.dest_row[rank].data(),
                       dx[rank].data(), dweights[rank].as<float>()});
  }
  Finish([&](std::function<void()> done) {
    DispatchGrad(shape.combine(), buffers, pool, std::move(done));
  });
  for (int home = 0; home < shape.num_ranks; ++home) {
    CHECK(dx[home].GuardsIntact());
    CHECK(dweights[home].GuardsIntact());
    const int32_t* dest_rank = placement.dest_rank[home].data();
    for (int64_t s = 0; s < shape.selections(); ++s) {
      const int dst = dest_rank[s];
      const float expected =
          dst < 0 ? 0.0f : drow_weights[dst].as<float>()[placement.dest_row[home][s]];
      CHECK_EQ(dweights[home].as<float>()[s], expected);
    }
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      const auto order =
          InOrderOfRank(dest_rank, token * shape.top_k, shape.top_k, shape.num_ranks);
      for (int64_t i = 0; i < shape.hidden; ++i) {
        Sum sum;
        for (int64_t s : order) {
          sum.Add(1.0f, shape.dtype,
                  drows[dest_rank[s]].data() + placement.dest_row[home][s] * shape.row_bytes(), i);
        }
        sum.CheckStored(shape.dtype, dx[home].data() + token * shape.row_bytes(), i);
      }
    }
  }
}

void CheckCombineGrad(Random& random, const Shape& shape, const Placement& placement,
                      WorkerPool& pool) {
  const Context context("combine's gradient");
  std::vector<GuardedBytes> dout, y, row_weights, dy, drow_weights;
  std::vector<CombineGradBuffers> buffers;
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    dout.push_back(RandomRows(random, shape.dtype, shape.num_tokens * shape.hidden));
    y.push_back(RandomRows(random, shape.dtype, shape.capacity * shape.hidden));
    row_weights.push_back(RandomWeights(random, shape.capacity));
    dy.emplace_back(shape.capacity * shape.row_bytes());
    drow_weights.emplace_back(shape.capacity * 4);
    buffers.push_back({dout[rank].data(), y[rank].data(), row_weights[rank].as<float>(),
                       placement.dest_rank[rank].data(), placement.dest_row[rank].data(),
                       &placement.num_rows[rank], dy[rank].data(), drow_weights[rank].as<float>()});
  }
  Finish([&](std::function<void()> done) {
    CombineGrad(shape.dispatch(), buffers, pool, std::move(done));
  });
  for (int src = 0; src < shape.num_ranks; ++src) {
    for (int64_t s = 0; s < shape.selections(); ++s) {
      const int dst = placement.dest_rank[src][s];
      if (dst < 0) continue;
      const int64_t row = placement.dest_row[src][s];
      const char* token_dout = dout[src].data() + s / shape.top_k * shape.row_bytes();
      const int64_t offset = row * shape.row_bytes();
      CheckScaled(shape.dtype, dy[dst].data() + offset, token_dout,
                  row_weights[dst].as<float>()[row], shape.hidden);
      CheckDot(drow_weights[dst].as<float>()[row], shape.dtype, y[dst].data() + offset, token_dout,
               shape.hidden);
    }
  }
  for (int dst = 0; dst < shape.num_ranks; ++dst) {
    CheckTail(shape, dy[dst], drow_weights[dst], placement.num_rows[dst]);
  }
}

Shape RandomShape(Random& random) {
  Shape shape;
  shape.num_ranks = static_cast<int>(Uniform(random, 1, 6));
  shape.num_tokens = Uniform(random, 0, 9);
  shape.top_k = static_cast<int>(Uniform(random, 1, 8));
  shape.num_experts = shape.num_ranks * static_cast<int>(Uniform(random, 1, 4));
  shape.hidden = Uniform(random, 1, 2 * 64 + 5);
  const int64_t all = shape.num_ranks * shape.selections();
  // Tight ones drop; others leave a tail.
  shape.capacity =
      Uniform(random, 0, 2) == 0 ? all + 2 : Uniform(random, 0, all / shape.num_ranks + 1);
  shape.zero_tail = Uniform(random, 0, 1) == 1;
  return shape;
}

TEST(RandomExchangesMatchTheLoops) {
  for (int seed = 0; seed < 40; ++seed) {
    Random random(seed);
    Shape shape = RandomShape(random);
    for (const Routing routing : kAllRoutings) {
      const Placement placement = PlaceAtRandom(random, shape, routing);
      WorkerPool& pool = PoolOf(static_cast<int>(Uniform(random, 0, 2)));
      for (const DType dtype : kAllDTypes) {
        shape.dtype = dtype;
        const Context context("seed " + std::to_string(seed) + ", routing " + NameOf(routing) +
                              ", " + Describe(shape));
        CheckDispatch(random, shape, placement, pool);
        if (dtype == DType::kF8E4M3) continue;  // FP8 rows are only sent
        CheckCombine(random, shape, placement, pool);
        CheckDispatchGrad(random, shape, placement, pool);
        CheckCombineGrad(random, shape, placement, pool);
      }
    }
  }
}

// More than one task per rank, so that a rank's tokens are cut and several threads share them.
TEST(LargeExchangesAreCutIntoTasks) {
  Random random(100);
  for (const int num_helpers : {0, 1, 3}) {
    const Shape shape{2, 40, 4, 4, 8200 + num_helpers, 200, DType::kF32, true};
    const Placement placement = PlaceAtRandom(random, shape, Routing::kMasked);
    const Context context(Describe(shape));
    CheckDispatch(random, shape, placement, PoolOf(num_helpers));
    CheckCombine(random, shape, placement, PoolOf(num_helpers));
    CheckDispatchGrad(random, shape, placement, PoolOf(num_helpers));
    CheckCombineGrad(random, shape, placement, PoolOf(num_helpers));
  }
}

// Above 32 MiB rows are written past the cache; odd rows cannot be and take the ordinary way.
TEST(StreamedDispatch) {
  Random random(101);
  for (const int64_t hidden : {14336, 14344, 14347}) {
    const Shape shape{2, 320, 2, 4, hidden, 700, DType::kBF16, true};
    CHECK(shape.num_ranks * shape.selections() * shape.row_bytes() > (32 << 20));
    const Placement placement = PlaceAtRandom(random, shape, Routing::kUniform);
    const Context context(Describe(shape));
    std::vector<GuardedBytes> x, weights, rows, row_weights;
    std::vector<DispatchBuffers> buffers;
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      x.emplace_back(shape.num_tokens * shape.row_bytes());
      for (int64_t i = 0; i < x[rank].num_bytes(); i += 2) {
        const auto value = static_cast<uint16_t>(random());
        std::memcpy(x[rank].data() + i, &value, 2);
      }
      weights.push_back(RandomWeights(random, shape.selections()));
      rows.emplace_back(shape.capacity * shape.row_bytes());
      row_weights.emplace_back(shape.capacity * 4);
      buffers.push_back({x[rank].data(), weights[rank].as<float>(),
                         placement.dest_rank[rank].data(), placement.dest_row[rank].data(),
                         &placement.num_rows[rank], rows[rank].data(),
                         row_weights[rank].as<float>()});
    }
    Finish(
        [&](std::function<void()> done) { Dispatch(shape.dispatch(), buffers, PoolOf(3), done); });
    for (int src = 0; src < shape.num_ranks; ++src) {
      for (int64_t s = 0; s < shape.selections(); ++s) {
        const int dst = placement.dest_rank[src][s];
        if (dst < 0) continue;
        const int64_t row = placement.dest_row[src][s];
        CHECK(std::memcmp(rows[dst].data() + row * shape.row_bytes(),
                          x[src].data() + s / shape.top_k * shape.row_bytes(),
                          shape.row_bytes()) == 0);
      }
    }
    for (int dst = 0; dst < shape.num_ranks; ++dst) {
      CheckTail(shape, rows[dst], row_weights[dst], placement.num_rows[dst]);
    }
  }
}

// plan, dispatch and combine together: with weights that add up to one and experts that do nothing,
// every token comes home as it left.
TEST(RoundTripThroughThePlan) {
  Random random(102);
  const int num_ranks = 4;
  const int64_t num_tokens = 33;
  const int top_k = 4;
  const int64_t hidden = 70;
  const int64_t capacity = num_ranks * num_tokens * top_k;
  const PlanShape plan_shape{num_ranks, num_tokens, top_k, 8, capacity, true};
  const DispatchShape shape{num_tokens, top_k, hidden, capacity, DType::kF32, true};
  std::vector<std::vector<int32_t>> topk_idx, dest_rank, dest_row, row_source, arrival_rows,
      rows_per_source, experts, groups, scalars;
  std::vector<PlanBuffers> plan;
  for (int rank = 0; rank < num_ranks; ++rank) {
    topk_idx.push_back(ChooseExperts(random, Routing::kUniform, num_tokens, top_k, 8, num_ranks));
    dest_rank.emplace_back(num_tokens * top_k);
    dest_row.emplace_back(num_tokens * top_k);
    row_source.emplace_back(capacity);
    arrival_rows.emplace_back(capacity);
    rows_per_source.emplace_back(num_ranks);
    experts.emplace_back(8);
    groups.emplace_back(2);
    scalars.emplace_back(2);
    plan.push_back({topk_idx[rank].data(), groups[rank].data(), &scalars[rank][0],
                    &scalars[rank][1], experts[rank].data(), dest_rank[rank].data(),
                    dest_row[rank].data(), row_source[rank].data(), arrival_rows[rank].data(),
                    rows_per_source[rank].data()});
  }
  CHECK(MakePlan(plan_shape, plan).ok());
  std::vector<GuardedBytes> x, rows, row_weights, out;
  const std::vector<float> weights(num_tokens * top_k, 0.25f);
  std::vector<DispatchBuffers> there;
  std::vector<CombineBuffers> back;
  for (int rank = 0; rank < num_ranks; ++rank) {
    x.push_back(RandomRows(random, DType::kF32, num_tokens * hidden));
    rows.emplace_back(capacity * hidden * 4);
    row_weights.emplace_back(capacity * 4);
    out.emplace_back(num_tokens * hidden * 4);
    there.push_back({x[rank].data(), weights.data(), dest_rank[rank].data(), dest_row[rank].data(),
                     &scalars[rank][0], rows[rank].data(), row_weights[rank].as<float>()});
    back.push_back({rows[rank].data(), row_weights[rank].as<float>(), dest_rank[rank].data(),
                    dest_row[rank].data(), out[rank].data()});
  }
  Finish([&](std::function<void()> done) { Dispatch(shape, there, PoolOf(1), std::move(done)); });
  Finish([&](std::function<void()> done) {
    Combine({num_tokens, top_k, hidden, DType::kF32}, back, PoolOf(1), std::move(done));
  });
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (int64_t i = 0; i < num_tokens * hidden; ++i) {
      // Each of the four quarters is exact, subnormals aside, and so are their sums up to rounding.
      const float expected = x[rank].as<float>()[i];
      CHECK_NEAR(out[rank].as<float>()[i], expected, std::fabs(expected) * 3e-7 + 1e-44);
    }
  }
}

TEST(SelectionsAreOrderedByRankThenK) {
  Random random(103);
  for (int repeat = 0; repeat < 500; ++repeat) {
    const int top_k = static_cast<int>(Uniform(random, 1, kMaxTopK));
    std::vector<int32_t> dest_rank(top_k);
    for (int32_t& rank : dest_rank) rank = static_cast<int32_t>(Uniform(random, -1, 9));
    std::vector<int> order(top_k, -7);
    const int count = OrderedSelections(dest_rank.data(), top_k, order.data());
    const auto expected = InOrderOfRank(dest_rank.data(), 0, top_k, 10);
    CHECK_EQ(count, static_cast<int>(expected.size()));
    for (size_t i = 0; i < expected.size(); ++i) CHECK_EQ(order[i], static_cast<int>(expected[i]));
  }
}

// XLA's threads flush denormals: the bits must not depend on whose thread does the work.
TEST(DenormalsSurviveOnFlushingThreads) {
  const unsigned long saved = GetFloatEnv();
  Random random(300);
  for (const DType dtype : kFloatDTypes) {
    for (const int num_helpers : {0, 3}) {
      const Shape shape{2, 3, 2, 2, 77, 12, dtype, true};
      const Placement placement = PlaceAtRandom(random, shape, Routing::kUniform);
      const Context context(Describe(shape));
      std::vector<GuardedBytes> y, weights, out;
      std::vector<CombineBuffers> buffers;
      for (int rank = 0; rank < shape.num_ranks; ++rank) {
        y.emplace_back(shape.capacity * shape.row_bytes());
        for (int64_t i = 0; i < shape.capacity * shape.hidden; ++i) {
          SetBitsAt(dtype, y[rank].data(), i,
                    static_cast<uint32_t>(Uniform(random, 0, FormatOf(dtype).mantissa_mask() / 4)));
        }
        weights.emplace_back(shape.capacity * 4);
        std::fill_n(weights[rank].as<float>(), shape.capacity, 1.0f);
        out.emplace_back(shape.num_tokens * shape.row_bytes());
        buffers.push_back({y[rank].data(), weights[rank].as<float>(),
                           placement.dest_rank[rank].data(), placement.dest_row[rank].data(),
                           out[rank].data()});
      }
      SetFloatEnv(saved | kFlushDenormals);
      Finish([&](std::function<void()> done) {
        Combine(shape.combine(), buffers, PoolOf(num_helpers), done);
      });
      CHECK_EQ(GetFloatEnv(), saved | kFlushDenormals);
      SetFloatEnv(saved);
      for (int home = 0; home < shape.num_ranks; ++home) {
        for (int64_t token = 0; token < shape.num_tokens; ++token) {
          for (int64_t i = 0; i < shape.hidden; ++i) {
            uint32_t sum = 0;  // subnormals add like integers
            for (int64_t s = token * shape.top_k; s < (token + 1) * shape.top_k; ++s) {
              sum += BitsAt(dtype,
                            y[placement.dest_rank[home][s]].data() +
                                placement.dest_row[home][s] * shape.row_bytes(),
                            i);
            }
            CHECK_EQ(BitsAt(dtype, out[home].data() + token * shape.row_bytes(), i), sum);
          }
        }
      }
    }
  }
  SetFloatEnv(saved);
}

}  // namespace
}  // namespace testing
}  // namespace wideep
