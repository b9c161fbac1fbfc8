// The row formats by their definition, in double precision and without bit tricks: what the tests
// compare the kernels with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "csrc/core/dtype.h"

namespace wideep {
namespace testing {

/// A binary float of `1 + exponent_bits + mantissa_bits` bits.
struct NumberFormat {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // otherwise the largest exponent is ordinary, and only its all-ones mantissa
                      // is NaN

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int max_exponent_field() const { return (1 << exponent_bits) - 1; }
  uint32_t mantissa_mask() const { return (1u << mantissa_bits) - 1; }
  uint32_t sign_bit() const { return 1u << (exponent_bits + mantissa_bits); }
  uint32_t infinity() const { return static_cast<uint32_t>(max_exponent_field()) << mantissa_bits; }
  uint32_t nan() const {
    return has_infinity ? infinity() | (1u << (mantissa_bits - 1)) : infinity() | mantissa_mask();
  }
  double max_finite() const {
    const uint32_t bits = has_infinity ? infinity() - 1 : nan() - 1;
    return Decode(bits);
  }

  double Decode(uint32_t bits) const {
    const double sign = bits & sign_bit() ? -1.0 : 1.0;
    const int field = static_cast<int>((bits >> mantissa_bits) & max_exponent_field());
    const uint32_t mantissa = bits & mantissa_mask();
    if (field == max_exponent_field()) {
      if (has_infinity) return mantissa == 0 ? sign * HUGE_VAL : std::nan("");
      if (mantissa == mantissa_mask()) return std::nan("");
    }
    if (field == 0) return sign * std::ldexp(mantissa, 1 - bias() - mantissa_bits);
    return sign * std::ldexp(mantissa + (1u << mantissa_bits), field - bias() - mantissa_bits);
  }

  /// Rounds to nearest, ties to even; past the largest finite value, to infinity or, if there is
  /// none, NaN.
  uint32_t Encode(double value) const {
    if (std::isnan(value)) return nan();
    const uint32_t sign = std::signbit(value) ? sign_bit() : 0;
    const double magnitude = std::fabs(value);
    const uint32_t overflow = has_infinity ? infinity() : nan();
    if (std::isinf(magnitude)) return sign | overflow;
    if (magnitude == 0) return sign;
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = exponent - 1 < 1 - bias() ? 1 - bias() : exponent - 1;
    // The default rounding mode is to nearest even, and scaling by a power of two is exact.
    const double units = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
    if (std::ldexp(units, exponent - mantissa_bits) > max_finite()) return sign | overflow;
    const double implicit = std::ldexp(1.0, mantissa_bits);
    if (units < implicit) return sign | static_cast<uint32_t>(units);  // subnormal
    const uint32_t field = static_cast<uint32_t>(exponent + bias());
    return sign | ((field << mantissa_bits) + static_cast<uint32_t>(units - implicit));
  }
};

inline NumberFormat FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {8, 23, true};
    case DType::kBF16:
      return {8, 7, true};
    case DType::kF16:
      return {5, 10, true};
    case DType::kF8E4M3:
      break;
  }
  return {4, 3, false};
}

inline const char* NameOf(DType dtype) {
  return dtype == DType::kF32    ? "f32"
         : dtype == DType::kBF16 ? "bf16"
         : dtype == DType::kF16  ? "f16"
                                 : "f8e4m3";
}

/// The dtypes that arithmetic is done in.
constexpr DType kFloatDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr DType kAllDTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3};

/// Element `index` of a row.
inline uint32_t BitsAt(DType dtype, const void* row, int64_t index) {
  const size_t bytes = SizeOf(dtype);
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(row) + index * static_cast<int64_t>(bytes), bytes);
  return bits;
}

inline void SetBitsAt(DType dtype, void* row, int64_t index, uint32_t bits) {
  const size_t bytes = SizeOf(dtype);
  std::memcpy(static_cast<char*>(row) + index * static_cast<int64_t>(bytes), &bits, bytes);
}

inline double ValueAt(DType dtype, const void* row, int64_t index) {
  return FormatOf(dtype).Decode(BitsAt(dtype, row, index));
}

inline void SetValueAt(DType dtype, void* row, int64_t index, double value) {
  SetBitsAt(dtype, row, index, FormatOf(dtype).Encode(value));
}

/// Every format fits into float32.
inline float FloatAt(DType dtype, const void* row, int64_t index) {
  return static_cast<float>(ValueAt(dtype, row, index));
}

/// Equal bits, or both NaN: which NaN an operation gives is the processor's choice.
inline bool SameNumber(DType dtype, uint32_t a, uint32_t b) {
  return a == b || (std::isnan(FormatOf(dtype).Decode(a)) && std::isnan(FormatOf(dtype).Decode(b)));
}

/// Bytes with guards on both sides and a known filling, so that a test sees every byte that was
/// written. The data starts at `offset` bytes past a multiple of 64.
class GuardedBytes {
 public:
  static constexpr unsigned char kFill = 0xa5;

