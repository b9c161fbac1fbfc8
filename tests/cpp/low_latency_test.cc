// The low-latency shape, compared with loops over single elements.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ep/low_latency_host.h"
#include "csrc/ep/row_kernels.h"
#include "tests/cpp/check.h"
#include "tests/cpp/exchange_testing.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;

Status FinishWithStatus(const std::function<void(StatusCallback)>& start) {
  check::Counter done;
  Status outcome;
  start([&](const Status& status) {
    outcome = status;
    done.Add();
  });
  CHECK(done.WaitFor(1));
  CHECK_EQ(done.count(), 1);
  return outcome;
}

struct LowLatencyCase {
  LowLatencyShape shape;
  std::vector<std::vector<int32_t>> topk_idx;  // by rank
  // What should arrive, by rank and local expert: selections, numbered over all ranks, in order.
  std::vector<std::vector<std::vector<int32_t>>> arrivals;

  int64_t selections() const { return shape.num_tokens * shape.top_k; }
  int64_t blocks() const { return shape.hidden / kQuantBlock; }
  int64_t row_bytes() const { return Bytes(shape.dtype, shape.hidden); }
  int64_t num_rows() const { return shape.local_experts() * shape.rows_per_expert(); }
};

std::string Describe(const LowLatencyShape& s) {
  return std::to_string(s.num_ranks) + " ranks, " + std::to_string(s.num_tokens) + " tokens, top " +
         std::to_string(s.top_k) + ", " + std::to_string(s.num_experts) + " experts, chunk " +
         std::to_string(s.chunk) + ", hidden " + std::to_string(s.hidden) + ", " + NameOf(s.dtype) +
         (s.quantized ? ", quantized" : "") + (s.zero_tail ? ", zero tail" : "");
}

LowLatencyCase MakeLowLatencyCase(Random& random, const LowLatencyShape& shape, Routing routing) {
  LowLatencyCase test{shape, {}, {}};
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    test.topk_idx.push_back(ChooseExperts(random, routing, shape.num_tokens, shape.top_k,
                                          shape.num_experts, shape.num_ranks));
    MaskDuplicates(test.topk_idx.back(), shape.top_k);
  }
  test.arrivals.resize(shape.num_ranks);
  for (int expert = 0; expert < shape.num_experts; ++expert) {
    std::vector<int32_t> sources;
    for (int src = 0; src < shape.num_ranks; ++src) {
      for (int64_t s = 0; s < test.selections(); ++s) {
        if (test.topk_idx[src][s] == expert) {
          sources.push_back(static_cast<int32_t>(src * test.selections() + s));
        }
      }
    }
    test.arrivals[expert / shape.local_experts()].push_back(sources);
  }
  return test;
}

// One rank's arrays of dispatch.
struct LowLatencyReceived {
  GuardedBytes payload, scales, rows, row_scales, counts, row_source;
};

LowLatencyDispatchBuffers BuffersOf(const LowLatencyCase& test, LowLatencyReceived& arrays,
                                    int rank) {
  const bool keep_scales = test.shape.dtype == DType::kF8E4M3;
  return {arrays.payload.data(),
          test.shape.quantized ? arrays.scales.as<float>() : nullptr,
          test.topk_idx[rank].data(),
          arrays.rows.data(),
          keep_scales ? arrays.row_scales.as<float>() : nullptr,
          arrays.counts.as<int32_t>(),
          arrays.row_source.as<int32_t>()};
}

std::vector<LowLatencyReceived> MakeArrays(Random& random, const LowLatencyCase& test) {
  std::vector<LowLatencyReceived> all;
  const DType wire = test.shape.quantized ? DType::kF8E4M3 : test.shape.dtype;
  const bool keep_scales = test.shape.dtype == DType::kF8E4M3;
  for (int rank = 0; rank < test.shape.num_ranks; ++rank) {
    LowLatencyReceived arrays;
    const int64_t sent = test.shape.num_tokens * test.shape.hidden;
    arrays.payload = RandomRows(random, wire, sent);
    arrays.scales =
        RandomWeights(random, test.shape.quantized ? test.shape.num_tokens * test.blocks() : 0);
    arrays.rows = GuardedBytes(test.num_rows() * test.row_bytes());
    arrays.row_scales = GuardedBytes(keep_scales ? test.num_rows() * test.blocks() * 4 : 0);
    arrays.counts = GuardedBytes(test.shape.local_experts() * 4);
    arrays.row_source = GuardedBytes(test.num_rows() * 4);
    all.push_back(std::move(arrays));
  }
  return all;
}

