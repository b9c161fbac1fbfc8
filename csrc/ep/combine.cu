#include <algorithm>

#include "csrc/ep/combine.cuh"
#include "csrc/ep/load_kernels.h"

namespace wideep {
namespace {

/// Few tokens need few blocks: one token a warp, and at least two blocks for the rings' two ends.
int NumBlocks(int64_t num_tokens, const PeerContext& peers) {
  return static_cast<int>(std::clamp<int64_t>(num_tokens / kWarpsPerBlock + 1, 2, peers.num_sms));
}

/// Enough that sums and their way over the link overlap, and not so many that small calls wait for
/// flags.
int NumSumChunks(const CombineParams& p) {
  constexpr int kChunks = 8;
  constexpr int kTokensPerChunk = 128;
  static_assert(kChunks <= kMaxSumChunks);
  if (p.num_chunks > 0) return std::min(p.num_chunks, kMaxSumChunks);
  return static_cast<int>(std::clamp<int64_t>(p.num_tokens / kTokensPerChunk, 1, kChunks));
}

template <bool kWeighted>
Status LaunchSum(CombineParams p, const char* op, cudaStream_t stream) {
  if (Status status = CheckCombineShape(op, p.dtype, p.hidden, p.top_k); !status.ok()) {
    return status;
  }
  p.num_chunks = NumSumChunks(p);
  const auto kernel = p.dtype == DType::kBF16  ? CombineKernel<DType::kBF16, kWeighted>
                      : p.dtype == DType::kF16 ? CombineKernel<DType::kF16, kWeighted>
                                               : CombineKernel<DType::kF32, kWeighted>;
  return Launch(kernel, NumBlocks(p.num_tokens, p.peers), kCombineThreads, CombineShared::kNumBytes,
                stream, p, op);
}

}  // namespace

Status LaunchCombine(const CombineParams& p, cudaStream_t stream) {
  if (p.dweights != nullptr) return LaunchSum<false>(p, "dispatch's gradient", stream);
  return LaunchSum<true>(p, "combine", stream);
}

Status LaunchCombineGrad(const CombineGradParams& p, cudaStream_t stream) {
  constexpr char kOp[] = "combine's gradient";
  if (Status status = CheckCombineShape(kOp, p.dtype, p.hidden, p.top_k); !status.ok()) {
    return status;
  }
  const auto kernel = p.dtype == DType::kBF16  ? CombineGradKernel<DType::kBF16>
                      : p.dtype == DType::kF16 ? CombineGradKernel<DType::kF16>
                                               : CombineGradKernel<DType::kF32>;
  return Launch(kernel, NumBlocks(p.num_tokens, p.peers), kCombineThreads, CombineShared::kNumBytes,
                stream, p, kOp);
}

Status LoadCombineKernels() {
  Status status = LoadKernels<CombineParams>(
      {CombineKernel<DType::kBF16, true>, CombineKernel<DType::kF16, true>,
       CombineKernel<DType::kF32, true>, CombineKernel<DType::kBF16, false>,
       CombineKernel<DType::kF16, false>, CombineKernel<DType::kF32, false>},
      "combine");
  if (!status.ok()) return status;
  return LoadKernels<CombineGradParams>(
      {CombineGradKernel<DType::kBF16>, CombineGradKernel<DType::kF16>,
       CombineGradKernel<DType::kF32>},
      "combine's gradient");
}

}  // namespace wideep
