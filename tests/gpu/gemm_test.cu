// The grouped GEMM on the device against a plain kernel in float64: values, zeros where rows belong
// to no group, nothing written outside, and nothing read from rows that belong to no group (they
// hold NaN).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "csrc/gemm/grouped_matmul.h"
#include "tests/cpp/check.h"
#include "tests/gpu/gemm_testing.h"

using namespace gemm_testing;
using wideep::DType;

namespace {

constexpr size_t kGuardBytes = 1024;
constexpr uint8_t kGuard = 0xA5;

struct Case {
  std::vector<int32_t> group_sizes;
  int64_t num_rows;
  int64_t slab_rows;  // 0: packed
  int64_t k, n;

  std::string Text() const {
    std::string text = "rows " + std::to_string(num_rows) + " slab " + std::to_string(slab_rows) +
                       " k " + std::to_string(k) + " n " + std::to_string(n) + " sizes";
    for (size_t i = 0; i < group_sizes.size() && i < 40; ++i)
      text += " " + std::to_string(group_sizes[i]);
    return text;
  }
  int num_groups() const { return static_cast<int>(group_sizes.size()); }
};

enum class What { kForward, kInputGrad, kWeightGrad };

/// Group of each row, -1 if none; and the first row of each group.
struct Owners {
  std::vector<int32_t> group_of_row;
  std::vector<int32_t> row_begin;
  std::vector<int32_t> num_rows;
};

Owners OwnersOf(const Case& c) {
  Owners owners;
  owners.group_of_row.assign(c.num_rows, -1);
  int64_t next = 0;
  for (int g = 0; g < c.num_groups(); ++g) {
    const int64_t begin = c.slab_rows > 0 ? g * c.slab_rows : next;
    const int64_t limit = c.slab_rows > 0 ? c.slab_rows : c.num_rows - begin;
    const int64_t rows = std::min<int64_t>(std::max(c.group_sizes[g], 0), limit);
    for (int64_t r = begin; r < begin + rows; ++r) owners.group_of_row[r] = g;
    owners.row_begin.push_back(static_cast<int32_t>(begin));
    owners.num_rows.push_back(static_cast<int32_t>(rows));
    next = begin + rows;
  }
  return owners;
}

template <typename T>
__global__ void PoisonKernel(T* rows, const int32_t* group_of_row, int64_t num_rows,
                             int64_t columns) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < num_rows * columns && group_of_row[i / columns] < 0) rows[i] = T(nanf(""));
}

constexpr double kSmallestF16 = 6e-8;  // its smallest numbers are this far apart

struct Errors {
  double square_error, square_value;
  /// Elements with a large error, or that should be exactly zero and are not.
  unsigned long long num_wrong;
  unsigned long long first_wrong;
};

/// One thread for each output element; elements sampled every `step`.
template <typename T, typename Out>
__global__ void CompareKernel(What what, const T* a, const T* b, const Out* out,
                              const int32_t* group_of_row, const int32_t* row_begin,
                              const int32_t* num_rows_of, int64_t num_rows, int64_t k, int64_t n,
                              int64_t count, int64_t step, double tolerance, Errors* errors) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * step;
  if (i >= count) return;
  double value = 0;
  double magnitude = 0;
  bool exact_zero = false;
  const auto add = [&](T x, T y) {
    const double product = double(float(x)) * double(float(y));
    value += product;
    magnitude += fabs(product);
  };
  if (what == What::kWeightGrad) {
    const int64_t g = i / (k * n), row = i / n % k, column = i % n;
    for (int64_t r = row_begin[g]; r < row_begin[g] + num_rows_of[g]; ++r)
      add(a[r * k + row], b[r * n + column]);
    exact_zero = num_rows_of[g] == 0;
  } else {
    const int64_t depth = what == What::kForward ? k : n, columns = what == What::kForward ? n : k;
    const int64_t row = i / columns, column = i % columns;
    const int64_t g = group_of_row[row];
    exact_zero = g < 0;
    for (int64_t d = 0; d < (g < 0 ? 0 : depth); ++d) {
      const int64_t at = what == What::kForward ? d * n + column : column * n + d;
      add(a[row * depth + d], b[g * k * n + at]);
    }
  }
  const double error = fabs(double(float(out[i])) - value);
  atomicAdd(&errors->square_error, error * error);
  atomicAdd(&errors->square_value, value * value);
  const bool right = exact_zero
                         ? float(out[i]) == 0.0f
                         : error <= tolerance * fabs(value) + 1e-5 * magnitude + kSmallestF16;
  if (!right && atomicAdd(&errors->num_wrong, 1ull) == 0) errors->first_wrong = i;
}

