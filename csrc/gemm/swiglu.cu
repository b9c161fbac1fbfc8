// A block takes a row at a time; its threads take 16 bytes of gate and up each. Bound by memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "csrc/core/ptx.h"
#include "csrc/gemm/swiglu.h"

namespace wideep {
namespace {

constexpr int kThreads = 128;
/// Enough to fill every multiprocessor of the largest Hopper, 132 of 2048 threads.
constexpr int64_t kMaxBlocks = 132 * (2048 / kThreads);
/// Elements of 16 bytes.
constexpr int kPiece = 8;

// ---- which rows ----

/// First row after the last group; groups lie one after the other. Called by a whole block.
__device__ inline int64_t RowsEnd(const RowGroups& groups) {
  __shared__ int64_t warp_rows[kThreads / 32];
  int64_t rows = 0;
  for (int64_t i = threadIdx.x; i < groups.num_groups; i += kThreads)
    rows += max(groups.group_sizes[i], 0);
  for (int step = 16; step > 0; step /= 2) rows += __shfl_xor_sync(~0u, rows, step);
  if (threadIdx.x % 32 == 0) warp_rows[threadIdx.x / 32] = rows;
  __syncthreads();
  rows = 0;
  for (const int64_t one : warp_rows) rows += one;
  return min(rows, groups.num_rows);
}

/// Calls body(row) for this block's share of the rows of groups.
template <typename Body>
__device__ __forceinline__ void ForRows(const RowGroups& groups, const Body& body) {
  if (groups.slab_rows == 0) {
    const int64_t end = RowsEnd(groups);
    for (int64_t row = blockIdx.x; row < end; row += gridDim.x) body(row);
    return;
  }
  for (int64_t row = blockIdx.x; row < groups.num_rows; row += gridDim.x) {
    const int64_t group = row / groups.slab_rows;
    if (row - group * groups.slab_rows < groups.group_sizes[group]) body(row);
  }
}

// ---- 8 elements ----

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ void Load(const T* from, float (&values)[kPiece]) {
  const int4 bits = ptx::ld_global_no_allocate_v4(from);
  PairOf<T> pairs[kPiece / 2];
  memcpy(pairs, &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < kPiece / 2; ++i) {
    float2 pair;
    if constexpr (std::is_same_v<T, __half>) {
      pair = __half22float2(pairs[i]);
    } else {
      pair = __bfloat1622float2(pairs[i]);
    }
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ void Store(T* to, const float (&values)[kPiece]) {
  PairOf<T> pairs[kPiece / 2];
#pragma unroll
  for (int i = 0; i < kPiece / 2; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    } else {
      pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    }
  }
  int4 bits;
  memcpy(&bits, pairs, sizeof bits);
  ptx::st_global_v4(to, bits);
}

__device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// ---- kernels ----

template <typename T>
__global__ void __launch_bounds__(kThreads) SwigluKernel(const __grid_constant__ SwigluParams p) {
  ForRows(p.groups, [&](int64_t row) {
    const T* const gates = static_cast<const T*>(p.hidden) + row * 2 * p.ffn;
    T* const outs = static_cast<T*>(p.out) + row * p.ffn;
    for (int64_t at = threadIdx.x * kPiece; at < p.ffn; at += kThreads * kPiece) {
      float gate[kPiece], up[kPiece], out[kPiece];
      Load(gates + at, gate);
      Load(gates + p.ffn + at, up);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) out[i] = gate[i] * Sigmoid(gate[i]) * up[i];
      Store(outs + at, out);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    SwigluGradKernel(const __grid_constant__ SwigluGradParams p) {
  ForRows(p.groups, [&](int64_t row) {
    const T* const gates = static_cast<const T*>(p.hidden) + row * 2 * p.ffn;
    const T* const douts = static_cast<const T*>(p.dout) + row * p.ffn;
    T* const dgates = static_cast<T*>(p.dhidden) + row * 2 * p.ffn;
    for (int64_t at = threadIdx.x * kPiece; at < p.ffn; at += kThreads * kPiece) {
      float gate[kPiece], up[kPiece], dout[kPiece];
      Load(gates + at, gate);
      Load(gates + p.ffn + at, up);
      Load(douts + at, dout);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const float sigmoid = Sigmoid(gate[i]);
        const float silu = gate[i] * sigmoid;
        // d silu(g) / dg = s + g * s * (1 - s)
        gate[i] = dout[i] * up[i] * (sigmoid + silu * (1.0f - sigmoid));
        up[i] = dout[i] * silu;
      }
      Store(dgates + at, gate);
      Store(dgates + p.ffn + at, up);
    }
  });
}

// ---- launchers ----

/// Launches the kernel of the type, unless there is nothing to do.
template <typename Params>
Status LaunchOf(const char* op, const Params& params, void (*bf16_kernel)(Params),
                void (*f16_kernel)(Params), cudaStream_t stream) {
  if (params.dtype != DType::kBF16 && params.dtype != DType::kF16) {
    return Status::InvalidArgument(std::string(op) + ": rows must be bfloat16 or float16");
  }
  if (params.ffn < 0 || params.ffn % kPiece != 0) {
    return Status::InvalidArgument(std::string(op) + ": ffn must be a multiple of 8, got " +
                                   std::to_string(params.ffn));
  }
  const RowGroups& groups = params.groups;
  if (groups.num_rows == 0 || groups.num_groups == 0 || params.ffn == 0) return Status();
  const auto kernel = params.dtype == DType::kBF16 ? bf16_kernel : f16_kernel;
  kernel<<<static_cast<unsigned>(std::min(groups.num_rows, kMaxBlocks)), kThreads, 0, stream>>>(
      params);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string(op) + ": launch: " + cudaGetErrorString(error));
}

}  // namespace

Status LaunchSwiglu(const SwigluParams& params, cudaStream_t stream) {
  return LaunchOf("swiglu", params, SwigluKernel<__nv_bfloat16>, SwigluKernel<__half>, stream);
}

Status LaunchSwigluGrad(const SwigluGradParams& params, cudaStream_t stream) {
  return LaunchOf("swiglu_grad", params, SwigluGradKernel<__nv_bfloat16>, SwigluGradKernel<__half>,
                  stream);
}

}  // namespace wideep
