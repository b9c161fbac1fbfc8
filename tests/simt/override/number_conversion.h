// Conversions as the hardware makes them: to nearest even, NaN to the one NaN that it gives.
#pragma once

#include "tests/cpp/number_formats.h"

namespace simt {

inline uint16_t EncodeHalf(wideep::DType dtype, float v) {
  if (v != v) return 0x7fff;
  return static_cast<uint16_t>(wideep::testing::FormatOf(dtype).Encode(v));
}
inline float DecodeHalf(wideep::DType dtype, uint16_t bits) {
  return static_cast<float>(wideep::testing::FormatOf(dtype).Decode(bits));
}
/// Beyond the largest value: that value.
inline uint8_t EncodeE4M3(float v) {
  const auto format = wideep::testing::FormatOf(wideep::DType::kF8E4M3);
  if (v != v) return 0x7f;
  const auto largest = static_cast<float>(format.max_finite());
  return static_cast<uint8_t>(format.Encode(v > largest ? largest : v < -largest ? -largest : v));
}
/// Exact.
inline uint16_t E4M3ToHalf(int bits) {
  return EncodeHalf(
      wideep::DType::kF16,
      static_cast<float>(wideep::testing::FormatOf(wideep::DType::kF8E4M3).Decode(bits)));
}

}  // namespace simt
