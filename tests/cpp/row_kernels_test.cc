// Row kernels: every variant that this processor runs gives the bits of a scalar reference.
#include "csrc/ep/row_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;

constexpr int kDotLanes = 64;  // partial sums of scale_and_dot, added pairwise at the end
constexpr NumberFormat kE4M3 = {4, 3, false};
constexpr NumberFormat kF32 = {8, 23, true};

std::vector<const RowKernels*> Variants() {
  const RowKernels* variants[8];
  const int count = ListRowKernels(variants, 8);
  return std::vector<const RowKernels*>(variants, variants + count);
}

void CheckRow(DType dtype, const void* got, const std::vector<uint32_t>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const uint32_t bits = BitsAt(dtype, got, static_cast<int64_t>(i));
    if (SameNumber(dtype, bits, expected[i])) continue;
    const Context context(Labelled("element", static_cast<int64_t>(i)));
    CHECK_EQ(bits, expected[i]);
  }
}

uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float FloatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

GuardedBytes RandomBits(Random& random, int64_t num_bytes) {
  GuardedBytes bytes(num_bytes);
  for (int64_t i = 0; i < num_bytes; ++i)
    bytes.data()[i] = static_cast<char>(Uniform(random, 0, 255));
  return bytes;
}

GuardedBytes RandomRow(Random& random, DType dtype, int64_t hidden, bool any_bits) {
  const int64_t num_bytes = hidden * static_cast<int64_t>(SizeOf(dtype));
  if (any_bits) return RandomBits(random, num_bytes);
  GuardedBytes row(num_bytes);
  FillValues(random, dtype, row.data(), hidden);
  return row;
}

std::vector<int64_t> OddSizes(Random& random) {
  std::vector<int64_t> sizes = {0,  1,  2,   3,   7,   15,  31,  63,  64,
                                65, 96, 127, 128, 129, 191, 192, 193, 1000};
  for (int i = 0; i < 6; ++i) sizes.push_back(Uniform(random, 1, 700));
  return sizes;
}

// ---- the reference formats themselves ----

TEST(ReferenceFormatsRoundTrip) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF8E4M3}) {
    const NumberFormat format = FormatOf(dtype);
    for (uint32_t bits = 0; bits < 1u << (8 * SizeOf(dtype)); ++bits) {
      const double value = format.Decode(bits);
      if (!std::isnan(value)) CHECK_EQ(format.Encode(value), bits);
    }
  }
  Random random(3);
  for (int i = 0; i < 100000; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    const float value = FloatOfBits(bits);
    if (std::isnan(value)) continue;
    CHECK_EQ(kF32.Decode(bits), static_cast<double>(value));
    CHECK_EQ(kF32.Encode(value), bits);
  }
  CHECK_EQ(kE4M3.max_finite(), 448.0);
  CHECK_EQ(FormatOf(DType::kF16).max_finite(), 65504.0);
  CHECK_EQ(FormatOf(DType::kBF16).Decode(0x3fc0), 1.5);
}

// ---- which variants there are ----

TEST(VariantsAreListedWidestLast) {
  const std::vector<const RowKernels*> variants = Variants();
  std::string names;
  for (const RowKernels* kernels : variants) names += std::string(" ") + kernels->isa;
  std::printf("variants:%s\n", names.c_str());
  CHECK(!variants.empty());
  CHECK_EQ(std::string(variants[0]->isa), "portable");
#if defined(__x86_64__)
  const char* const order[] = {"portable", "v3", "v4"};
  for (size_t i = 0; i < variants.size(); ++i) CHECK_EQ(std::string(variants[i]->isa), order[i]);
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) CHECK(variants.size() >= 2);
#endif
  const RowKernels* one[2] = {nullptr, nullptr};
  CHECK_EQ(ListRowKernels(one, 1), 1);
  CHECK(one[1] == nullptr);
  if (std::getenv("WIDEEP_ISA") == nullptr)
    CHECK_EQ(std::string(SelectRowKernels().isa), variants.back()->isa);
}

