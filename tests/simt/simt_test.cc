// The emulator itself: that right kernels give right results whatever the order of threads, and
// that each fault is found.
#include <algorithm>
#include <string>
#include <vector>

#include "csrc/core/convert.cuh"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"
#include "tests/simt/device.h"
#include "tests/simt/toy_kernels.cuh"

namespace wideep {
namespace testing {
namespace {

using check::Context;

constexpr int kRingThreads = 64;

/// Ranks from `first_rank` on run; returns the report.
std::string RunRing(const simt::Options& options, Fault fault, int num_ranks, int first_rank = 0,
                    uint64_t deadline_ns = ~uint64_t{0}, std::vector<uint32_t>* gave_up = nullptr) {
  constexpr int kLaps = 3;
  simt::Device device(num_ranks, options);
  RingParams p;
  p.num_ranks = num_ranks;
  p.laps = kLaps;
  p.deadline_ns = deadline_ns;
  p.fault = fault;
  std::vector<uint32_t*> flags;
  for (int r = 0; r < num_ranks; ++r) {
    p.flag[r] = device.Array<uint32_t>(r, 1, "flag");
    *p.flag[r] = 0;
    p.payload[r] = device.Array<int32_t>(r, kRingThreads, "payload");
    std::fill_n(p.payload[r], kRingThreads, 0);
    flags.push_back(device.Array<uint32_t>(r, 1, "gave_up"));
    *flags.back() = 0;
  }
  for (int r = first_rank; r < num_ranks; ++r) {
    p.rank = r;
    p.gave_up = flags[r];
    CHECK(Launch(RingKernel<>, 1, kRingThreads, 16, device.stream(r), p, "ring").ok());
  }
  const std::string report = device.RunAll();
  if (report.empty() && !gave_up) {
    for (int t = 0; t < kRingThreads; ++t) CHECK_EQ(p.payload[0][t], kLaps * num_ranks);
  }
  if (gave_up) {
    for (const uint32_t* flag : flags) gave_up->push_back(*flag);
  }
  return report;
}

/// The words of `to` after RowsKernel on `blocks` blocks; rank 1 adds them up.
struct RowsResult {
  std::string report;
  bool right;
  simt::Stats stats;
};
RowsResult RunRows(const simt::Options& options, Fault fault, int64_t num_rows = 13,
                   int blocks = 2) {
  simt::Device device(2, options);
  RowsParams p;
  p.num_rows = num_rows;
  p.fault = fault;
  const int64_t num_words = num_rows * kRowBytes / 4;
  auto* from = device.Array<int32_t>(0, num_words, "from");
  for (int64_t i = 0; i < num_words; ++i) from[i] = static_cast<int32_t>(i);
  auto* to = device.Array<int32_t>(1, num_words, "to");
  p.from = reinterpret_cast<char*>(from);
  p.to = reinterpret_cast<char*>(to);
  p.blocks_done = device.Array<uint32_t>(0, 1, "blocks_done");
  p.done = device.Array<uint32_t>(1, 1, "done");
  *p.blocks_done = *p.done = 0;
  auto* sum = device.Array<int32_t>(1, 1, "sum");
  const int64_t shared_bytes = 2 * kStages * (kRowBytes + 8);
  CHECK(Launch(RowsKernel<>, blocks, 64, shared_bytes, device.stream(0), p, "rows").ok());
  CHECK(
      Launch(SumKernel<>, 1, 32, 0, device.stream(1), SumParams{to, num_words, p.done, sum}, "sum")
          .ok());
  RowsResult result;
  result.report = device.RunAll();
  result.right = true;
  int64_t expected_sum = 0;
  for (int64_t i = 0; i < num_words; ++i) {
    result.right = result.right && to[i] == i + 1;
    expected_sum += i + 1;
  }
  result.right = result.right && *sum == static_cast<int32_t>(expected_sum);
  result.stats = device.stats();
  return result;
}

std::string RunPrefix(const simt::Options& options, Fault fault) {
  constexpr int kThreads = 128;
  simt::Device device(1, options);
  PrefixParams p;
  auto* in = device.Array<int32_t>(0, kThreads, "in");
  for (int t = 0; t < kThreads; ++t) in[t] = t * 7 % 5;
  p.in = in;
  p.out = device.Array<int32_t>(0, kThreads, "out");
  p.same = device.Array<uint32_t>(0, kThreads, "same");
  p.neighbour = device.Array<int32_t>(0, kThreads, "neighbour");
  p.fault = fault;
  const int64_t shared_bytes = 4 * (32 + kThreads);
  CHECK(Launch(PrefixKernel<>, 1, kThreads, shared_bytes, device.stream(0), p, "prefix").ok());
  const std::string report = device.RunAll();
  if (!report.empty()) return report;
  int32_t before = 0;
  for (int t = 0; t < kThreads; ++t) {
    const Context context(Labelled("thread", t));
    CHECK_EQ(p.out[t], before);
    before += in[t];
    uint32_t same = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (in[t / 32 * 32 + lane] == in[t]) same |= 1u << lane;
    }
    CHECK_EQ(p.same[t], same);
    CHECK_EQ(p.neighbour[t], in[t ^ 1]);
  }
  return report;
}

simt::Options Seed(uint64_t seed, bool check_races = true) {
  simt::Options options;
  options.seed = seed;
  options.check_races = check_races;
  return options;
}

TEST(RingIsRightInEveryOrder) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    simt::Options options = Seed(seed);
    options.slow_rank = static_cast<int>(seed % 5) - 1;
    CHECK_EQ(RunRing(options, Fault::kNone, 1 + static_cast<int>(seed % 4)), "");
  }
}