// Row `row` of `rank` against what the source rank sent.
void CheckReceivedRow(const LowLatencyCase& test, const std::vector<LowLatencyReceived>& arrays,
                      int rank, int64_t row, int32_t source) {
  const LowLatencyShape& shape = test.shape;
  const LowLatencyReceived& sender = arrays[source / test.selections()];
  const int64_t token = source % test.selections() / shape.top_k;
  const char* got = arrays[rank].rows.data() + row * test.row_bytes();
  const float* scales = sender.scales.as<float>() + token * test.blocks();
  if (shape.dtype == DType::kF8E4M3) {
    CHECK(std::memcmp(arrays[rank].row_scales.as<float>() + row * test.blocks(), scales,
                      test.blocks() * sizeof(float)) == 0);
  }
  if (!shape.quantized || shape.dtype == DType::kF8E4M3) {
    CHECK(std::memcmp(got, sender.payload.data() + token * test.row_bytes(), test.row_bytes()) ==
          0);
    return;
  }
  for (int64_t i = 0; i < shape.hidden; ++i) {
    const float value = FloatAt(DType::kF8E4M3, sender.payload.data() + token * shape.hidden, i) *
                        scales[i / kQuantBlock];
    CHECK_EQ(BitsAt(shape.dtype, got, i), FormatOf(shape.dtype).Encode(value));
  }
}

void CheckLowLatencyDispatch(Random& random, const LowLatencyCase& test, WorkerPool& pool) {
  const Context context("ll_dispatch");
  const LowLatencyShape& shape = test.shape;
  std::vector<LowLatencyReceived> arrays = MakeArrays(random, test);
  std::vector<LowLatencyDispatchBuffers> buffers;
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    buffers.push_back(BuffersOf(test, arrays[rank], rank));
  const Status status = FinishWithStatus(
      [&](StatusCallback done) { LowLatencyDispatch(shape, buffers, pool, std::move(done)); });
  CHECK_EQ(status.message(), "");
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    const LowLatencyReceived& received = arrays[rank];
    for (const GuardedBytes* array : {&received.rows, &received.row_scales, &received.counts,
                                      &received.row_source, &received.payload, &received.scales}) {
      CHECK(array->GuardsIntact());
    }
    for (int e = 0; e < shape.local_experts(); ++e) {
      const std::vector<int32_t>& expected = test.arrivals[rank][e];
      const auto count = static_cast<int64_t>(expected.size());
      CHECK_EQ(received.counts.as<int32_t>()[e], static_cast<int32_t>(count));
      const int64_t first = e * shape.rows_per_expert();
      for (int64_t i = 0; i < shape.rows_per_expert(); ++i) {
        CHECK_EQ(received.row_source.as<int32_t>()[first + i], i < count ? expected[i] : -1);
        if (i < count) CheckReceivedRow(test, arrays, rank, first + i, expected[i]);
      }
      const int64_t tail = first + count;
      const int64_t end = first + shape.rows_per_expert();
      if (shape.zero_tail) {
        CHECK(received.rows.AllZero(tail * test.row_bytes(), end * test.row_bytes()));
        if (shape.dtype == DType::kF8E4M3) {
          CHECK(received.row_scales.AllZero(tail * test.blocks() * 4, end * test.blocks() * 4));
        }
      } else {
        CHECK(received.rows.Untouched(tail * test.row_bytes(), end * test.row_bytes()));
      }
    }
  }
}

// One rank's arrays of combine and of its backward pass; counts and row_source as dispatch gives
// them.
struct LowLatencyReturned {
  GuardedBytes y, weights, dout, out, dy, dweights;
  std::vector<int32_t> counts, row_source;
};

