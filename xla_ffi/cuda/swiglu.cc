// Handlers of the experts' SwiGLU and of its gradient.
#include "csrc/gemm/swiglu.h"

#include <cuda_runtime_api.h>

#include <string>

#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/row_groups.h"
#include "xla_ffi/ffi_util.h"

namespace wideep {
namespace {

/// What both ops check: hidden [.., 2 * ffn], and an array [.., ffn] beside it.
template <typename Params>
Status ReadHidden(const char* op, const ffi::AnyBuffer& hidden, const char* name,
                  const ffi::AnyBuffer& narrow, const I32Vector& group_sizes, Params& p) {
  Status status = ReadRowGroups(op, "hidden", hidden, group_sizes, p.groups);
  if (!status.ok()) return status;
  const std::optional<DType> dtype = RowDType(hidden.element_type());
  if (!dtype || narrow.element_type() != hidden.element_type()) {
    return Status::InvalidArgument(std::string(op) + ": hidden and " + name +
                                   " must be of one type, bfloat16 or float16");
  }
  p.dtype = *dtype;
  p.ffn = hidden.dimensions().back() / 2;
  p.hidden = hidden.untyped_data();
  if (static_cast<int64_t>(narrow.element_count()) == p.groups.num_rows * p.ffn &&
      hidden.dimensions().back() % 2 == 0) {
    return Status();
  }
  return Status::InvalidArgument(std::string(op) + ": " + name + " must have half of hidden's " +
                                 ShapeOf(hidden) + " columns, got " + ShapeOf(narrow));
}

ffi::Error SwigluImpl(cudaStream_t stream, ffi::AnyBuffer hidden, I32Vector group_sizes,
                      ffi::Result<ffi::AnyBuffer> out) {
  SwigluParams p;
  const Status status = ReadHidden("swiglu", hidden, "out", *out, group_sizes, p);
  if (!status.ok()) return ToFfiError(status);
  p.out = out->untyped_data();
  return ToFfiError(LaunchSwiglu(p, stream));
}

ffi::Error SwigluGradImpl(cudaStream_t stream, ffi::AnyBuffer hidden, ffi::AnyBuffer dout,
                          I32Vector group_sizes, ffi::Result<ffi::AnyBuffer> dhidden) {
  SwigluGradParams p;
  const Status status = ReadHidden("swiglu_grad", hidden, "dout", dout, group_sizes, p);
  if (!status.ok()) return ToFfiError(status);
  if (dhidden->element_type() != hidden.element_type() ||
      dhidden->element_count() != hidden.element_count()) {
    return ffi::Error::InvalidArgument("swiglu_grad: dhidden must be as hidden " + ShapeOf(hidden) +
                                       ", got " + ShapeOf(*dhidden));
  }
  p.dout = dout.untyped_data();
  p.dhidden = dhidden->untyped_data();
  return ToFfiError(LaunchSwigluGrad(p, stream));
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepSwiglu, wideep::SwigluImpl,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
        .Arg<xla::ffi::AnyBuffer>()   // hidden [m, 2 * ffn] or [groups, cap, 2 * ffn]
        .Arg<wideep::I32Vector>()     // group_sizes [groups]
        .Ret<xla::ffi::AnyBuffer>(),  // out [m, ffn] or [groups, cap, ffn]
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepSwigluGrad, wideep::SwigluGradImpl,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
        .Arg<xla::ffi::AnyBuffer>()   // hidden [m, 2 * ffn] or [groups, cap, 2 * ffn]
        .Arg<xla::ffi::AnyBuffer>()   // dout [m, ffn] or [groups, cap, ffn]
        .Arg<wideep::I32Vector>()     // group_sizes [groups]
        .Ret<xla::ffi::AnyBuffer>(),  // dhidden, as hidden
    {xla::ffi::Traits::kCmdBufferCompatible});