std::string RunCount(uint64_t seed, Fault fault) {
  simt::Device device(1, Seed(seed));
  CountParams p;
  p.count = device.Array<uint64_t>(0, 1, "count");
  p.words = device.Array<int32_t>(0, 2, "words");
  p.sum = device.Array<int32_t>(0, 1, "sum");
  *p.count = 0;
  p.fault = fault;
  CHECK(Launch(CountKernel<>, 1, 96, 0, device.stream(0), p, "count").ok());
  std::string report = device.RunAll();
  if (report.empty()) CHECK_EQ(*p.sum, 3);
  return report;
}

/// Who acquires a count has what came before each addition, not only before the last one.
TEST(AdditionsGoOnWithEarlierReleases) {
  for (uint64_t seed = 1; seed <= 20; ++seed) CHECK_EQ(RunCount(seed, Fault::kNone), "");
  CHECK_CONTAINS(RunCount(1, Fault::kRelaxedStore), "race");
}

TEST(RowsAreRightInEveryOrder) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    const RowsResult result = RunRows(Seed(seed), Fault::kNone);
    CHECK_EQ(result.report, "");
    CHECK(result.right);
    CHECK_EQ(result.stats.copies, 26);
  }
}

TEST(PrefixSumsAreRightInEveryOrder) {
  for (uint64_t seed = 1; seed <= 60; ++seed) CHECK_EQ(RunPrefix(Seed(seed), Fault::kNone), "");
}

TEST(TheSameSeedRunsTheSameWay) {
  const RowsResult first = RunRows(Seed(5), Fault::kNone);
  const RowsResult again = RunRows(Seed(5), Fault::kNone);
  const RowsResult other = RunRows(Seed(6), Fault::kNone);
  CHECK_EQ(first.stats.steps, again.stats.steps);
  CHECK_EQ(first.stats.now_ns, again.stats.now_ns);
  CHECK(first.stats.steps != other.stats.steps);
}

// A race is one whatever the interleaving, so every seed must show it.
TEST(RacesAreReported) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const Context context(Labelled("seed", static_cast<int64_t>(seed)));
    for (const Fault fault : {Fault::kRelaxedLoad, Fault::kRelaxedStore, Fault::kGpuScope,
                              Fault::kNoBarrier, Fault::kFlagFirst}) {
      const Context which(Labelled("fault", static_cast<int64_t>(fault)));
      const std::string report = RunRing(Seed(seed), fault, 3);
      CHECK_CONTAINS(report, "race: ");
      CHECK_CONTAINS(report, "of \"payload\"");
      CHECK_CONTAINS(report, "toy_kernels.cuh:");
    }
    for (const Fault fault :
         {Fault::kNoLoadWait, Fault::kNoReadWait, Fault::kNoWriteWait, Fault::kNoProxyFence}) {
      const Context which(Labelled("fault", static_cast<int64_t>(fault)));
      const std::string report = RunRows(Seed(seed), fault).report;
      CHECK_CONTAINS(report, "race: ");
      CHECK_CONTAINS(report, "bulk copy");
    }
    CHECK_CONTAINS(RunPrefix(Seed(seed), Fault::kNoSyncwarp), "race: ");
  }
}

