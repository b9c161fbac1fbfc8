// Handler of the FP8 wire: rows and their scales, packed as they travel.
#include "csrc/ep/quantize.h"

#include "xla_ffi/cuda/exchange.h"
#include "xla_ffi/cuda/handlers.h"

namespace wideep {
namespace {

using ByteMatrix = ffi::BufferR2<ffi::U8>;

ffi::Error QuantizeRowsImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ByteMatrix> wire) {
  constexpr char kOp[] = "quantize_rows";
  const std::optional<DType> dtype = RowDType(x.element_type());
  if (!dtype || *dtype == DType::kF8E4M3 || x.dimensions().size() != 2 ||
      x.dimensions()[1] % kQuantBlock != 0) {
    return ffi::Error::InvalidArgument(std::string(kOp) +
                                       ": x must be [tokens, hidden] of bfloat16, float16 or "
                                       "float32, hidden a multiple of 128, got " +
                                       ShapeOf(x));
  }
  const int64_t num_tokens = x.dimensions()[0];
  const int64_t hidden = x.dimensions()[1];
  const int64_t row_bytes = WireRowBytes(hidden);
  const Status status =
      CheckShapes(kOp, {{"wire rows", wire->dimensions(), {num_tokens, row_bytes}}});
  if (!status.ok()) return ToFfiError(status);
  return ToFfiError(LaunchQuantize(
      QuantizeToWire(*dtype, x.untyped_data(), num_tokens, hidden, wire->untyped_data(), row_bytes),
      stream));
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepQuantizeRows, wideep::QuantizeRowsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()                // x [tokens, hidden]
                                  .Ret<xla::ffi::BufferR2<xla::ffi::U8>>(),  // wire rows
                              {xla::ffi::Traits::kCmdBufferCompatible});