template <typename T>
constexpr DType DTypeOf() {
  return std::is_same_v<T, float>    ? DType::kF32
         : std::is_same_v<T, __half> ? DType::kF16
                                     : DType::kBF16;
}

template <typename T, typename Out>
void Run(What what, const Case& c, uint64_t seed, bool sampled = false) {
  const check::Context context(std::string(what == What::kForward     ? "forward "
                                           : what == What::kInputGrad ? "input grad "
                                                                      : "weight grad ") +
                               (sizeof(Out) == 4 ? "f32 " : "") +
                               (std::is_same_v<T, __half> ? "f16 " : "bf16 ") + c.Text());
  const Owners owners = OwnersOf(c);
  const DeviceBytes group_of_row = ToDevice(owners.group_of_row);
  const DeviceBytes row_begin = ToDevice(owners.row_begin);
  const DeviceBytes num_rows_of = ToDevice(owners.num_rows);
  const DeviceBytes group_sizes = ToDevice(c.group_sizes);
  const int64_t a_columns = what == What::kInputGrad ? c.n : c.k;
  const int64_t b_count = what == What::kWeightGrad ? c.num_rows * c.n : c.num_groups() * c.k * c.n;
  const int64_t out_columns = what == What::kInputGrad ? c.k : c.n;
  const int64_t out_count =
      what == What::kWeightGrad ? c.num_groups() * c.k * c.n : c.num_rows * out_columns;

  const DeviceBytes a(c.num_rows * a_columns * sizeof(T));
  const DeviceBytes b(b_count * sizeof(T));
  FillNormal(a.as<T>(), c.num_rows * a_columns, seed * 2, 1.0f);
  FillNormal(b.as<T>(), b_count, seed * 2 + 1, 0.1f);
  const auto poison = [&](T* rows, int64_t columns) {
    if (c.num_rows * columns == 0) return;
    PoisonKernel<<<(c.num_rows * columns + 255) / 256, 256>>>(rows, group_of_row.as<int32_t>(),
                                                              c.num_rows, columns);
  };
  poison(a.as<T>(), a_columns);
  if (what == What::kWeightGrad) poison(b.as<T>(), c.n);

  const size_t out_bytes = out_count * sizeof(Out);
  const DeviceBytes out(out_bytes + 2 * kGuardBytes);
  Require(cudaMemset(out.as<void>(), kGuard, out_bytes + 2 * kGuardBytes), "guards");
  const size_t workspace_bytes = wideep::GroupedMatmulWorkspaceBytes(c.num_groups());
  const DeviceBytes workspace(workspace_bytes + kGuardBytes);
  Require(cudaMemset(workspace.as<void>(), kGuard, workspace_bytes + kGuardBytes), "guards");

  const wideep::RowGroups groups = {group_sizes.as<int32_t>(), c.num_groups(), c.num_rows,
                                    c.slab_rows};
  // Twice: the second launch finds the workspace as the first left it.
  for (int launch = 0; launch < 2; ++launch) {
    if (what == What::kWeightGrad) {
      wideep::GroupedMatmulWeightGradParams p;
      p.groups = groups;
      p.dtype = DTypeOf<T>();
      p.out_dtype = DTypeOf<Out>();
      p.k = c.k;
      p.n = c.n;
      p.rows = a.as<void>();
      p.dout = b.as<void>();
      p.dw = out.as<void>(kGuardBytes);
      p.workspace = workspace.as<void>();
      Require(wideep::LaunchGroupedMatmulWeightGrad(p, nullptr));
    } else {
      wideep::GroupedMatmulParams p;
      p.groups = groups;
      p.dtype = DTypeOf<T>();
      p.out_dtype = DTypeOf<Out>();
      p.k = c.k;
      p.n = c.n;
      p.transpose_w = what == What::kInputGrad;
      p.rows = a.as<void>();
      p.w = b.as<void>();
      p.out = out.as<void>(kGuardBytes);
      p.workspace = workspace.as<void>();
      Require(wideep::LaunchGroupedMatmul(p, nullptr));
    }
  }
  Require(cudaDeviceSynchronize(), "kernel");

  std::vector<uint8_t> guards(3 * kGuardBytes);
  Require(cudaMemcpy(guards.data(), out.as<void>(), kGuardBytes, cudaMemcpyDeviceToHost), "guards");
  Require(cudaMemcpy(guards.data() + kGuardBytes, out.as<void>(kGuardBytes + out_bytes),
                     kGuardBytes, cudaMemcpyDeviceToHost),
          "guards");
  Require(cudaMemcpy(guards.data() + 2 * kGuardBytes, workspace.as<void>(workspace_bytes),
                     kGuardBytes, cudaMemcpyDeviceToHost),
          "guards");
  CHECK_EQ(std::count(guards.begin(), guards.end(), kGuard), std::ptrdiff_t(guards.size()));
  if (out_count == 0) return;

  const DeviceBytes errors_on_device(sizeof(Errors));
  Require(cudaMemset(errors_on_device.as<void>(), 0, sizeof(Errors)), "errors");
  const int64_t step = sampled ? 997 : 1;
  const double tolerance = sizeof(Out) == 4            ? 1e-6
                           : std::is_same_v<T, __half> ? 1.0 / 2048
                                                       : 1.0 / 256;
  CompareKernel<T, Out><<<(out_count / step + 256) / 256, 256>>>(
      what, a.as<T>(), b.as<T>(), out.as<Out>(kGuardBytes), group_of_row.as<int32_t>(),
      row_begin.as<int32_t>(), num_rows_of.as<int32_t>(), c.num_rows, c.k, c.n, out_count, step,
      tolerance, errors_on_device.as<Errors>());
  Errors errors;
  Require(cudaMemcpy(&errors, errors_on_device.as<void>(), sizeof errors, cudaMemcpyDeviceToHost),
          "errors");
  const check::Context where("first wrong element " + std::to_string(errors.first_wrong));
  CHECK_EQ(errors.num_wrong, 0ull);
  const double relative =
      errors.square_value > 0 ? std::sqrt(errors.square_error / errors.square_value) : 0;
  CHECK(relative <= (sizeof(Out) == 4 ? 1e-5 : 3e-3));  // false for NaN
}