// ---- copy ----

TEST(CopyWritesExactlyItsBytes) {
  Random random(11);
  std::vector<int64_t> sizes;
  for (int64_t bytes = 0; bytes <= 200; ++bytes) sizes.push_back(bytes);
  for (const int64_t bytes : {256, 272, 1000, 1024, 1040, 4096, 4112, 14336, 14337})
    sizes.push_back(bytes);
  for (const RowKernels* kernels : Variants()) {
    for (const int64_t bytes : sizes) {
      for (const int offset : {0, 1, 4, 16, 48}) {
        for (const bool stream : {false, true}) {
          const GuardedBytes src = RandomBits(random, bytes + 3);
          GuardedBytes dst(bytes, offset);
          const char* const from = src.data() + bytes % 3;  // the source may lie anywhere
          kernels->copy(dst.data(), from, bytes, stream);
          kernels->finish_streams();
          const Context context(std::string(kernels->isa) + ", " + Labelled("bytes", bytes) + ", " +
                                Labelled("offset", offset) + ", " + Labelled("stream", stream));
          CHECK(std::memcmp(dst.data(), from, bytes) == 0);
          CHECK(dst.GuardsIntact());
        }
      }
    }
  }
}

// ---- weighted_sum ----

void CheckWeightedSum(DType dtype, const std::vector<GuardedBytes>& rows, const float* weights,
                      int64_t hidden) {
  std::vector<const void*> pointers;
  for (const GuardedBytes& row : rows) pointers.push_back(row.data());
  std::vector<uint32_t> expected(hidden);
  for (int64_t i = 0; i < hidden; ++i) {
    float sum = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      const float product = (weights ? weights[r] : 1.0f) * FloatAt(dtype, pointers[r], i);
      sum = sum + product;
    }
    expected[i] = FormatOf(dtype).Encode(sum);
  }
  for (const RowKernels* kernels : Variants()) {
    const Context context(std::string(kernels->isa) + ", " + NameOf(dtype) + ", " +
                          Labelled("hidden", hidden) + ", " +
                          Labelled("rows", static_cast<int64_t>(rows.size())));
    GuardedBytes out(hidden * static_cast<int64_t>(SizeOf(dtype)));
    kernels->weighted_sum(dtype, out.data(), pointers.data(), weights,
                          static_cast<int>(rows.size()), hidden);
    CheckRow(dtype, out.data(), expected);
    CHECK(out.GuardsIntact());
  }
}

TEST(WeightedSumMatchesScalarFloat32) {
  Random random(21);
  for (const DType dtype : kFloatDTypes) {
    for (const int64_t hidden : OddSizes(random)) {
      for (const int num_rows : {0, 1, 2, 3, 8}) {
        for (const bool any_bits : {false, true}) {
          std::vector<GuardedBytes> rows;
          for (int r = 0; r < num_rows; ++r)
            rows.push_back(RandomRow(random, dtype, hidden, any_bits));
          const std::vector<float> weights = RandomFloats(random, num_rows);
          CheckWeightedSum(dtype, rows, weights.data(), hidden);
          CheckWeightedSum(dtype, rows, nullptr, hidden);
        }
      }
    }
    std::vector<GuardedBytes> rows;
    for (int r = 0; r < 64; ++r) rows.push_back(RandomRow(random, dtype, 333, false));
    CheckWeightedSum(dtype, rows, RandomFloats(random, 64).data(), 333);
  }
}

