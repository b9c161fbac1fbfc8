// Times the grouped GEMM: python-free, so that it can run under a profiler.
//
// "slabs*" leaves the rows past each count as they are. GB/s counts rows, outputs and the weights
// of non-empty groups, each once.
//
// e: even groups.
//
//   gemm [m,k,n,groups[e] ..]     default: the shapes of docs/performance_gemm.md
//
// Prints JSON lines.
//
// Data are normal random numbers, never zeros. Buffers rotate so that no launch finds its operands
// in L2. A figure is the median of 7 batches of 10 launches between two events, after one batch of
// warm-up.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "csrc/gemm/grouped_matmul.h"
#include "csrc/gemm/swiglu.h"
#include "tests/gpu/gemm_testing.h"

using namespace gemm_testing;
using wideep::DType;

namespace {

constexpr int kLaunches = 10;
constexpr int kBatches = 7;
constexpr double kRotatedBytes = 256e6;  // several times the L2 of any Hopper

struct Shape {
  int64_t m, k, n;
  int num_groups;
  bool zipf = false;
  int64_t slab_rows = 0;  // 0: packed
  bool leave_tail = false;
  bool even = false;
};

std::vector<int32_t> GroupSizes(const Shape& shape) {
  std::vector<double> weights(shape.num_groups, 1.0);
  if (shape.zipf) {
    for (int g = 0; g < shape.num_groups; ++g) weights[g] = std::pow(g + 1.0, -1.2);
    for (int g = 5; g < shape.num_groups; g += 6) weights[g] = 0;  // empty groups
  }
  if (shape.even) return std::vector<int32_t>(shape.num_groups, shape.m / shape.num_groups);
  std::mt19937 random(1);
  std::shuffle(weights.begin(), weights.end(), random);
  std::discrete_distribution<int> draw(weights.begin(), weights.end());
  std::vector<int32_t> sizes(shape.num_groups);
  for (int64_t row = 0; row < shape.m; ++row) ++sizes[draw(random)];
  return sizes;
}

double MedianMicroseconds(const std::function<void(int)>& launch) {
  cudaEvent_t begin, end;
  Require(cudaEventCreate(&begin), "event");
  Require(cudaEventCreate(&end), "event");
  std::vector<double> us;
  int number = 0;
  for (int batch = -1; batch < kBatches; ++batch) {
    Require(cudaEventRecord(begin), "event");
    for (int i = 0; i < kLaunches; ++i) launch(number++);
    Require(cudaEventRecord(end), "event");
    Require(cudaEventSynchronize(end), "launches");
    float ms = 0;
    Require(cudaEventElapsedTime(&ms, begin, end), "event");
    if (batch >= 0) us.push_back(ms * 1e3 / kLaunches);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(us.begin(), us.begin() + kBatches / 2, us.end());
  return us[kBatches / 2];
}

std::vector<DeviceBytes> Normal(int64_t count, int copies, uint64_t seed, float scale) {
  std::vector<DeviceBytes> buffers;
  for (int i = 0; i < copies; ++i) {
    buffers.emplace_back(count * 2);
    FillNormal(buffers.back().as<__nv_bfloat16>(), count, seed + i, scale);
  }
  return buffers;
}

const char* Layout(const Shape& shape) {
  if (shape.even) return "even";
  if (shape.leave_tail) return "slabs*";
  if (shape.slab_rows > 0) return "slabs";
  return shape.zipf ? "zipf" : "uniform";
}

void Print(const Shape& shape, const char* product, double us, double gigabytes) {
  const double flops = 2.0 * shape.m * shape.k * shape.n;
  std::printf(
      "{\"program\": \"wideep\", \"product\": \"%s\", \"m\": %ld, \"k\": %ld, \"n\": %ld, "
      "\"groups\": %d, \"sizes\": \"%s\", \"us\": %.1f, \"tflops\": %.1f, \"gb_per_s\": %.0f}\n",
      product, shape.m, shape.k, shape.n, shape.num_groups, Layout(shape), us, flops / us * 1e-6,
      gigabytes / us * 1e6);
  std::fflush(stdout);
}

void Measure(const Shape& shape) {
  const std::vector<int32_t> sizes = GroupSizes(shape);
  const int64_t num_groups = shape.num_groups;
  const int64_t num_rows = shape.slab_rows > 0 ? num_groups * shape.slab_rows : shape.m;
  const double bytes = 2.0 * (num_rows * (shape.k + shape.n) + num_groups * shape.k * shape.n);
  const int copies = std::max(1, static_cast<int>(std::ceil(kRotatedBytes / bytes)));
  const DeviceBytes group_sizes = ToDevice(sizes);
  const DeviceBytes workspace(wideep::GroupedMatmulWorkspaceBytes(num_groups));
  const std::vector<DeviceBytes> rows = Normal(num_rows * shape.k, copies, 1, 1.0f);
  const std::vector<DeviceBytes> dout = Normal(num_rows * shape.n, copies, 100, 1.0f);
  const std::vector<DeviceBytes> w = Normal(num_groups * shape.k * shape.n, copies, 200,
                                            1.0f / std::sqrt(static_cast<float>(shape.k)));
  const DeviceBytes out(num_rows * std::max(shape.k, shape.n) * 2);
  const wideep::RowGroups groups = {group_sizes.as<int32_t>(), num_groups, num_rows,
                                    shape.slab_rows};
  int64_t computed_rows = 0;
  for (const int64_t size : sizes) computed_rows += (size + 15) / 16 * 16;
  std::printf("{\"rows rounded up to 16\": %ld, \"largest group\": %d, \"empty groups\": %ld}\n",
              computed_rows, *std::max_element(sizes.begin(), sizes.end()),
              std::count(sizes.begin(), sizes.end(), 0));
  const int64_t used_groups = num_groups - std::count(sizes.begin(), sizes.end(), 0);
  const double weight_gb = 2e-9 * used_groups * shape.k * shape.n;
  const double rows_gb = 2e-9 * shape.m * (shape.k + shape.n);

  for (const bool transpose_w : {false, true}) {
    wideep::GroupedMatmulParams p;
    p.groups = groups;
    p.k = shape.k;
    p.n = shape.n;
    p.transpose_w = transpose_w;
    p.zero_tail = !shape.leave_tail;
    p.out = out.as<void>();
    p.workspace = workspace.as<void>();
    const double us = MedianMicroseconds([&](int number) {
      p.rows = (transpose_w ? dout : rows)[number % copies].as<void>();
      p.w = w[number % copies].as<void>();
      Require(wideep::LaunchGroupedMatmul(p, nullptr));
    });
    Print(shape, transpose_w ? "input grad" : "forward", us, weight_gb + rows_gb);
  }
  for (const DType out_dtype : {DType::kBF16, DType::kF32}) {
    const DeviceBytes dw(num_groups * shape.k * shape.n * wideep::SizeOf(out_dtype));
    wideep::GroupedMatmulWeightGradParams p;
    p.groups = groups;
    p.out_dtype = out_dtype;
    p.k = shape.k;
    p.n = shape.n;
    p.dw = dw.as<void>();
    p.workspace = workspace.as<void>();
    const double us = MedianMicroseconds([&](int number) {
      p.rows = rows[number % copies].as<void>();
      p.dout = dout[number % copies].as<void>();
      Require(wideep::LaunchGroupedMatmulWeightGrad(p, nullptr));
    });
    const double dw_gb = 1e-9 * wideep::SizeOf(out_dtype) * num_groups * shape.k * shape.n;
    Print(shape, out_dtype == DType::kF32 ? "weight grad f32" : "weight grad", us, dw_gb + rows_gb);
  }
}

/// The experts' SwiGLU on 32768 rows, in a buffer of just these and in one of 8 times as many.
void MeasureSwiglu() {
  constexpr int64_t kRows = 32768, kFfn = 1536;
  for (const int64_t capacity : {kRows, 8 * kRows}) {
    const DeviceBytes group_sizes = ToDevice(std::vector<int32_t>(128, kRows / 128));
    const DeviceBytes hidden(capacity * 2 * kFfn * 2), dout(capacity * kFfn * 2);
    const DeviceBytes out(capacity * kFfn * 2), dhidden(capacity * 2 * kFfn * 2);
    FillNormal(hidden.as<__nv_bfloat16>(), capacity * 2 * kFfn, 1, 1.0f);
    FillNormal(dout.as<__nv_bfloat16>(), capacity * kFfn, 2, 1.0f);
    wideep::SwigluParams p;
    p.groups = {group_sizes.as<int32_t>(), 128, capacity, 0};
    p.ffn = kFfn;
    p.hidden = hidden.as<void>();
    p.out = out.as<void>();
    wideep::SwigluGradParams grad;
    grad.groups = p.groups;
    grad.ffn = kFfn;
    grad.hidden = p.hidden;
    grad.dout = dout.as<void>();
    grad.dhidden = dhidden.as<void>();
    const auto print = [&](const char* product, double us, int64_t arrays) {
      std::printf(
          "{\"program\": \"wideep\", \"product\": \"%s\", \"rows\": %ld, \"capacity\": %ld, "
          "\"ffn\": %ld, \"us\": %.1f, \"gb_per_s\": %.0f}\n",
          product, kRows, capacity, kFfn, us, 2e-3 * arrays * kRows * kFfn / us);
    };
    print("swiglu", MedianMicroseconds([&](int) { Require(wideep::LaunchSwiglu(p, nullptr)); }), 3);
    print("swiglu grad",
          MedianMicroseconds([&](int) { Require(wideep::LaunchSwigluGrad(grad, nullptr)); }), 5);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Shape> shapes;
  for (int i = 1; i < argc; ++i) {
    Shape shape = {};
    if (std::sscanf(argv[i], "%ld,%ld,%ld,%d", &shape.m, &shape.k, &shape.n, &shape.num_groups) <
        4) {
      std::fprintf(stderr, "expected m,k,n,groups[e], got %s\n", argv[i]);
      return 2;
    }
    shape.even = std::strchr(argv[i], 'e') != nullptr;
    shapes.push_back(shape);
  }
  if (shapes.empty()) {
    shapes = {{8192, 7168, 4096, 32},
              {32768, 7168, 4096, 32},
              {32768, 2048, 7168, 32},
              {32768, 2048, 1536, 16},
              {32768, 7168, 4096, 32, /*zipf=*/true},
              {256, 7168, 4096, 32},
              {1024, 7168, 4096, 32},
              {1024, 7168, 4096, 32, false, /*slab_rows=*/1024},
              {1024, 7168, 4096, 32, false, 1024, /*leave_tail=*/true},
              {128, 2048, 1536, 16},
              {8192, 7168, 4096, 32, false, 0, false, /*even=*/true},
              {32768, 7168, 4096, 32, false, 0, false, true},
              {32768, 2048, 1536, 16, false, 0, false, true}};
  }
  for (const Shape& shape : shapes) Measure(shape);
  MeasureSwiglu();
  return 0;
}