template <typename T>
void RunProducts(const Case& c, uint64_t seed, bool sampled = false) {
  for (const What what : {What::kForward, What::kInputGrad, What::kWeightGrad}) {
    Run<T, T>(what, c, seed, sampled);
    Run<T, float>(what, c, seed, sampled);
  }
}

void RunAllTypes(const Case& c, uint64_t seed) {
  RunProducts<__nv_bfloat16>(c, seed);
  RunProducts<__half>(c, seed + 1);
}

Case Packed(std::vector<int32_t> group_sizes, int64_t tail, int64_t k, int64_t n) {
  const int64_t total = std::accumulate(group_sizes.begin(), group_sizes.end(), int64_t{0});
  return {std::move(group_sizes), total + tail, 0, k, n};
}

}  // namespace

TEST(OneTile) { RunAllTypes(Packed({256}, 0, 64, 256), 1); }
TEST(OneWideTileOfDepth) { RunAllTypes(Packed({256}, 0, 512, 512), 2); }
TEST(FewRows) { RunAllTypes(Packed({3}, 0, 64, 128), 3); }
TEST(RaggedRows) { RunAllTypes(Packed({64, 1, 0, 17, 8, 200}, 5, 136, 264), 5); }

TEST(EveryNumberOfRows) {
  // 1 to 288 rows, so that each tile height and each remainder occurs.
  std::vector<int32_t> sizes;
  for (int rows = 1; rows <= 288; ++rows) sizes.push_back(rows);
  RunProducts<__nv_bfloat16>(Packed(sizes, 7, 72, 136), 6);
}