// The scalar float32 reference itself, against double.
TEST(WeightedSumIsCloseToDouble) {
  Random random(22);
  const int64_t hidden = 777;
  const int num_rows = 8;
  for (const DType dtype : kFloatDTypes) {
    std::vector<GuardedBytes> rows;
    std::vector<const void*> pointers;
    for (int r = 0; r < num_rows; ++r) {
      rows.push_back(RandomRow(random, dtype, hidden, false));
      pointers.push_back(rows.back().data());
    }
    const std::vector<float> weights = RandomFloats(random, num_rows);
    GuardedBytes out(hidden * static_cast<int64_t>(SizeOf(dtype)));
    SelectRowKernels().weighted_sum(dtype, out.data(), pointers.data(), weights.data(), num_rows,
                                    hidden);
    for (int64_t i = 0; i < hidden; ++i) {
      double sum = 0;
      double magnitude = 0;
      for (int r = 0; r < num_rows; ++r) {
        const double term = static_cast<double>(weights[r]) * ValueAt(dtype, pointers[r], i);
        sum += term;
        magnitude += std::fabs(term);
      }
      const double rounding = std::ldexp(std::fabs(sum), -FormatOf(dtype).mantissa_bits - 1) +
                              std::ldexp(1, -25);  // half a subnormal of float16
      CHECK_NEAR(ValueAt(dtype, out.data(), i), sum,
                 num_rows * std::ldexp(magnitude, -23) + rounding);
    }
  }
}

// weighted_sum of one row of ones is the weight, rounded: every rounding case of the row formats.
TEST(StoresRoundToNearestEven) {
  Random random(23);
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    const NumberFormat format = FormatOf(dtype);
    std::vector<float> cases = {0.0f,
                                -0.0f,
                                65519.996f,
                                65520.0f,
                                -65520.0f,
                                3.4028235e38f,
                                3.3961776e38f,
                                FloatOfBits(0x7f7f7fff),
                                FloatOfBits(0x7f7f8000),
                                HUGE_VALF,
                                -HUGE_VALF,
                                std::nanf(""),
                                FloatOfBits(0x7f800001),
                                FloatOfBits(0xffffffff),
                                FloatOfBits(1),
                                FloatOfBits(0x807fffff)};
    for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
      // Half way to the next value, and its two neighbours in float32.
      const double low = format.Decode(bits);
      const double high = bits + 1 == format.infinity() ? 2 * low - format.Decode(bits - 1)
                                                        : format.Decode(bits + 1);
      const auto middle = static_cast<float>((low + high) / 2);
      cases.push_back(middle);
      cases.push_back(-std::nextafterf(middle, 0.0f));
      cases.push_back(std::nextafterf(middle, HUGE_VALF));
    }
    for (int i = 0; i < 20000; ++i) cases.push_back(FloatOfBits(static_cast<uint32_t>(random())));
    uint16_t one;
    const uint32_t one_bits = format.Encode(1.0);
    std::memcpy(&one, &one_bits, sizeof(one));
    // The first 64 elements take the vectorised path, the last one the remainder.
    const std::vector<uint16_t> ones(65, one);
    const void* row = ones.data();
    for (const RowKernels* kernels : Variants()) {
      for (const float value : cases) {
        uint16_t out[65];
        kernels->weighted_sum(dtype, out, &row, &value, 1, 65);
        // 0 + -0 is +0.
        const uint32_t expected = format.Encode(value == 0 ? 0.0 : static_cast<double>(value));
        for (const int i : {0, 63, 64}) {
          if (SameNumber(dtype, out[i], expected)) continue;
          const Context context(std::string(kernels->isa) + ", " + NameOf(dtype) + ", element " +
                                std::to_string(i) + ", value " + check::Show(value));
          CHECK_EQ(out[i], expected);
        }
      }
    }
  }
}

// ---- scale_and_dot ----

float ReferenceDot(DType dtype, const void* row, const void* other, int64_t hidden) {
  float lanes[kDotLanes] = {};
  for (int64_t i = 0; i < hidden; ++i) {
    const float product = FloatAt(dtype, row, i) * FloatAt(dtype, other, i);
    lanes[i % kDotLanes] = lanes[i % kDotLanes] + product;
  }
  for (int width = kDotLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
  }
  return lanes[0];
}