// Without looking for races a missing wait still gives wrong rows, if not in every order.
TEST(MissingWaitsGiveWrongRows) {
  for (const Fault fault : {Fault::kNoLoadWait, Fault::kNoReadWait, Fault::kNoWriteWait}) {
    const Context which(Labelled("fault", static_cast<int64_t>(fault)));
    int num_wrong = 0;
    for (uint64_t seed = 1; seed <= 40; ++seed) {
      const RowsResult result = RunRows(Seed(seed, /*check_races=*/false), fault);
      if (!result.report.empty() || !result.right) ++num_wrong;
    }
    CHECK(num_wrong > 0);
  }
}

TEST(BadCopiesAreReported) {
  CHECK_CONTAINS(RunRows(Seed(1), Fault::kUnaligned).report, "no positive multiple of 16");
  const std::string report = RunRows(Seed(1), Fault::kPastEnd).report;
  CHECK_CONTAINS(report, "bulk load of 256 bytes");
  CHECK_CONTAINS(report, "of \"from\" (3328 bytes, rank 0)");
  CHECK_CONTAINS(report, "in rows, rank 0, block");
  int num_found = 0;  // copies may happen to be made in time
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const std::string at_end = RunRows(Seed(seed), Fault::kNoWaitAtEnd).report;
    num_found += at_end.find("the block ended while") != std::string::npos;
  }
  CHECK(num_found > 0);
}

TEST(DivergenceIsReported) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    CHECK_CONTAINS(RunPrefix(Seed(seed), Fault::kHalfBlock), "divergent __syncthreads");
    CHECK_CONTAINS(RunPrefix(Seed(seed), Fault::kHalfMask), "masks of a warp disagree");
  }
}

TEST(DeadlockIsReportedWithWhoWaitsWhere) {
  const std::string report = RunRing(Seed(3), Fault::kNeverRaised, 2);
  CHECK_CONTAINS(report, "deadlock: threads poll, and nothing changes");
  CHECK_CONTAINS(report, "rank 1, ring, block 0, thread 0: ");
  CHECK_CONTAINS(report, "rank 1, ring, block 0, threads 1 to 63: __syncthreads at ");
  CHECK_CONTAINS(report, "toy_kernels.cuh:");
}

TEST(DeadlinesPass) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    std::vector<uint32_t> gave_up;
    const uint64_t thirty_seconds = 30'000'000'000;
    CHECK_EQ(RunRing(Seed(seed), Fault::kNone, 3, /*first_rank=*/1, thirty_seconds, &gave_up), "");
    CHECK_EQ(gave_up[0], 0u);
    CHECK_EQ(gave_up[1], 1u);
    CHECK_EQ(gave_up[2], 1u);
  }
}

struct StoreParams {
  int32_t* at = nullptr;
  int64_t index = 0;
  int32_t value = 0;
};
template <int kUnused = 0>
__global__ void StoreKernel(const __grid_constant__ StoreParams p) {
  if (threadIdx.x == 0) p.at[p.index] = p.value;
}

TEST(StreamsRunInOrderAndStopWhenKilled) {
  simt::Device device(2);
  auto* x = device.Array<int32_t>(0, 1, "x");
  for (int i = 0; i < 5; ++i) {
    CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(0), StoreParams{x, 0, i}, "store").ok());
  }
  CHECK_EQ(device.RunAll(), "");
  CHECK_EQ(*x, 4);
  device.StartAt(0, device.stats().now_ns + 1'000'000);
  device.KillAt(1, 0);
  CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(0), StoreParams{x, 0, 7}, "store").ok());
  CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(1), StoreParams{x, 0, 8}, "store").ok());
  CHECK_EQ(device.RunAll(), "");
  CHECK_EQ(*x, 7);
  CHECK(device.stats().now_ns >= 1'000'000);
}

TEST(OrdinaryAccessesAreChecked) {
  {
    simt::Device device(1);
    auto* x = device.Array<int32_t>(0, 5, "x");
    CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(0), StoreParams{x, 5, 1}, "store").ok());
    const std::string report = device.RunAll();
    CHECK_CONTAINS(report, "write of 4 bytes");
    CHECK_CONTAINS(report, "byte 20 of \"x\" (20 bytes, rank 0)");
  }
  {
    simt::Device device(1);
    auto* x = device.Array<int32_t>(0, 5, "x");
    x[5] = 0;  // as code that is compiled without the hooks would
    CHECK_CONTAINS(device.RunAll(), "written outside of an allocation: byte 20 of \"x\"");
  }
  {
    simt::Device device(2);
    auto* x = device.Array<int32_t>(0, 1, "x");
    *x = 1;
    for (int r = 0; r < 2; ++r) {
      CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(r), StoreParams{x, 0, 1}, "store").ok());
    }
    CHECK_EQ(device.RunAll(), "");  // nothing changes
    for (int r = 0; r < 2; ++r) {
      CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(r), StoreParams{x, 0, r + 2}, "store")
                .ok());
    }
    CHECK_CONTAINS(device.RunAll(), "race: write");
  }
  {
    simt::Device device(1);
    auto* x = device.Array<int32_t>(0, 1, "x");
    device.Free(x);
    CHECK(Launch(StoreKernel<>, 1, 32, 0, device.stream(0), StoreParams{x, 0, 1}, "store").ok());
    CHECK_CONTAINS(device.RunAll(), "freed");
  }
}

