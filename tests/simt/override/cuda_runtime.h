// CUDA C++ as far as the exchange kernels use it, for the host compiler.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "tests/simt/kernel_api.h"

// What a kernel must not use (__shared__ arrays, __constant__) is not defined.
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned int x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- arithmetic ----

// As CUDA's overloads: a mixture of signedness is unsigned.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline int __popc(unsigned int v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(v)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline unsigned int __float_as_uint(float v) {
  unsigned int bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __uint_as_float(unsigned int bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned int>(bits)); }

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

// ---- barriers and warps ----

inline void __syncthreads(simt::Site site = simt::Site::Here()) { simt::SyncThreads(site); }
inline void __syncwarp(unsigned int mask = ~0u, simt::Site site = simt::Site::Here()) {
  simt::WarpMeet(simt::WarpOp::kSync, mask, 0, 0, 32, site);
}

namespace simt {
/// Narrow integers are shuffled as int.
template <typename T>
using Shuffled = std::conditional_t<std::is_integral_v<T> && sizeof(T) < 4, int, T>;

template <typename T>
T WarpMeetOf(WarpOp op, uint32_t mask, T value, uint32_t lane, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = WarpMeet(op, mask, bits, lane, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace simt

template <typename T>
simt::Shuffled<T> __shfl_sync(unsigned int mask, T value, int lane, int width = 32,
                              simt::Site site = simt::Site::Here()) {
  return simt::WarpMeetOf<simt::Shuffled<T>>(simt::WarpOp::kShuffle, mask, value, lane, width,
                                             site);
}
template <typename T>
simt::Shuffled<T> __shfl_up_sync(unsigned int mask, T value, unsigned int by, int width = 32,
                                 simt::Site site = simt::Site::Here()) {
  return simt::WarpMeetOf<simt::Shuffled<T>>(simt::WarpOp::kShuffleUp, mask, value, by, width,
                                             site);
}
template <typename T>
simt::Shuffled<T> __shfl_down_sync(unsigned int mask, T value, unsigned int by, int width = 32,
                                   simt::Site site = simt::Site::Here()) {
  return simt::WarpMeetOf<simt::Shuffled<T>>(simt::WarpOp::kShuffleDown, mask, value, by, width,
                                             site);
}
template <typename T>
simt::Shuffled<T> __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = 32,
                                  simt::Site site = simt::Site::Here()) {
  return simt::WarpMeetOf<simt::Shuffled<T>>(simt::WarpOp::kShuffleXor, mask, value, lane_mask,
                                             width, site);
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate,
                                  simt::Site site = simt::Site::Here()) {
  return static_cast<unsigned int>(
      simt::WarpMeet(simt::WarpOp::kBallot, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned int mask, int predicate, simt::Site site = simt::Site::Here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned int mask, int predicate, simt::Site site = simt::Site::Here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}
template <typename T>
unsigned int __match_any_sync(unsigned int mask, T value, simt::Site site = simt::Site::Here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "__match_any_sync takes 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned int>(simt::WarpMeet(simt::WarpOp::kMatch, mask, bits, 0, 32, site));
}

#define SIMT_REDUCE(name, type, op)                                                       \
  inline type name(unsigned int mask, type value, simt::Site site = simt::Site::Here()) { \
    return simt::WarpMeetOf(simt::WarpOp::op, mask, value, 0, 32, site);                  \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned int, kAddU32)
SIMT_REDUCE(__reduce_add_sync, int, kAddU32)
SIMT_REDUCE(__reduce_max_sync, unsigned int, kMaxU32)
SIMT_REDUCE(__reduce_max_sync, int, kMaxS32)
SIMT_REDUCE(__reduce_min_sync, unsigned int, kMinU32)
SIMT_REDUCE(__reduce_min_sync, int, kMinS32)
SIMT_REDUCE(__reduce_and_sync, unsigned int, kAnd)
SIMT_REDUCE(__reduce_or_sync, unsigned int, kOr)
#undef SIMT_REDUCE

// ---- atomics: relaxed, in the whole GPU ----

namespace simt {
template <typename T>
T Update(Rmw kind, T* pointer, T value, T expected, Site site) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "atomics here take integers of 4 or 8 bytes");
  return static_cast<T>(FlagUpdate(kind, pointer, sizeof(T), static_cast<uint64_t>(value),
                                   static_cast<std::make_unsigned_t<T>>(expected), Order::kRelaxed,
                                   Scope::kGpu, site));
}
}  // namespace simt

// The operand has the type of what it is added to.
#define SIMT_ATOMIC(name, kind)                                                           \
  template <typename T>                                                                   \
  T name(T* pointer, std::common_type_t<T> value, simt::Site site = simt::Site::Here()) { \
    return simt::Update<T>(kind, pointer, value, 0, site);                                \
  }
SIMT_ATOMIC(atomicAdd, simt::Rmw::kAdd)
SIMT_ATOMIC(atomicExch, simt::Rmw::kExchange)
SIMT_ATOMIC(atomicOr, simt::Rmw::kOr)
SIMT_ATOMIC(atomicAnd, simt::Rmw::kAnd)
SIMT_ATOMIC(atomicMax, std::is_signed_v<T> ? simt::Rmw::kMaxS : simt::Rmw::kMaxU)
SIMT_ATOMIC(atomicMin, std::is_signed_v<T> ? simt::Rmw::kMinS : simt::Rmw::kMinU)
#undef SIMT_ATOMIC
template <typename T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value,
            simt::Site site = simt::Site::Here()) {
  return simt::Update<T>(simt::Rmw::kCas, pointer, value, expected, site);
}