TEST(ScaleAndDotMatchesScalarFloat32) {
  Random random(31);
  for (const DType dtype : kFloatDTypes) {
    for (const int64_t hidden : OddSizes(random)) {
      for (const bool any_bits : {false, true}) {
        const GuardedBytes row = RandomRow(random, dtype, hidden, any_bits);
        const GuardedBytes other = RandomRow(random, dtype, hidden, any_bits);
        const float weight = RandomFloats(random, 1)[0];
        std::vector<uint32_t> scaled(hidden);
        double sum = 0;
        double magnitude = 0;
        for (int64_t i = 0; i < hidden; ++i) {
          const float product = weight * FloatAt(dtype, row.data(), i);
          scaled[i] = FormatOf(dtype).Encode(product);
          const double term = ValueAt(dtype, row.data(), i) * ValueAt(dtype, other.data(), i);
          sum += term;
          magnitude += std::fabs(term);
        }
        const float expected = ReferenceDot(dtype, row.data(), other.data(), hidden);
        for (const RowKernels* kernels : Variants()) {
          const Context context(std::string(kernels->isa) + ", " + NameOf(dtype) + ", " +
                                Labelled("hidden", hidden) + (any_bits ? ", any bits" : ""));
          GuardedBytes out(hidden * static_cast<int64_t>(SizeOf(dtype)));
          const float dot =
              kernels->scale_and_dot(dtype, out.data(), row.data(), weight, other.data(), hidden);
          CheckRow(dtype, out.data(), scaled);
          CHECK(out.GuardsIntact());
          if (!SameNumber(DType::kF32, BitsOfFloat(dot), BitsOfFloat(expected)))
            CHECK_EQ(dot, expected);
          if (!any_bits) CHECK_NEAR(dot, sum, hidden * std::ldexp(magnitude, -23));
        }
      }
    }
  }
}

// Times one, every 16-bit pattern comes back as it was: loads and stores are exact, subnormals
// included.
TEST(EveryBitPatternSurvivesLoadAndStore) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    std::vector<uint16_t> row(65536);
    for (int i = 0; i < 65536; ++i) row[i] = static_cast<uint16_t>(i);
    const std::vector<uint32_t> expected(row.begin(), row.end());
    for (const RowKernels* kernels : Variants()) {
      const Context context(std::string(kernels->isa) + ", " + NameOf(dtype));
      GuardedBytes out(65536 * 2);
      kernels->scale_and_dot(dtype, out.data(), row.data(), 1.0f, row.data(), 65536);
      CheckRow(dtype, out.data(), expected);
    }
  }
}

// ---- FP8 ----

// One block by the definition in row_kernels.h.
void ReferenceQuantize(DType dtype, const void* row, int64_t begin, uint32_t* q, float* scale) {
  float largest = 0;
  bool special = false;
  for (int64_t i = begin; i < begin + kQuantBlock; ++i) {
    const float value = FloatAt(dtype, row, i);
    if (!std::isfinite(value)) special = true;
    if (std::fabs(value) > largest) largest = std::fabs(value);
  }
  *scale = (largest > 1e-30f ? largest : 1e-30f) * (1.0f / 448.0f);
  const float inverse = 1.0f / *scale;
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    const float scaled = FloatAt(dtype, row, begin + i) * inverse;
    // What the codes of a block with an infinity or a NaN are does not matter: see CheckQuantize.
    q[i] = special ? 0 : kE4M3.Encode(scaled);
  }
}

bool BlockIsFinite(DType dtype, const void* row, int64_t begin) {
  for (int64_t i = begin; i < begin + kQuantBlock; ++i) {
    if (!std::isfinite(ValueAt(dtype, row, i))) return false;
  }
  return true;
}