TEST(LaunchesThatNoGpuTakesAreRefused) {
  simt::Device device(1);
  const StoreParams p;
  CHECK_CONTAINS(Launch(StoreKernel<>, 1, 33, 0, device.stream(0), p, "store").message(),
                 "multiple of 32");
  CHECK_CONTAINS(Launch(StoreKernel<>, 0, 32, 0, device.stream(0), p, "store").message(),
                 "grid_blocks");
  CHECK_CONTAINS(Launch(StoreKernel<>, 1, 32, 1 << 20, device.stream(0), p, "store").message(),
                 "shared_bytes");
}

struct WarpParams {
  int32_t* out = nullptr;  // [8][32]
};
template <int kUnused = 0>
__global__ void WarpKernel(const __grid_constant__ WarpParams p) {
  const int lane = threadIdx.x;
  int32_t* out = p.out + lane;
  out[0] = __shfl_sync(~0u, lane * 10, 5);
  out[32] = __shfl_xor_sync(~0u, lane, 3);
  out[64] = __shfl_down_sync(~0u, lane, 4, 16);
  out[96] = static_cast<int32_t>(__ballot_sync(~0u, lane % 3 == 0));
  out[128] = __any_sync(~0u, lane == 40) * 2 + __all_sync(~0u, lane < 32);
  out[160] = __reduce_max_sync(~0u, lane - 20);
  out[192] = static_cast<int32_t>(__reduce_max_sync(~0u, static_cast<unsigned int>(lane - 20)));
  // The two halves apart.
  out[224] = lane < 16 ? __reduce_add_sync(0xffffu, 1) : __reduce_add_sync(0xffff0000u, 2);
}

TEST(CollectivesOfAWarp) {
  simt::Device device(1);
  auto* out = device.Array<int32_t>(0, 8 * 32, "out");
  CHECK(Launch(WarpKernel<>, 1, 32, 0, device.stream(0), WarpParams{out}, "warp").ok());
  CHECK_EQ(device.RunAll(), "");
  for (int lane = 0; lane < 32; ++lane) {
    const Context context(Labelled("lane", lane));
    CHECK_EQ(out[lane], 50);
    CHECK_EQ(out[32 + lane], lane ^ 3);
    CHECK_EQ(out[64 + lane], lane % 16 + 4 < 16 ? lane + 4 : lane);
    CHECK_EQ(out[96 + lane], 0x49249249);
    CHECK_EQ(out[128 + lane], 1);
    CHECK_EQ(out[160 + lane], 11);
    CHECK_EQ(out[192 + lane], -1);
    CHECK_EQ(out[224 + lane], lane < 16 ? 16 : 32);
  }
}

TEST(RowsConvertAsTheFormatsSay) {
  Random random(11);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    float values[8];
    FillValues(random, DType::kF32, values, 8);
    const int4 bf16 = Pack<DType::kBF16>(values);
    const int4 f16 = Pack<DType::kF16>(values);
    float back[8];
    Unpack<DType::kBF16>(bf16, back);
    for (int i = 0; i < 8; ++i) {
      CHECK_EQ(BitsAt(DType::kBF16, &bf16, i), FormatOf(DType::kBF16).Encode(values[i]));
      CHECK_EQ(BitsAt(DType::kF16, &f16, i), FormatOf(DType::kF16).Encode(values[i]));
      CHECK_EQ(back[i], FloatAt(DType::kBF16, &bf16, i));
    }
    const uint32_t fp8 = PackFp8(values[0], 1e6f, -1e6f, values[3]);
    CHECK_EQ(fp8 & 0xff, FormatOf(DType::kF8E4M3).Encode(values[0]));
    CHECK_EQ(fp8 >> 8 & 0xffff, 0xfe7eu);
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