TEST(EmptyGroups) {
  RunAllTypes(Packed({0, 0, 130, 0, 0, 70, 0}, 100, 256, 384), 7);
  RunAllTypes(Packed({0, 0, 0}, 50, 128, 128), 8);
  RunAllTypes(Packed({0, 0, 0}, 0, 128, 128), 9);
}

TEST(OneGroupHoldsAll) { RunAllTypes(Packed({0, 0, 0, 1500, 0, 0, 0, 0}, 0, 320, 520), 10); }

TEST(SmallestSizes) {
  RunAllTypes(Packed({1}, 0, 8, 8), 11);
  RunAllTypes(Packed({5, 2}, 1, 8, 40), 12);
  RunAllTypes(Packed({5, 2}, 1, 40, 8), 13);
}

TEST(ManyGroups) {
  std::mt19937 random(14);
  std::vector<int32_t> sizes(300);
  for (int32_t& size : sizes) size = std::max(0, static_cast<int>(random() % 40) - 12);
  RunAllTypes(Packed(sizes, 33, 64, 72), 14);
}

TEST(SizesThatDoNotFit) {
  RunAllTypes({{100, -5, 300, 50}, 256, 0, 64, 128}, 15);
  RunAllTypes({{2000000000, 2000000000, 2000000000}, 300, 0, 64, 128}, 16);
  RunAllTypes({{40, -1, 7}, 90, 30, 64, 128}, 17);
}

TEST(Slabs) {
  RunAllTypes({{5, 0, 128, 33}, 4 * 128, 128, 192, 264}, 18);
  RunAllTypes({{1000, 0, 513}, 3 * 1000, 1000, 72, 264}, 20);
}

TEST(TailIsLeft) {
  // zero_tail = false: rows of no group keep what they hold.
  const DeviceBytes sizes = ToDevice({30, 0, 20});
  const DeviceBytes rows(100 * 64 * 2), w(3 * 64 * 128 * 2), out(100 * 128 * 4),
      workspace(wideep::GroupedMatmulWorkspaceBytes(3));
  FillNormal(rows.as<__half>(), 100 * 64, 1, 1.0f);
  FillNormal(w.as<__half>(), 3 * 64 * 128, 2, 0.1f);
  Require(cudaMemset(out.as<void>(), kGuard, out.num_bytes()), "out");
  wideep::GroupedMatmulParams p;
  p.groups = {sizes.as<int32_t>(), 3, 100, 0};
  p.dtype = DType::kF16;
  p.out_dtype = DType::kF32;
  p.k = 64;
  p.n = 128;
  p.zero_tail = false;
  p.rows = rows.as<void>();
  p.w = w.as<void>();
  p.out = out.as<void>();
  p.workspace = workspace.as<void>();
  Require(wideep::LaunchGroupedMatmul(p, nullptr));
  std::vector<uint8_t> bytes(out.num_bytes());
  Require(cudaMemcpy(bytes.data(), out.as<void>(), bytes.size(), cudaMemcpyDeviceToHost), "out");
  const auto tail = bytes.begin() + 50 * 128 * 4;
  CHECK_EQ(std::count(tail, bytes.end(), kGuard), bytes.end() - tail);
  CHECK(std::count(bytes.begin(), tail, kGuard) < (tail - bytes.begin()) / 64);
}

TEST(RandomRagged) {
  std::mt19937 random(21);
  for (int round = 0; round < 24; ++round) {
    const int num_groups = 1 + random() % 12;
    std::vector<int32_t> sizes(num_groups);
    for (int32_t& size : sizes) size = random() % 4 == 0 ? 0 : random() % (1u << (random() % 11));
    const int64_t k = 8 * (1 + random() % 80);
    const int64_t n = 8 * (1 + random() % 80);
    RunAllTypes(Packed(sizes, random() % 3 == 0 ? 0 : random() % 300, k, n), 100 + round);
  }
}

TEST(RealSize) {
  std::mt19937 random(22);
  std::vector<int32_t> sizes(16);
  for (int32_t& size : sizes) size = random() % 1000;
  RunProducts<__nv_bfloat16>(Packed(sizes, 128, 2048, 1536), 23, /*sampled=*/true);
}

