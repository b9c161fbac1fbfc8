#include <string>

#include "csrc/ep/load_kernels.h"
#include "csrc/ep/quantize.cuh"

namespace wideep {

Status LaunchQuantize(const QuantizeParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kF8E4M3 || p.hidden % kQuantBlock != 0 || p.q_stride_bytes % 8 != 0 ||
      p.scale_stride_bytes % 4 != 0 || p.pad_bytes < 0 || p.pad_bytes % 4 != 0) {
    return Status::InvalidArgument(
        "quantize: expected rows of bfloat16, float16 or float32, hidden a multiple of 128, and "
        "strides that hold a row, got hidden " +
        std::to_string(p.hidden) + " and strides " + std::to_string(p.q_stride_bytes) + " and " +
        std::to_string(p.scale_stride_bytes));
  }
  if (p.num_tokens == 0) return Status();
  const auto kernel = p.dtype == DType::kBF16  ? QuantizeKernel<DType::kBF16>
                      : p.dtype == DType::kF16 ? QuantizeKernel<DType::kF16>
                                               : QuantizeKernel<DType::kF32>;
  const int64_t num_pieces = p.num_tokens * p.hidden * static_cast<int64_t>(SizeOf(p.dtype)) / 16;
  constexpr int64_t kPiecesPerBlock = int64_t{kQuantizeThreads} * kQuantizePieces;
  const auto blocks = static_cast<int>((num_pieces + kPiecesPerBlock - 1) / kPiecesPerBlock);
  return Launch(kernel, blocks, kQuantizeThreads, /*shared_bytes=*/0, stream, p, "quantize");
}

Status LoadQuantizeKernels() {
  return LoadKernels<QuantizeParams>(
      {QuantizeKernel<DType::kBF16>, QuantizeKernel<DType::kF16>, QuantizeKernel<DType::kF32>},
      "quantize");
}

}  // namespace wideep