std::vector<LowLatencyReturned> MakeReturned(Random& random, const LowLatencyCase& test) {
  std::vector<LowLatencyReturned> all(test.shape.num_ranks);
  for (int rank = 0; rank < test.shape.num_ranks; ++rank) {
    LowLatencyReturned& arrays = all[rank];
    arrays.y = RandomRows(random, test.shape.dtype, test.num_rows() * test.shape.hidden);
    arrays.weights = RandomWeights(random, test.selections());
    arrays.dout = RandomRows(random, test.shape.dtype, test.shape.num_tokens * test.shape.hidden);
    arrays.out = GuardedBytes(test.shape.num_tokens * test.row_bytes());
    arrays.dy = GuardedBytes(test.num_rows() * test.row_bytes());
    arrays.dweights = GuardedBytes(test.selections() * 4);
    arrays.row_source.assign(test.num_rows(), -1);
    for (int e = 0; e < test.shape.local_experts(); ++e) {
      const std::vector<int32_t>& sources = test.arrivals[rank][e];
      arrays.counts.push_back(static_cast<int32_t>(sources.size()));
      std::copy(sources.begin(), sources.end(),
                arrays.row_source.begin() + e * test.shape.rows_per_expert());
    }
  }
  return all;
}

std::vector<LowLatencyCombineBuffers> BuffersOf(std::vector<LowLatencyReturned>& all) {
  std::vector<LowLatencyCombineBuffers> buffers;
  for (LowLatencyReturned& arrays : all) {
    buffers.push_back({arrays.y.data(), arrays.weights.as<float>(), arrays.counts.data(),
                       arrays.row_source.data(), arrays.dout.data(), arrays.out.data(),
                       arrays.dy.data(), arrays.dweights.as<float>()});
  }
  return buffers;
}

// The row of selection `s` of rank `home`, looked up in the list of arrivals.
int64_t RowOf(const LowLatencyCase& test, int home, int64_t s) {
  const int32_t expert = test.topk_idx[home][s];
  const int local = expert % test.shape.local_experts();
  const std::vector<int32_t>& sources = test.arrivals[expert / test.shape.local_experts()][local];
  const auto found = std::find(sources.begin(), sources.end(), home * test.selections() + s);
  return local * test.shape.rows_per_expert() + (found - sources.begin());
}

void CheckLowLatencyCombine(Random& random, const LowLatencyCase& test, WorkerPool& pool) {
  const Context context("ll_combine");
  const LowLatencyShape& shape = test.shape;
  std::vector<LowLatencyReturned> arrays = MakeReturned(random, test);
  const Status status = FinishWithStatus([&](StatusCallback done) {
    LowLatencyCombine(shape, BuffersOf(arrays), pool, std::move(done));
  });
  CHECK_EQ(status.message(), "");
  for (int home = 0; home < shape.num_ranks; ++home) {
    CHECK(arrays[home].out.GuardsIntact());
    CHECK(arrays[home].dy.Untouched(0, arrays[home].dy.num_bytes()));
    std::vector<int32_t> dest_rank;
    for (int32_t expert : test.topk_idx[home]) {
      dest_rank.push_back(expert < 0 ? -1 : expert / shape.local_experts());
    }
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      const auto order =
          InOrderOfRank(dest_rank.data(), token * shape.top_k, shape.top_k, shape.num_ranks);
      std::vector<const char*> rows;
      for (int64_t s : order) {
        rows.push_back(arrays[dest_rank[s]].y.data() + RowOf(test, home, s) * test.row_bytes());
      }
      for (int64_t i = 0; i < shape.hidden; ++i) {
        Sum sum;
        for (size_t r = 0; r < rows.size(); ++r) {
          sum.Add(arrays[home].weights.as<float>()[order[r]], shape.dtype, rows[r], i);
        }
        sum.CheckStored(shape.dtype, arrays[home].out.data() + token * test.row_bytes(), i);
      }
    }
  }
}

