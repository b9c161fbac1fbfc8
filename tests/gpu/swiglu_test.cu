// SwiGLU on the device against float64 on the host: values, rows of no group neither read (they
// hold NaN) nor written, nothing written outside.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "csrc/gemm/swiglu.h"
#include "tests/cpp/check.h"
#include "tests/gpu/gemm_testing.h"

using namespace gemm_testing;
using wideep::DType;

namespace {

constexpr uint8_t kGuard = 0xA5;
constexpr size_t kGuardBytes = 256;

struct Case {
  std::vector<int32_t> group_sizes;
  int64_t num_rows;
  int64_t slab_rows;  // 0: packed
  int64_t ffn;
};

std::vector<bool> RowsOfGroups(const Case& c) {
  std::vector<bool> in_group(c.num_rows, false);
  int64_t next = 0;
  for (size_t g = 0; g < c.group_sizes.size(); ++g) {
    const int64_t begin = c.slab_rows > 0 ? static_cast<int64_t>(g) * c.slab_rows : next;
    const int64_t room = c.slab_rows > 0 ? c.slab_rows : c.num_rows - begin;
    next = begin + std::min<int64_t>(std::max(c.group_sizes[g], 0), room);
    std::fill(in_group.begin() + begin, in_group.begin() + next, true);
  }
  return in_group;
}

template <typename T>
DeviceBytes Upload(const std::vector<T>& values) {
  DeviceBytes bytes(values.size() * sizeof(T));
  Require(cudaMemcpy(bytes.as<void>(), values.data(), values.size() * sizeof(T),
                     cudaMemcpyHostToDevice),
          "upload");
  return bytes;
}

/// An output between guards.
class Output {
 public:
  explicit Output(size_t num_bytes) : num_bytes_(num_bytes), device_(num_bytes + 2 * kGuardBytes) {
    Require(cudaMemset(device_.as<void>(), kGuard, num_bytes + 2 * kGuardBytes), "guards");
  }
  void* data() const { return device_.as<void>(kGuardBytes); }

  /// The output's bytes, after checking the guards.
  std::vector<uint8_t> Download() const {
    std::vector<uint8_t> bytes(num_bytes_ + 2 * kGuardBytes);
    Require(cudaMemcpy(bytes.data(), device_.as<void>(), bytes.size(), cudaMemcpyDeviceToHost),
            "download");
    const auto begin = bytes.begin() + kGuardBytes;
    const auto end = bytes.end() - kGuardBytes;
    CHECK_EQ(std::count(bytes.begin(), begin, kGuard), std::ptrdiff_t{kGuardBytes});
    CHECK_EQ(std::count(end, bytes.end(), kGuard), std::ptrdiff_t{kGuardBytes});
    return std::vector<uint8_t>(begin, end);
  }

