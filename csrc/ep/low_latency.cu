#include <algorithm>
#include <string>

#include "csrc/ep/load_kernels.h"
#include "csrc/ep/low_latency.cuh"

namespace wideep {
namespace {

Status CheckTokens(const char* op, const PeerContext& peers, const LowLatencyTokens& t, DType dtype,
                   bool quantize) {
  const LowLatencyLayout& layout = peers.layout.low_latency;
  const int64_t row_bytes = t.hidden * static_cast<int64_t>(SizeOf(dtype));
  const int64_t wire_bytes = quantize ? WireRowBytes(t.hidden) : row_bytes;
  const auto invalid = [&](const std::string& expected, const std::string& got) {
    return Status::InvalidArgument(std::string(op) + ": expected " + expected + " on CUDA, got " +
                                   got);
  };
  if (dtype == DType::kF8E4M3 || row_bytes % 16 != 0 || (quantize && t.hidden % kQuantBlock != 0)) {
    return invalid("rows of bfloat16, float16 or float32, of a multiple of " +
                       std::string(quantize ? "128 values" : "16 bytes"),
                   "hidden " + std::to_string(t.hidden));
  }
  if (t.top_k < 1 || t.top_k > kMaxKernelTopK || t.top_k > layout.top_k) {
    return invalid(
        "top_k of at most " + std::to_string(std::min<int>(kMaxKernelTopK, layout.top_k)),
        std::to_string(t.top_k));
  }
  if (t.num_tokens > layout.chunk || wire_bytes > layout.row_stride) {
    return invalid("at most " + std::to_string(layout.chunk) + " tokens of " +
                       std::to_string(layout.row_stride) + " bytes",
                   std::to_string(t.num_tokens) + " of " + std::to_string(wire_bytes));
  }
  if (LowLatencyDispatchShared::NumBytes(t, peers.num_ranks) > kMaxSharedBytes) {
    return invalid("num_tokens * num_experts to fit a block's shared memory",
                   std::to_string(t.num_tokens) + " tokens and " + std::to_string(t.num_experts) +
                       " experts; use a smaller chunk");
  }
  return Status();
}

/// Few rows are cut into many pieces, for latency; many rows into few, for less bookkeeping. Every
/// warp should find 16 bytes a lane in its piece.
LowLatencyTuning Tune(LowLatencyTuning tuning, const LowLatencyTokens& t, const PeerContext& peers,
                      DType dtype, bool quantize) {
  const int64_t row_bytes = t.hidden * static_cast<int64_t>(SizeOf(dtype));
  if (tuning.pieces == 0) {
    const int64_t most = quantize ? t.hidden / kQuantBlock : (row_bytes + 511) / 512;
    const int64_t wanted = t.num_tokens <= 16  ? kMaxPieces
                           : t.num_tokens < 64 ? kMaxPieces / 2
                                               : kMaxPieces / 4;
    tuning.pieces = static_cast<int32_t>(std::clamp<int64_t>(most, 1, wanted));
  }
  tuning.pieces = std::clamp(tuning.pieces, 1, kMaxPieces);
  if (tuning.num_blocks == 0) {
    // A warp for each piece that a rank receives, if all draw alike.
    const int64_t pieces = t.num_tokens * t.top_k * tuning.pieces;
    tuning.num_blocks = static_cast<int32_t>((pieces + kWarpsPerBlock - 1) / kWarpsPerBlock);
  }
  tuning.num_blocks = std::clamp(tuning.num_blocks, 1, peers.num_sms);
  return tuning;
}

Status LaunchZeroTails(char* rows, float* row_scales, const int32_t* counts, int64_t row_bytes,
                       const LowLatencyTokens& t, const PeerContext& peers, cudaStream_t stream) {
  ExpertTailParams p;
  p.rows = rows;
  p.row_scales = row_scales;
  p.counts = counts;
  p.row_bytes = row_bytes;
  p.num_scales = row_scales != nullptr ? t.hidden / kQuantBlock : 0;
  p.rows_per_expert = peers.num_ranks * peers.layout.low_latency.chunk;
  p.local_experts = t.num_experts / peers.num_ranks;
  // About 16 KB for a block, but no more than a few blocks for each multiprocessor.
  const int64_t wanted = p.rows_per_expert * row_bytes / (16 * 1024) + 1;
  const int64_t most = std::max<int64_t>(1, 1024 / p.local_experts);
  const auto blocks = static_cast<int>(std::min(wanted, most) * p.local_experts);
  return Launch(ZeroExpertTailsKernel, blocks, kTailThreads, 0, stream, p, "ll_dispatch");
}

template <DType kDType>
auto DispatchKernelOf(const LowLatencyDispatchParams& p) {
  return !p.quantize    ? LowLatencyDispatchKernel<kDType, Wire::kPlain>
         : p.dequantize ? LowLatencyDispatchKernel<kDType, Wire::kFp8Dequantized>
                        : LowLatencyDispatchKernel<kDType, Wire::kFp8>;
}

}  // namespace

Status LaunchLowLatencyDispatch(const LowLatencyDispatchParams& params, cudaStream_t stream) {
  constexpr char kOp[] = "ll_dispatch";
  LowLatencyDispatchParams p = params;
  Status status = CheckTokens(kOp, p.peers, p.tokens, p.dtype, p.quantize);
  if (!status.ok()) return status;
  p.tuning = Tune(p.tuning, p.tokens, p.peers, p.dtype, p.quantize);
  const auto kernel = p.dtype == DType::kBF16  ? DispatchKernelOf<DType::kBF16>(p)
                      : p.dtype == DType::kF16 ? DispatchKernelOf<DType::kF16>(p)
                                               : DispatchKernelOf<DType::kF32>(p);
  status = Launch(kernel, p.tuning.num_blocks, kLowLatencyThreads,
                  LowLatencyDispatchShared::NumBytes(p.tokens, p.peers.num_ranks), stream, p, kOp);
  if (!status.ok() || !p.zero_tail || p.part == LowLatencyPart::kSend) return status;
  const bool fp8 = p.quantize && !p.dequantize;
  return LaunchZeroTails(
      p.rows, fp8 ? p.row_scales : nullptr, p.counts,
      p.tokens.hidden * static_cast<int64_t>(SizeOf(fp8 ? DType::kF8E4M3 : p.dtype)), p.tokens,
      p.peers, stream);
}

Status LaunchLowLatencyCombine(const LowLatencyCombineParams& params, cudaStream_t stream) {
  constexpr char kOp[] = "ll_combine";
  LowLatencyCombineParams p = params;
  if (Status status = CheckTokens(kOp, p.peers, p.tokens, p.dtype, false); !status.ok()) {
    return status;
  }
  p.tuning = Tune(p.tuning, p.tokens, p.peers, p.dtype, false);
  const auto kernel = p.dtype == DType::kBF16  ? LowLatencyCombineKernel<DType::kBF16>
                      : p.dtype == DType::kF16 ? LowLatencyCombineKernel<DType::kF16>
                                               : LowLatencyCombineKernel<DType::kF32>;
  return Launch(kernel, p.tuning.num_blocks, kLowLatencyThreads,
                LowLatencyCombineShared::NumBytes(p.tokens, p.peers.num_ranks), stream, p, kOp);
}

Status LaunchLowLatencyCombineGrad(const LowLatencyCombineGradParams& params, cudaStream_t stream) {
  constexpr char kOp[] = "ll_combine's gradient";
  LowLatencyCombineGradParams p = params;
  Status status = CheckTokens(kOp, p.peers, p.tokens, p.dtype, false);
  if (!status.ok()) return status;
  p.tuning = Tune(p.tuning, p.tokens, p.peers, p.dtype, false);
  const auto kernel = p.dtype == DType::kBF16  ? LowLatencyCombineGradKernel<DType::kBF16>
                      : p.dtype == DType::kF16 ? LowLatencyCombineGradKernel<DType::kF16>
                                               : LowLatencyCombineGradKernel<DType::kF32>;
  status = Launch(kernel, p.tuning.num_blocks, kLowLatencyThreads,
                  LowLatencyDispatchShared::NumBytes(p.tokens, p.peers.num_ranks), stream, p, kOp);
  const bool last = p.part == CombineGradPart::kBoth || p.part == CombineGradPart::kHome;
  if (!status.ok() || !p.zero_tail || !last) return status;
  return LaunchZeroTails(p.dy, nullptr, p.counts,
                         p.tokens.hidden * static_cast<int64_t>(SizeOf(p.dtype)), p.tokens, p.peers,
                         stream);
}

Status LoadLowLatencyKernels() {
  const auto all_types = [](auto load) {
    Status status = load(std::integral_constant<DType, DType::kBF16>());
    if (status.ok()) status = load(std::integral_constant<DType, DType::kF16>());
    if (status.ok()) status = load(std::integral_constant<DType, DType::kF32>());
    return status;
  };
  Status status = all_types([](auto dtype) {
    constexpr DType kDType = decltype(dtype)::value;
    return LoadKernels<LowLatencyDispatchParams>(
        {LowLatencyDispatchKernel<kDType, Wire::kPlain>,
         LowLatencyDispatchKernel<kDType, Wire::kFp8Dequantized>,
         LowLatencyDispatchKernel<kDType, Wire::kFp8>},
        "ll_dispatch");
  });
  if (status.ok()) status = LoadKernels({ZeroExpertTailsKernel}, "ll_dispatch");
  if (!status.ok()) return status;
  return all_types([](auto dtype) {
    constexpr DType kDType = decltype(dtype)::value;
    Status loaded =
        LoadKernels<LowLatencyCombineParams>({LowLatencyCombineKernel<kDType>}, "ll_combine");
    if (!loaded.ok()) return loaded;
    return LoadKernels<LowLatencyCombineGradParams>({LowLatencyCombineGradKernel<kDType>},
                                                    "ll_combine's gradient");
  });
}

}  // namespace wideep