TEST(NothingToDo) {
  RunAllTypes(Packed({0, 0}, 0, 64, 64), 24);
  RunAllTypes({{}, 64, 0, 64, 64}, 25);
  RunAllTypes({{4, 4}, 16, 0, 0, 64}, 26);
  RunAllTypes({{4, 4}, 16, 0, 64, 0}, 27);
}

TEST(BadArguments) {
  wideep::GroupedMatmulParams p;
  p.k = 12;
  p.n = 64;
  p.groups.num_groups = 1;
  p.groups.num_rows = 8;
  CHECK_CONTAINS(wideep::LaunchGroupedMatmul(p, nullptr).message(), "multiples of 8");
  p.k = 64;
  p.out_dtype = DType::kF16;
  CHECK_CONTAINS(wideep::LaunchGroupedMatmul(p, nullptr).message(), "float32");
  p.out_dtype = DType::kF32;
  p.groups.slab_rows = 5;
  CHECK_CONTAINS(wideep::LaunchGroupedMatmul(p, nullptr).message(), "slabs");
}

TEST(GraphReplay) {
  // Group sizes change between replays of one captured launch.
  constexpr int64_t kRows = 700, kK = 128, kN = 256;
  const Case c{{0, 0, 0}, kRows, 0, kK, kN};
  const DeviceBytes sizes = ToDevice({0, 0, 0});
  const DeviceBytes rows(kRows * kK * 2), w(3 * kK * kN * 2), out(kRows * kN * 2),
      workspace(wideep::GroupedMatmulWorkspaceBytes(3));
  FillNormal(rows.as<__half>(), kRows * kK, 1, 1.0f);
  FillNormal(w.as<__half>(), 3 * kK * kN, 2, 0.1f);
  wideep::GroupedMatmulParams p;
  p.groups = {sizes.as<int32_t>(), 3, kRows, 0};
  p.dtype = p.out_dtype = DType::kF16;
  p.k = kK;
  p.n = kN;
  p.rows = rows.as<void>();
  p.w = w.as<void>();
  p.out = out.as<void>();
  p.workspace = workspace.as<void>();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t graph_exec;
  Require(cudaStreamCreate(&stream), "stream");
  Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  Require(wideep::LaunchGroupedMatmul(p, stream));
  Require(cudaStreamEndCapture(stream, &graph), "capture");
  Require(cudaGraphInstantiate(&graph_exec, graph, 0), "graph");
  for (const std::vector<int32_t>& now :
       {std::vector<int32_t>{700, 0, 0}, {1, 2, 3}, {0, 300, 300}}) {
    const Case at{now, kRows, 0, kK, kN};
    const check::Context context(at.Text());
    Require(cudaMemcpy(sizes.as<void>(), now.data(), 12, cudaMemcpyHostToDevice), "sizes");
    Require(cudaMemset(out.as<void>(), kGuard, kRows * kN * 2), "out");
    Require(cudaDeviceSynchronize(), "before");
    Require(cudaGraphLaunch(graph_exec, stream), "replay");
    Require(cudaStreamSynchronize(stream), "replay");
    const Owners owners = OwnersOf(at);
    const DeviceBytes group_of_row = ToDevice(owners.group_of_row);
    const DeviceBytes errors_on_device(sizeof(Errors));
    Require(cudaMemset(errors_on_device.as<void>(), 0, sizeof(Errors)), "errors");
    CompareKernel<__half, __half><<<(kRows * kN + 255) / 256, 256>>>(
        What::kForward, rows.as<__half>(), w.as<__half>(), out.as<__half>(),
        group_of_row.as<int32_t>(), nullptr, nullptr, kRows, kK, kN, kRows * kN, 1, 1.0 / 2048,
        errors_on_device.as<Errors>());
    Errors errors;
    Require(cudaMemcpy(&errors, errors_on_device.as<void>(), sizeof errors, cudaMemcpyDeviceToHost),
            "errors");
    CHECK_EQ(errors.num_wrong, 0ull);
  }
  cudaGraphExecDestroy(graph_exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}