void CheckLowLatencyCombineGrad(Random& random, const LowLatencyCase& test, WorkerPool& pool) {
  const Context context("ll_combine's gradient");
  const LowLatencyShape& shape = test.shape;
  std::vector<LowLatencyReturned> arrays = MakeReturned(random, test);
  const Status status = FinishWithStatus([&](StatusCallback done) {
    LowLatencyCombineGrad(shape, BuffersOf(arrays), pool, std::move(done));
  });
  CHECK_EQ(status.message(), "");
  for (int home = 0; home < shape.num_ranks; ++home) {
    CHECK(arrays[home].dy.GuardsIntact());
    CHECK(arrays[home].dweights.GuardsIntact());
    CHECK(arrays[home].out.Untouched(0, arrays[home].out.num_bytes()));
    for (int64_t s = 0; s < test.selections(); ++s) {
      const float dweight = arrays[home].dweights.as<float>()[s];
      const int32_t expert = test.topk_idx[home][s];
      if (expert < 0) {
        CHECK_EQ(dweight, 0.0f);
        continue;
      }
      const LowLatencyReturned& there = arrays[expert / shape.local_experts()];
      const int64_t offset = RowOf(test, home, s) * test.row_bytes();
      const char* dout = arrays[home].dout.data() + s / shape.top_k * test.row_bytes();
      CheckScaled(shape.dtype, there.dy.data() + offset, dout, arrays[home].weights.as<float>()[s],
                  shape.hidden);
      CheckDot(dweight, shape.dtype, there.y.data() + offset, dout, shape.hidden);
    }
    for (int e = 0; e < shape.local_experts(); ++e) {
      const int64_t first = e * shape.rows_per_expert();
      const int64_t tail = (first + arrays[home].counts[e]) * test.row_bytes();
      const int64_t end = (first + shape.rows_per_expert()) * test.row_bytes();
      CHECK(shape.zero_tail ? arrays[home].dy.AllZero(tail, end)
                            : arrays[home].dy.Untouched(tail, end));
    }
  }
}

TEST(RandomLowLatencyExchangesMatchTheLoops) {
  for (int seed = 0; seed < 25; ++seed) {
    Random random(seed);
    LowLatencyShape shape;
    shape.num_ranks = static_cast<int>(Uniform(random, 1, 5));
    shape.num_tokens = Uniform(random, 0, 6);
    shape.top_k = static_cast<int>(Uniform(random, 1, 6));
    shape.num_experts = shape.num_ranks * static_cast<int>(Uniform(random, 1, 4));
    // chunk == num_tokens and one hot expert: the region is full to the last row.
    shape.chunk = shape.num_tokens + Uniform(random, 0, 2);
    shape.zero_tail = Uniform(random, 0, 1) == 1;
    for (const Routing routing : kAllRoutings) {
      WorkerPool& pool = PoolOf(static_cast<int>(Uniform(random, 0, 2)));
      for (const bool quantized : {false, true}) {
        for (const DType dtype : kAllDTypes) {
          if (dtype == DType::kF8E4M3 && !quantized) continue;
          shape.dtype = dtype;
          shape.quantized = quantized;
          shape.hidden = quantized ? kQuantBlock * Uniform(random, 1, 2) : Uniform(random, 1, 150);
          const Context context("seed " + std::to_string(seed) + ", routing " + NameOf(routing) +
                                ", " + Describe(shape));
          const LowLatencyCase test = MakeLowLatencyCase(random, shape, routing);
          CheckLowLatencyDispatch(random, test, pool);
          if (quantized) continue;  // what comes home is not quantised
          CheckLowLatencyCombine(random, test, pool);
          CheckLowLatencyCombineGrad(random, test, pool);
        }
      }
    }
  }
}

TEST(LargeLowLatencyExchangesAreCutIntoTasks) {
  Random random(200);
  LowLatencyShape shape{2, 40, 4, 8, 40, 65 * kQuantBlock, DType::kF32, false, true};
  for (const bool quantized : {false, true}) {
    shape.quantized = quantized;
    const Context context(Describe(shape));
    const LowLatencyCase test = MakeLowLatencyCase(random, shape, Routing::kMasked);
    CheckLowLatencyDispatch(random, test, PoolOf(3));
    if (quantized) continue;
    CheckLowLatencyCombine(random, test, PoolOf(3));
    CheckLowLatencyCombineGrad(random, test, PoolOf(3));
  }
}