  explicit GuardedBytes(int64_t num_bytes = 0, int offset = 0)
      : num_bytes_(num_bytes), bytes_(num_bytes + offset + 64 + 2 * kGuard, kFill) {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data()) + kGuard;
    begin_ = kGuard + static_cast<int64_t>((64 - address % 64) % 64) + offset;
  }
  GuardedBytes(GuardedBytes&&) = default;
  GuardedBytes& operator=(GuardedBytes&&) = default;
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  char* data() { return reinterpret_cast<char*>(bytes_.data() + begin_); }
  const char* data() const { return reinterpret_cast<const char*>(bytes_.data() + begin_); }
  int64_t num_bytes() const { return num_bytes_; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data());
  }

  bool GuardsIntact() const {
    for (int64_t i = 0; i < static_cast<int64_t>(bytes_.size()); ++i) {
      if ((i < begin_ || i >= begin_ + num_bytes_) && bytes_[i] != kFill) return false;
    }
    return true;
  }
  bool Untouched(int64_t begin, int64_t end) const { return AllBytes(begin, end, kFill); }
  bool AllZero(int64_t begin, int64_t end) const { return AllBytes(begin, end, 0); }

 private:
  static constexpr int64_t kGuard = 64;
  bool AllBytes(int64_t begin, int64_t end, unsigned char value) const {
    for (int64_t i = begin; i < end; ++i) {
      if (bytes_[begin_ + i] != value) return false;
    }
    return true;
  }

  int64_t num_bytes_;
  int64_t begin_;
  std::vector<unsigned char> bytes_;
};

using Random = std::mt19937_64;

/// Uniform in [low, high].
inline int64_t Uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

/// Fills `count` elements with ordinary values, some of them zeros, subnormals and negative zeros.
inline void FillValues(Random& random, DType dtype, void* row, int64_t count) {
  const NumberFormat format = FormatOf(dtype);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kind = Uniform(random, 0, 31);
    if (kind == 0) {
      SetBitsAt(dtype, row, i, Uniform(random, 0, 1) ? format.sign_bit() : 0);
    } else if (kind == 1) {
      SetBitsAt(dtype, row, i, static_cast<uint32_t>(Uniform(random, 1, format.mantissa_mask())));
    } else {
      SetValueAt(dtype, row, i, normal(random));
    }
  }
}

inline std::vector<float> RandomFloats(Random& random, int64_t count) {
  std::vector<float> values(count);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  return values;
}

/// How a test chooses experts.
enum class Routing { kUniform, kOneHotExpert, kOneHotRank, kMasked, kAllMasked, kDuplicates };
constexpr Routing kAllRoutings[] = {Routing::kUniform,    Routing::kOneHotExpert,
                                    Routing::kOneHotRank, Routing::kMasked,
                                    Routing::kAllMasked,  Routing::kDuplicates};

inline const char* NameOf(Routing routing) {
  switch (routing) {
    case Routing::kUniform:
      return "uniform";
    case Routing::kOneHotExpert:
      return "one hot expert";
    case Routing::kOneHotRank:
      return "one hot rank";
    case Routing::kMasked:
      return "masked";
    case Routing::kAllMasked:
      return "all masked";
    case Routing::kDuplicates:
      break;
  }
  return "duplicates";
}

/// [num_tokens, top_k] of one rank.
inline std::vector<int32_t> ChooseExperts(Random& random, Routing routing, int64_t num_tokens,
                                          int top_k, int num_experts, int num_ranks) {
  std::vector<int32_t> topk_idx(num_tokens * top_k);
  const int local_experts = num_experts / num_ranks;
  for (int64_t s = 0; s < num_tokens * top_k; ++s) {
    int64_t expert = Uniform(random, 0, num_experts - 1);
    if (routing == Routing::kOneHotExpert && Uniform(random, 0, 7) != 0) expert = num_experts / 2;
    if (routing == Routing::kOneHotRank) expert = expert % local_experts;
    if (routing == Routing::kMasked && Uniform(random, 0, 2) == 0) expert = -1;
    if (routing == Routing::kAllMasked) expert = -1;
    if (routing == Routing::kDuplicates && s % top_k > 0) expert = topk_idx[s / top_k * top_k];
    topk_idx[s] = static_cast<int32_t>(expert);
  }
  return topk_idx;
}

/// Masks every selection of an expert that the token has already chosen.
inline void MaskDuplicates(std::vector<int32_t>& topk_idx, int top_k) {
  for (size_t s = 0; s < topk_idx.size(); ++s) {
    for (size_t earlier = s / top_k * top_k; earlier < s; ++earlier) {
      if (topk_idx[earlier] == topk_idx[s]) topk_idx[s] = -1;
    }
  }
}

inline std::string Labelled(const char* name, int64_t value) {
  return std::string(name) + " " + std::to_string(value);
}

}  // namespace testing
}  // namespace wideep
