// QuantizeKernel: rows to FP8, and the conversion of single blocks, which the low-latency kernels
// use too.
//
// A block of 128 values lies in the registers of 16 lanes (of 32 for float32), 16 bytes each. A
// thread converts several blocks' pieces, read before the first is used.
#pragma once

#include <cstdint>

#include "csrc/core/convert.cuh"
#include "csrc/core/launch.cuh"
#include "csrc/core/ptx.h"
#include "csrc/ep/quantize.h"

namespace wideep {

/// Lanes that hold a block of 128 values.
template <DType kDType>
constexpr int kLanesPerBlock = static_cast<int>(kQuantBlock) / kVectorElems<kDType>;

/// This lane's values as FP8, four in a word, and the scale of their block. All lanes of the warp.
template <DType kDType>
struct QuantizedPiece {
  uint32_t words[kVectorElems<kDType> / 4];
  float scale;

  __device__ __forceinline__ explicit QuantizedPiece(int4 bits) {
    constexpr int kElems = kVectorElems<kDType>;
    float values[kElems];
    Unpack<kDType>(bits, values);
    // Magnitudes ordered as integers, so that NaN counts as largest.
    uint32_t largest = __float_as_uint(1e-30f);
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
#pragma unroll
    for (int step = kLanesPerBlock<kDType> / 2; step > 0; step /= 2) {
      const uint32_t other = __shfl_xor_sync(~0u, largest, step);
      largest = other > largest ? other : largest;
    }
    scale = __fmul_rn(__uint_as_float(largest), 1.0f / 448.0f);
    const float inverse = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < kElems; ++i) values[i] = __fmul_rn(values[i], inverse);
#pragma unroll
    for (int i = 0; i < kElems / 4; ++i) {
      words[i] = PackFp8(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
  }

  /// Stores the values at `to`, the place of this lane's first one.
  __device__ __forceinline__ void Store(char* to) const {
    if constexpr (kVectorElems<kDType> == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
  }
};

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizePieces = 4;  // of 16 bytes, for each thread

template <DType kDType>
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeKernel(const __grid_constant__ QuantizeParams p) {
  constexpr int kLanes = kLanesPerBlock<kDType>;
  constexpr int kElems = kVectorElems<kDType>;
  const int64_t num_pieces = p.num_tokens * p.hidden / kElems;
  const auto blocks_per_token = static_cast<uint32_t>(p.hidden / kQuantBlock);
  const int64_t first = int64_t{blockIdx.x} * (kQuantizeThreads * kQuantizePieces) + threadIdx.x;
  int4 bits[kQuantizePieces];
#pragma unroll
  for (int i = 0; i < kQuantizePieces; ++i) {
    const int64_t piece = first + i * kQuantizeThreads;
    bits[i] = make_int4(0, 0, 0, 0);
    if (piece < num_pieces) {
      bits[i] = ptx::ld_global_no_allocate_v4(static_cast<const char*>(p.x) + piece * 16);
    }
  }
#pragma unroll
  for (int i = 0; i < kQuantizePieces; ++i) {
    const QuantizedPiece<kDType> quantized(bits[i]);
    const int64_t piece = first + i * kQuantizeThreads;
    if (piece >= num_pieces) continue;
    const auto block = static_cast<uint32_t>(piece / kLanes);
    const auto lane = static_cast<int>(piece % kLanes);
    const uint32_t token = block / blocks_per_token;
    const uint32_t block_of_token = block % blocks_per_token;
    quantized.Store(static_cast<char*>(p.q) + token * p.q_stride_bytes +
                    block_of_token * kQuantBlock + lane * kElems);
    auto* scales =
        reinterpret_cast<float*>(static_cast<char*>(p.scales) + token * p.scale_stride_bytes);
    if (lane == 0) scales[block_of_token] = quantized.scale;
    if (block_of_token == blocks_per_token - 1) {
      for (int64_t j = lane; j < p.pad_bytes / 4; j += kLanes) scales[blocks_per_token + j] = 0;
    }
  }
}

}  // namespace wideep
