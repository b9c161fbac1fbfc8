// float16 in pairs, as csrc/core/convert.cuh uses it.
#pragma once

#include "cuda_runtime.h"
#include "number_conversion.h"

struct __half_raw {
  unsigned short x;
};
struct __half2_raw {
  unsigned short x, y;
};
struct __half {
  unsigned short bits = 0;
  __half() = default;
  __half(const __half_raw& raw) : bits(raw.x) {}
};
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half low, __half high) : x(low), y(high) {}
  __half2(const __half2_raw& raw) : x(__half_raw{raw.x}), y(__half_raw{raw.y}) {}
};

inline float __half2float(__half v) { return simt::DecodeHalf(wideep::DType::kF16, v.bits); }
inline __half __float2half_rn(float v) {
  return __half(__half_raw{simt::EncodeHalf(wideep::DType::kF16, v)});
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