TEST(LowLatencyDispatchNamesBadIndices) {
  Random random(201);
  const LowLatencyShape shape{3, 4, 2, 6, 4, 8, DType::kBF16, false, true};
  const auto run = [&](int32_t first, int32_t second) {
    LowLatencyCase test = MakeLowLatencyCase(random, shape, Routing::kUniform);
    test.topk_idx[2][1 * 2] = first;
    test.topk_idx[2][1 * 2 + 1] = second;
    std::vector<LowLatencyReceived> arrays = MakeArrays(random, test);
    std::vector<LowLatencyDispatchBuffers> buffers;
    for (int rank = 0; rank < shape.num_ranks; ++rank)
      buffers.push_back(BuffersOf(test, arrays[rank], rank));
    const Status status = FinishWithStatus([&](StatusCallback done) {
      LowLatencyDispatch(shape, buffers, PoolOf(1), std::move(done));
    });
    for (const LowLatencyReceived& received : arrays) {
      CHECK(received.rows.GuardsIntact());
      CHECK(received.row_source.GuardsIntact());
    }
    return status;
  };
  for (const int32_t bad : {6, -2, INT32_MAX, INT32_MIN}) {
    const Status status = run(0, bad);
    CHECK_EQ(status.code(), Code::kOutOfRange);
    CHECK_CONTAINS(status.message(),
                   "ll_dispatch: topk_idx must lie in [-1, 6), got " + std::to_string(bad));
    CHECK_CONTAINS(status.message(), "rank 2, token 1");
  }
  const Status twice = run(5, 5);
  CHECK_EQ(twice.code(), Code::kOutOfRange);
  CHECK_CONTAINS(twice.message(), "must be distinct, got expert 5 twice on rank 2, token 1");
  CHECK(run(-1, -1).ok());  // masked twice is no duplicate
  CHECK(run(0, 5).ok());
}

// What comes back to combine passed through the user's hands; a mix-up is an error, never a stray
// access.
TEST(LowLatencyCombineRefusesForeignArrays) {
  Random random(202);
  const LowLatencyShape shape{2, 3, 2, 4, 3, 16, DType::kF32, false, true};
  const LowLatencyCase test = MakeLowLatencyCase(random, shape, Routing::kOneHotExpert);
  using Op = void (*)(const LowLatencyShape&, std::vector<LowLatencyCombineBuffers>, WorkerPool&,
                      StatusCallback);
  const auto run = [&](Op op, const std::function<void(LowLatencyReturned&)>& spoil) {
    std::vector<LowLatencyReturned> arrays = MakeReturned(random, test);
    spoil(arrays[1]);
    const Status status = FinishWithStatus(
        [&](StatusCallback done) { op(shape, BuffersOf(arrays), PoolOf(1), std::move(done)); });
    for (const LowLatencyReturned& returned : arrays) {
      CHECK(returned.out.GuardsIntact());
      CHECK(returned.dy.GuardsIntact());
    }
    return status;
  };
  for (const Op op : {Op{LowLatencyCombine}, Op{LowLatencyCombineGrad}}) {
    CHECK(run(op, [](LowLatencyReturned&) {}).ok());
    for (const int32_t bad : {12, -1, INT32_MAX, INT32_MIN}) {
      const Status status = run(op, [&](LowLatencyReturned& arrays) {
        arrays.counts[0] = std::max(arrays.counts[0], 1);
        arrays.row_source[0] = bad;
      });
      CHECK_EQ(status.code(), Code::kInvalidArgument);
      CHECK_CONTAINS(status.message(),
                     "row_source holds " + std::to_string(bad) + ", expected [0, 12)");
    }
    for (const int32_t bad : {-1, 7, INT32_MAX, INT32_MIN}) {
      const Status status = run(op, [&](LowLatencyReturned& arrays) {
        std::fill(arrays.row_source.begin(), arrays.row_source.end(), 0);
        arrays.counts[1] = bad;
      });
      CHECK_EQ(status.code(), Code::kInvalidArgument);
      CHECK_CONTAINS(status.message(), "counts holds " + std::to_string(bad) + ", expected [0, 6]");
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
