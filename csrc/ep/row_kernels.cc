// One variant of the row kernels; built several times with WIDEEP_ISA and the compiler's -march
// set. Plain loops over fixed-size blocks, written so that the compiler vectorises them.
#include "csrc/ep/row_kernels.h"

#include <cmath>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define WIDEEP_STRINGIFY_(x) #x
#define WIDEEP_STRINGIFY(x) WIDEEP_STRINGIFY_(x)
#define WIDEEP_CONCAT_(a, b) a##b
#define WIDEEP_CONCAT(a, b) WIDEEP_CONCAT_(a, b)

namespace wideep {
namespace {

constexpr int kBlock = 64;  // elements per block of accumulators
constexpr int kPrefetchElements = 4 * kBlock;

float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct F32 {
  using Storage = float;
  static float Load(float v) { return v; }
  static float Store(float v) { return v; }
};

struct BF16 {
  using Storage = uint16_t;
  static float Load(uint16_t v) { return BitsToFloat(static_cast<uint32_t>(v) << 16); }
  static uint16_t Store(float v) {
    const uint32_t bits = FloatToBits(v);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t quiet_nan = bits | 0x400000u;
    return static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded) >> 16);
  }
};

struct F16 {
  using Storage = uint16_t;
  static float Load(uint16_t v) {
    // Exponent and mantissa move to float32's places; the product corrects the bias, subnormals
    // included.
    const uint32_t magnitude = static_cast<uint32_t>(v & 0x7fffu) << 13;
    const float scaled = BitsToFloat(magnitude) * 0x1p112f;
    const uint32_t special = magnitude >= (31u << 23) ? 0x7f800000u : 0u;
    return BitsToFloat((static_cast<uint32_t>(v & 0x8000u) << 16) | FloatToBits(scaled) | special);
  }
  static uint16_t Store(float v) {
    const uint32_t bits = FloatToBits(v);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Subnormal result: adding 0.5 lines the value up so that the sum's low bits are the rounded
    // result.
    const uint32_t subnormal = FloatToBits(BitsToFloat(magnitude) + 0.5f) - FloatToBits(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) |
                                 (magnitude >= FloatToBits(65520.0f) ? special : finite));
  }
};

struct E4M3 {
  static float Load(uint8_t v) {
    const uint32_t magnitude = v & 0x7fu;
    const float value = BitsToFloat(magnitude << 20) * 0x1p120f;
    const uint32_t bits = magnitude == 0x7fu ? 0x7fc00000u : FloatToBits(value);
    return BitsToFloat((static_cast<uint32_t>(v & 0x80u) << 24) | bits);
  }
  static uint8_t Store(float v) {
    const uint32_t bits = FloatToBits(v);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Subnormal result (below 2^-6, unit 2^-9): float32's own rounding at 2^14 does it.
    const uint32_t subnormal = FloatToBits(BitsToFloat(magnitude) + 0x1p14f) - FloatToBits(0x1p14f);
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    const uint32_t finite = magnitude < (121u << 23) ? subnormal : normal;
    // Above 464 (half way past the largest value, 448) there is only NaN.
    const uint32_t code = magnitude > FloatToBits(464.0f) ? 0x7fu : finite;
    return static_cast<uint8_t>(((bits >> 24) & 0x80u) | code);
  }
};

// Calls `body` with the element type's traits.
template <typename Body>
void ForDType(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kF32:
      return body(F32{});
    case DType::kBF16:
      return body(BF16{});
    case DType::kF16:
      return body(F16{});
    case DType::kF8E4M3:
      return;  // only on the wire, through quantize and dequantize
  }
}

void Copy(void* dst, const void* src, size_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(dst) % 16 == 0 && bytes % 16 == 0) {
    char* out = static_cast<char*>(dst);
    const char* in = static_cast<const char*>(src);
    size_t done = 0;
#if defined(__AVX512F__)
    if (reinterpret_cast<uintptr_t>(dst) % 64 == 0) {
      for (; done + 64 <= bytes; done += 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + done), _mm512_loadu_si512(in + done));
      }
    }
#endif
    for (; done < bytes; done += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + done),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + done)));
    }
    return;
  }
#else
  (void)stream;
#endif
  std::memcpy(dst, src, bytes);
}

void FinishStreams() {
#if defined(__SSE2__)
  // Streaming stores are weakly ordered: order them before the completion that follows.
  _mm_sfence();
#endif
}

// Rows lie anywhere in memory and are short, so that the processor's own prefetcher comes too late.
template <typename T>
void PrefetchBlock(const typename T::Storage* block) {
  constexpr int kLine = 64 / sizeof(*block);
  for (int i = 0; i < kBlock; i += kLine) __builtin_prefetch(block + i);
}

