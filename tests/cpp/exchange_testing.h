// What the tests of exchanges share: buffers with random contents, sums in the order of the
// contract, and waiting for a completion.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/dtype.h"
#include "csrc/core/worker_pool.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {

// Runs an exchange on `pool` and waits for it. `start(done)` must call done() exactly once.
inline void Finish(const std::function<void(std::function<void()>)>& start) {
  check::Counter done;
  start([&done] { done.Add(); });
  CHECK(done.WaitFor(1));
  CHECK_EQ(done.count(), 1);
}

inline int64_t Bytes(DType dtype, int64_t count) {
  return count * static_cast<int64_t>(SizeOf(dtype));
}

inline GuardedBytes RandomRows(Random& random, DType dtype, int64_t count) {
  GuardedBytes rows(Bytes(dtype, count));
  FillValues(random, dtype, rows.data(), count);
  return rows;
}

inline GuardedBytes RandomWeights(Random& random, int64_t count) {
  GuardedBytes weights(count * 4);
  const std::vector<float> values = RandomFloats(random, count);
  if (count > 0) std::memcpy(weights.data(), values.data(), count * sizeof(float));
  return weights;
}

// A float32 sum in the order of the contract, and in double for a second opinion.
class Sum {
 public:
  void Add(float weight, DType dtype, const void* row, int64_t element) {
    const float product = weight * FloatAt(dtype, row, element);
    in_order_ = in_order_ + product;
    const double exact = static_cast<double>(weight) * ValueAt(dtype, row, element);
    exact_ += exact;
    magnitude_ += std::fabs(exact);
    ++terms_;
  }
  void CheckStored(DType dtype, const void* out, int64_t element) const {
    const uint32_t got = BitsAt(dtype, out, element);
    CHECK_EQ(got, FormatOf(dtype).Encode(in_order_));
    const double rounding =
        std::ldexp(magnitude_, -FormatOf(dtype).mantissa_bits - 1) + std::ldexp(1, -25);
    CHECK_NEAR(FormatOf(dtype).Decode(got), exact_,
               terms_ * std::ldexp(magnitude_, -23) + rounding);
  }

 private:
  float in_order_ = 0;
  double exact_ = 0;
  double magnitude_ = 0;
  int terms_ = 0;
};

// <a, b>; the order of a dot product's sum is the kernels' own, so only its value is compared.
inline void CheckDot(float got, DType dtype, const char* a, const char* b, int64_t hidden) {
  double sum = 0;
  double magnitude = 0;
  for (int64_t i = 0; i < hidden; ++i) {
    const double term = ValueAt(dtype, a, i) * ValueAt(dtype, b, i);
    sum += term;
    magnitude += std::fabs(term);
  }
  CHECK_NEAR(got, sum, hidden * std::ldexp(magnitude, -23));
}

// row * weight, rounded once.
inline void CheckScaled(DType dtype, const char* got, const char* row, float weight,
                        int64_t hidden) {
  for (int64_t i = 0; i < hidden; ++i) {
    const float product = weight * FloatAt(dtype, row, i);
    CHECK_EQ(BitsAt(dtype, got, i), FormatOf(dtype).Encode(product));
  }
}

// The selections of a token in order of (rank, k), found the slow way.
inline std::vector<int64_t> InOrderOfRank(const int32_t* dest_rank, int64_t first, int top_k,
                                          int num_ranks) {
  std::vector<int64_t> order;
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (int64_t s = first; s < first + top_k; ++s) {
      if (dest_rank[s] == rank) order.push_back(s);
    }
  }
  return order;
}

inline WorkerPool& PoolOf(int num_helpers) {
  static WorkerPool none(0);
  static WorkerPool one(1);
  static WorkerPool three(3);
  return num_helpers == 0 ? none : num_helpers == 1 ? one : three;
}

}  // namespace testing
}  // namespace wideep