 private:
  size_t num_bytes_;
  DeviceBytes device_;
};

/// Checks [num_rows, columns] against the values for rows of groups, and the guard elsewhere.
template <typename T>
void CheckRows(const std::vector<uint8_t>& bytes, const std::vector<bool>& in_group,
               int64_t columns, const std::vector<double>& expected) {
  const double tolerance = std::is_same_v<T, __half> ? 1.0 / 1024 : 1.0 / 128;
  for (size_t i = 0; i < expected.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    if (in_group[i / columns]) {
      const double error = std::fabs(static_cast<float>(value) - expected[i]);
      CHECK(error <= tolerance * std::fabs(expected[i]) + 1e-6);
    } else {
      CHECK_EQ(
          std::count(bytes.begin() + i * sizeof(T), bytes.begin() + (i + 1) * sizeof(T), kGuard),
          std::ptrdiff_t{sizeof(T)});
    }
  }
}

template <typename T>
void Run(const Case& c) {
  const check::Context context(std::is_same_v<T, __half> ? "f16" : "bf16");
  const std::vector<bool> in_group = RowsOfGroups(c);
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  const auto draw = [&](int64_t columns) {
    std::vector<T> values(c.num_rows * columns);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = T(in_group[i / columns] ? normal(random) : NAN);
    return values;
  };
  const std::vector<T> hidden = draw(2 * c.ffn);
  const std::vector<T> dout = draw(c.ffn);
  std::vector<double> expected_out(dout.size()), expected_dhidden(hidden.size());
  for (int64_t row = 0; row < c.num_rows; ++row) {
    for (int64_t i = 0; i < c.ffn; ++i) {
      const int64_t at = row * 2 * c.ffn + i;
      const double gate = static_cast<float>(hidden[at]);
      const double up = static_cast<float>(hidden[at + c.ffn]);
      const double d = static_cast<float>(dout[row * c.ffn + i]);
      const double sigmoid = 1 / (1 + std::exp(-gate));
      expected_out[row * c.ffn + i] = gate * sigmoid * up;
      expected_dhidden[at] = d * up * sigmoid * (1 + gate * (1 - sigmoid));
      expected_dhidden[at + c.ffn] = d * gate * sigmoid;
    }
  }

  const DeviceBytes group_sizes = ToDevice(c.group_sizes);
  const DeviceBytes hidden_on_device = Upload(hidden);
  const DeviceBytes dout_on_device = Upload(dout);
  const Output out(dout.size() * sizeof(T));
  const Output dhidden(hidden.size() * sizeof(T));
  wideep::SwigluParams p;
  p.groups = {group_sizes.as<int32_t>(), static_cast<int64_t>(c.group_sizes.size()), c.num_rows,
              c.slab_rows};
  p.dtype = std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
  p.ffn = c.ffn;
  p.hidden = hidden_on_device.as<void>();
  p.out = out.data();
  Require(wideep::LaunchSwiglu(p, nullptr));
  wideep::SwigluGradParams grad;
  grad.groups = p.groups;
  grad.dtype = p.dtype;
  grad.ffn = c.ffn;
  grad.hidden = p.hidden;
  grad.dout = dout_on_device.as<void>();
  grad.dhidden = dhidden.data();
  Require(wideep::LaunchSwigluGrad(grad, nullptr));
  Require(cudaDeviceSynchronize(), "kernels");
  CheckRows<T>(out.Download(), in_group, c.ffn, expected_out);
  CheckRows<T>(dhidden.Download(), in_group, 2 * c.ffn, expected_dhidden);
}

void RunBoth(const Case& c) {
  Run<__nv_bfloat16>(c);
  Run<__half>(c);
}

}  // namespace

TEST(PackedRows) { RunBoth({{3, 0, 40, 1}, 60, 0, 72}); }
TEST(WideRows) { RunBoth({{2, 1}, 4, 0, 2056}); }
TEST(MoreRowsThanBlocks) { RunBoth({{3000, 500}, 3600, 0, 8}); }
TEST(NoRowsInGroups) { RunBoth({{0, 0, 0}, 20, 0, 64}); }
TEST(NoRows) { RunBoth({{0, 0}, 0, 0, 64}); }
TEST(SizesThatDoNotFit) {
  RunBoth({{10, -4, 2000000000, 2000000000}, 50, 0, 16});
  RunBoth({{40, -1, 7}, 90, 30, 16});
}
TEST(Slabs) { RunBoth({{5, 0, 128, 33}, 4 * 128, 128, 24}); }
TEST(ManyGroups) {
  std::vector<int32_t> sizes(300);
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = i % 5;
  RunBoth({sizes, 700, 0, 40});
}

TEST(BadArguments) {
  wideep::SwigluParams p;
  p.ffn = 12;
  CHECK_CONTAINS(wideep::LaunchSwiglu(p, nullptr).message(), "multiple of 8");
  p.ffn = 16;
  p.dtype = DType::kF32;
  CHECK_CONTAINS(wideep::LaunchSwiglu(p, nullptr).message(), "bfloat16");
}