void CheckQuantize(DType dtype, const void* row, int64_t hidden) {
  for (const RowKernels* kernels : Variants()) {
    const Context context(std::string(kernels->isa) + ", " + NameOf(dtype) + ", " +
                          Labelled("hidden", hidden));
    GuardedBytes q(hidden);
    GuardedBytes scales(hidden / kQuantBlock * 4);
    kernels->quantize(dtype, q.as<uint8_t>(), scales.as<float>(), row, hidden);
    CHECK(q.GuardsIntact());
    CHECK(scales.GuardsIntact());
    GuardedBytes back(hidden * 4);
    kernels->dequantize(DType::kF32, back.data(), q.as<uint8_t>(), scales.as<float>(), hidden);
    for (int64_t begin = 0; begin < hidden; begin += kQuantBlock) {
      uint32_t codes[kQuantBlock];
      float scale;
      ReferenceQuantize(dtype, row, begin, codes, &scale);
      const float got_scale = scales.as<float>()[begin / kQuantBlock];
      const bool finite = BlockIsFinite(dtype, row, begin);
      if (finite) CHECK_EQ(BitsOfFloat(got_scale), BitsOfFloat(scale));
      for (int64_t i = 0; i < kQuantBlock; ++i) {
        const uint32_t code = q.as<uint8_t>()[begin + i];
        const double value = ValueAt(dtype, row, begin + i);
        const float returned = back.as<float>()[begin + i];
        const Context element(Labelled("element", begin + i) + ", value " + check::Show(value));
        if (!finite) {
          CHECK(std::isnan(returned));
          continue;
        }
        CHECK_EQ(code, codes[i]);
        // Half a unit of four significant bits, or of the subnormals, and float32's rounding.
        const double bound = std::max(std::fabs(value) / 16, scale / 1024.0) * (1 + 1e-6) + 1e-38;
        CHECK_NEAR(returned, value, bound);
      }
    }
  }
}

TEST(QuantizeEveryBF16Pattern) {
  // Neighbours share a block; then each pattern meets values of every magnitude.
  std::vector<uint16_t> patterns(65536);
  for (int i = 0; i < 65536; ++i) patterns[i] = static_cast<uint16_t>(i);
  CheckQuantize(DType::kBF16, patterns.data(), 65536);
  Random random(41);
  // Finite ones only, so that every block is checked code by code.
  std::vector<uint16_t> finite;
  for (int i = 0; i < 65536; ++i) {
    if ((i & 0x7f80) != 0x7f80) finite.push_back(static_cast<uint16_t>(i));
  }
  std::shuffle(finite.begin(), finite.end(), random);
  const auto whole_blocks = static_cast<int64_t>(finite.size()) / kQuantBlock * kQuantBlock;
  CHECK_EQ(whole_blocks, static_cast<int64_t>(finite.size()));
  CheckQuantize(DType::kBF16, finite.data(), whole_blocks);
}

TEST(QuantizeRandomBlocks) {
  Random random(42);
  for (const DType dtype : kFloatDTypes) {
    for (const int64_t hidden : {0, 128, 256, 384, 7168}) {
      for (const bool any_bits : {false, true}) {
        for (int repeat = 0; repeat < 5; ++repeat) {
          CheckQuantize(dtype, RandomRow(random, dtype, hidden, any_bits).data(), hidden);
        }
      }
    }
    // Subnormals alone, zeros alone, and the largest values there are.
    GuardedBytes row(384 * static_cast<int64_t>(SizeOf(dtype)));
    const NumberFormat format = FormatOf(dtype);
    for (int i = 0; i < 128; ++i) {
      SetBitsAt(dtype, row.data(), i,
                static_cast<uint32_t>(Uniform(random, 0, format.mantissa_mask())));
      SetBitsAt(dtype, row.data(), 128 + i, i % 2 ? 0 : format.sign_bit());
      SetBitsAt(dtype, row.data(), 256 + i, format.infinity() - 1 - i);
    }
    CheckQuantize(dtype, row.data(), 384);
  }
}

