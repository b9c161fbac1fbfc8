// Rows in registers: 16 bytes at a time, as float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "csrc/core/dtype.h"

namespace wideep {

/// Elements of type kDType in 16 bytes.
template <DType kDType>
constexpr int kVectorElems = 16 / static_cast<int>(SizeOf(kDType));

template <DType kDType>
__device__ __forceinline__ void Unpack(int4 bits, float (&values)[kVectorElems<kDType>]) {
  const uint32_t words[4] = {static_cast<uint32_t>(bits.x), static_cast<uint32_t>(bits.y),
                             static_cast<uint32_t>(bits.z), static_cast<uint32_t>(bits.w)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDType == DType::kF32) {
      values[i] = __uint_as_float(words[i]);
    } else if constexpr (kDType == DType::kBF16) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const __half2_raw pair{static_cast<unsigned short>(words[i]),
                             static_cast<unsigned short>(words[i] >> 16)};
      const float2 both = __half22float2(__half2(pair));
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  }
}

/// Rounds to nearest even.
template <DType kDType>
__device__ __forceinline__ int4 Pack(const float (&values)[kVectorElems<kDType>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDType == DType::kF32) {
      words[i] = __float_as_uint(values[i]);
    } else if constexpr (kDType == DType::kBF16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  return make_int4(words[0], words[1], words[2], words[3]);
}

/// Four float8_e4m3fn values in one word, each rounded to nearest even; beyond the range: NaN or
/// the largest, as the format's saturating conversion has it.
__device__ __forceinline__ uint32_t PackFp8(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

/// Four float8_e4m3fn values of one word; exact.
__device__ __forceinline__ void UnpackFp8(uint32_t word, float* values) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> 16 * i);
    const float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    values[2 * i] = both.x;
    values[2 * i + 1] = both.y;
  }
}

}  // namespace wideep