template <typename T>
void WeightedSumOf(typename T::Storage* out, const void* const* rows, const float* weights,
                   int num_rows, int64_t hidden) {
  for (int64_t begin = 0; begin < hidden; begin += kBlock) {
    const int width = static_cast<int>(hidden - begin < kBlock ? hidden - begin : kBlock);
    float sums[kBlock] = {};
    for (int r = 0; r < num_rows; ++r) {
      const auto* row = static_cast<const typename T::Storage*>(rows[r]) + begin;
      const float weight = weights ? weights[r] : 1.0f;
      if (begin + kPrefetchElements < hidden) PrefetchBlock<T>(row + kPrefetchElements);
      if (width == kBlock) {
        for (int i = 0; i < kBlock; ++i) sums[i] += weight * T::Load(row[i]);
      } else {
        for (int i = 0; i < width; ++i) sums[i] += weight * T::Load(row[i]);
      }
    }
    if (width == kBlock) {
      for (int i = 0; i < kBlock; ++i) out[begin + i] = T::Store(sums[i]);
    } else {
      for (int i = 0; i < width; ++i) out[begin + i] = T::Store(sums[i]);
    }
  }
}

void WeightedSum(DType dtype, void* out, const void* const* rows, const float* weights,
                 int num_rows, int64_t hidden) {
  ForDType(dtype, [&](auto traits) {
    using T = decltype(traits);
    WeightedSumOf<T>(static_cast<typename T::Storage*>(out), rows, weights, num_rows, hidden);
  });
}

template <typename T>
float ScaleAndDotOf(typename T::Storage* out, const typename T::Storage* row, float weight,
                    const typename T::Storage* other, int64_t hidden) {
  float sums[kBlock] = {};
  int64_t begin = 0;
  for (; begin + kBlock <= hidden; begin += kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      const float value = T::Load(row[begin + i]);
      sums[i] += value * T::Load(other[begin + i]);
      out[begin + i] = T::Store(weight * value);
    }
  }
  for (int i = 0; begin + i < hidden; ++i) {
    const float value = T::Load(row[begin + i]);
    sums[i] += value * T::Load(other[begin + i]);
    out[begin + i] = T::Store(weight * value);
  }
  for (int half = kBlock / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

float ScaleAndDot(DType dtype, void* out, const void* row, float weight, const void* other,
                  int64_t hidden) {
  float dot = 0;
  ForDType(dtype, [&](auto traits) {
    using T = decltype(traits);
    using S = typename T::Storage;
    dot = ScaleAndDotOf<T>(static_cast<S*>(out), static_cast<const S*>(row), weight,
                           static_cast<const S*>(other), hidden);
  });
  return dot;
}

void Quantize(DType dtype, uint8_t* q, float* scales, const void* row, int64_t hidden) {
  ForDType(dtype, [&](auto traits) {
    using T = decltype(traits);
    const auto* values = static_cast<const typename T::Storage*>(row);
    for (int64_t begin = 0; begin < hidden; begin += kQuantBlock) {
      uint32_t largest = 0;  // |x| ordered as integers, so that NaN counts as largest
      float loaded[kQuantBlock];
      for (int i = 0; i < kQuantBlock; ++i) {
        loaded[i] = T::Load(values[begin + i]);
        const uint32_t magnitude = FloatToBits(loaded[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
      const uint32_t floor_bits = FloatToBits(1e-30f);
      const float scale =
          BitsToFloat(largest > floor_bits ? largest : floor_bits) * (1.0f / 448.0f);
      const float inverse = 1.0f / scale;
      for (int i = 0; i < kQuantBlock; ++i) q[begin + i] = E4M3::Store(loaded[i] * inverse);
      scales[begin / kQuantBlock] = scale;
    }
  });
}

void Dequantize(DType dtype, void* out, const uint8_t* q, const float* scales, int64_t hidden) {
  ForDType(dtype, [&](auto traits) {
    using T = decltype(traits);
    auto* values = static_cast<typename T::Storage*>(out);
    for (int64_t begin = 0; begin < hidden; begin += kQuantBlock) {
      const float scale = scales[begin / kQuantBlock];
      for (int i = 0; i < kQuantBlock; ++i) {
        values[begin + i] = T::Store(E4M3::Load(q[begin + i]) * scale);
      }
    }
  });
}

}  // namespace

extern const RowKernels WIDEEP_CONCAT(kRowKernels_, WIDEEP_ISA);
const RowKernels WIDEEP_CONCAT(kRowKernels_, WIDEEP_ISA) = {
    WIDEEP_STRINGIFY(WIDEEP_ISA),
    Copy,
    FinishStreams,
    WeightedSum,
    ScaleAndDot,
    Quantize,
    Dequantize,
};

}  // namespace wideep