TEST(QuantizeRoundsTiesToEven) {
  // Beside 448 the scale is exactly 1, so that values reach the rounding as they are.
  struct Expected {
    float value;
    int code;
  };
  const Expected expected[] = {
      {448, 0x7e},        {-448, 0xfe},     {1, 0x38},          {1.0625f, 0x38},
      {1.1875f, 0x3a},    {-1.0625f, 0xb8}, {1.125f, 0x39},     {1.06251f, 0x39},
      {432, 0x7e},        {431.9f, 0x7d},   {464 - 16, 0x7e},   {0, 0},
      {0.0009765625f, 0}, {0.0009766f, 1},  {0.001953125f, 1},  {0.0029296875f, 2},
      {0.013671875f, 7},  {0.015625f, 8},   {0.0146484375f, 8}, {0.01464f, 7},
  };
  float row[kQuantBlock] = {};
  row[kQuantBlock - 1] = 448;
  int count = 0;
  for (const Expected& e : expected) row[count++] = e.value;
  for (const RowKernels* kernels : Variants()) {
    uint8_t q[kQuantBlock];
    float scale;
    kernels->quantize(DType::kF32, q, &scale, row, kQuantBlock);
    CHECK_EQ(scale, 1.0f);
    for (int i = 0; i < count; ++i) {
      const Context context(std::string(kernels->isa) + ", value " +
                            check::Show(expected[i].value));
      CHECK_EQ(static_cast<int>(q[i]), expected[i].code);
    }
  }
  // All ties, and the float32 values next to them.
  std::vector<float> values;
  for (uint32_t code = 0; code < 0x7e; ++code) {
    const auto middle = static_cast<float>((kE4M3.Decode(code) + kE4M3.Decode(code + 1)) / 2);
    for (const float value : {middle, std::nextafterf(middle, 0), std::nextafterf(middle, 1000)}) {
      values.push_back(value);
      values.push_back(-value);
    }
  }
  while (values.size() % (kQuantBlock - 1) != 0) values.push_back(0);
  std::vector<float> blocks;
  for (size_t i = 0; i < values.size(); ++i) {
    if (i % (kQuantBlock - 1) == 0) blocks.push_back(448);
    blocks.push_back(values[i]);
  }
  CheckQuantize(DType::kF32, blocks.data(), static_cast<int64_t>(blocks.size()));
}

TEST(InfinityAndNanSpoilTheirBlockAlone) {
  Random random(43);
  for (const DType dtype : kFloatDTypes) {
    const NumberFormat format = FormatOf(dtype);
    const uint32_t specials[] = {format.infinity(), format.infinity() | format.sign_bit(),
                                 format.nan(), format.nan() | format.sign_bit(),
                                 format.infinity() | 1};
    for (const uint32_t special : specials) {
      GuardedBytes row = RandomRow(random, dtype, 384, false);
      SetBitsAt(dtype, row.data(), 128 + Uniform(random, 0, 127), special);
      CheckQuantize(dtype, row.data(), 384);
    }
    GuardedBytes row = RandomRow(random, dtype, 128, false);
    SetBitsAt(dtype, row.data(), 3, format.infinity());
    SetBitsAt(dtype, row.data(), 90, format.nan());
    CheckQuantize(dtype, row.data(), 128);
  }
}

TEST(DequantizeEveryCode) {
  Random random(44);
  uint8_t q[256];
  for (int i = 0; i < 256; ++i) q[i] = static_cast<uint8_t>(i);
  for (const DType dtype : kFloatDTypes) {
    std::vector<float> scales = {1.0f,   0.0f,  1e-38f,    1e-6f,
                                 147.0f, 1e36f, HUGE_VALF, std::nanf("")};
    for (const float scale : RandomFloats(random, 50)) scales.push_back(std::fabs(scale));
    for (const float scale : scales) {
      const float both[] = {scale, scale * 0.75f};
      std::vector<uint32_t> expected(256);
      for (int i = 0; i < 256; ++i) {
        const float value =
            static_cast<float>(kE4M3.Decode(static_cast<uint32_t>(i))) * both[i / kQuantBlock];
        expected[i] = FormatOf(dtype).Encode(value);
      }
      for (const RowKernels* kernels : Variants()) {
        const Context context(std::string(kernels->isa) + ", " + NameOf(dtype) + ", scale " +
                              check::Show(scale));
        GuardedBytes out(256 * static_cast<int64_t>(SizeOf(dtype)));
        kernels->dequantize(dtype, out.data(), q, both, 256);
        CheckRow(dtype, out.data(), expected);
        CHECK(out.GuardsIntact());
      }
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
