// Handlers of dispatch and of combine's backward pass.
#include "csrc/ep/dispatch.h"

#include "csrc/ep/combine.h"
#include "xla_ffi/cuda/exchange.h"
#include "xla_ffi/cuda/handlers.h"

namespace wideep {
namespace {

ffi::Error DispatchImpl(cudaStream_t stream, int32_t device, int64_t group, bool zero_tail,
                        int32_t form, ffi::AnyBuffer x, F32Matrix weights, I32Matrix dest_rank,
                        I32Matrix dest_row, I32Scalar num_rows, I32Vector row_source,
                        I32Vector arrival_rows, I32Vector rows_per_source,
                        ffi::Result<ffi::AnyBuffer> rows, ffi::Result<F32Vector> row_weights) {
  constexpr char kOp[] = "dispatch";
  const PlanOperands plan{dest_rank, dest_row, num_rows, row_source, arrival_rows, rows_per_source};
  // Rows are bytes here, whatever their type.
  const size_t element_bytes = ffi::ByteWidth(x.element_type());
  if (x.dimensions().size() != 2 || element_bytes == 0 ||
      rows->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument(
        std::string(kOp) + ": x must be [tokens, hidden] of the rows' type, got " + ShapeOf(x));
  }
  const int64_t hidden = x.dimensions()[1];
  DispatchParams p;
  p.row_bytes = hidden * static_cast<int64_t>(element_bytes);
  std::shared_ptr<const PeerRank> rank;
  Status status = FindRank(kOp, group, device, plan, p.row_bytes, rank);
  if (status.ok()) {
    status =
        CheckShapes(kOp, {{"x", x.dimensions(), {plan.num_tokens(), hidden}},
                          {"topk_weights", weights.dimensions(), {plan.num_tokens(), plan.top_k()}},
                          {"rows", rows->dimensions(), {plan.capacity(), hidden}},
                          {"row_weights", row_weights->dimensions(), {plan.capacity()}}});
  }
  if (!status.ok()) return ToFfiError(status);
  p.peers = rank->context;
  p.plan = plan.arrays();
  p.form = static_cast<DispatchForm>(form);
  p.num_tokens = plan.num_tokens();
  p.top_k = plan.top_k();
  p.capacity = plan.capacity();
  p.zero_tail = zero_tail;
  p.x = static_cast<const char*>(x.untyped_data());
  p.weights = weights.typed_data();
  p.rows = static_cast<char*>(rows->untyped_data());
  p.row_weights = row_weights->typed_data();
  return ToFfiError(rank->across.two_hop != nullptr ? rank->across.two_hop->Dispatch(p, stream)
                                                    : LaunchDispatch(p, stream));
}

ffi::Error CombineGradImpl(cudaStream_t stream, int32_t device, int64_t group, bool zero_tail,
                           ffi::AnyBuffer dout, ffi::AnyBuffer y, F32Vector row_weights,
                           I32Matrix dest_rank, I32Matrix dest_row, I32Scalar num_rows,
                           I32Vector row_source, I32Vector arrival_rows, I32Vector rows_per_source,
                           ffi::Result<ffi::AnyBuffer> dy, ffi::Result<F32Vector> drow_weights) {
  constexpr char kOp[] = "combine's gradient";
  const PlanOperands plan{dest_rank, dest_row, num_rows, row_source, arrival_rows, rows_per_source};
  const std::optional<DType> dtype = RowDType(dout.element_type());
  if (!dtype || dout.dimensions().size() != 2 || y.element_type() != dout.element_type() ||
      dy->element_type() != dout.element_type()) {
    return ffi::Error::InvalidArgument(
        std::string(kOp) + ": dout, y and dy must be float rows of one type, got dout " +
        ShapeOf(dout));
  }
  CombineGradParams p;
  p.dtype = *dtype;
  p.hidden = dout.dimensions()[1];
  std::shared_ptr<const PeerRank> rank;
  Status status =
      FindRank(kOp, group, device, plan, p.hidden * static_cast<int64_t>(SizeOf(*dtype)), rank);
  if (status.ok()) {
    status = CheckShapes(kOp, {{"dout", dout.dimensions(), {plan.num_tokens(), p.hidden}},
                               {"y", y.dimensions(), {plan.capacity(), p.hidden}},
                               {"row_weights", row_weights.dimensions(), {plan.capacity()}},
                               {"dy", dy->dimensions(), {plan.capacity(), p.hidden}},
                               {"drow_weights", drow_weights->dimensions(), {plan.capacity()}}});
  }
  if (!status.ok()) return ToFfiError(status);
  p.peers = rank->context;
  p.plan = plan.arrays();
  p.num_tokens = plan.num_tokens();
  p.top_k = plan.top_k();
  p.capacity = plan.capacity();
  p.zero_tail = zero_tail;
  p.dout = static_cast<const char*>(dout.untyped_data());
  p.y = static_cast<const char*>(y.untyped_data());
  p.row_weights = row_weights.typed_data();
  p.dy = static_cast<char*>(dy->untyped_data());
  p.drow_weights = drow_weights->typed_data();
  return ToFfiError(rank->across.two_hop != nullptr ? rank->across.two_hop->CombineGrad(p, stream)
                                                    : LaunchCombineGrad(p, stream));
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepDispatch, wideep::DispatchImpl,
    wideep::WithPlan(xla::ffi::Ffi::Bind()
                         .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                         .Ctx<xla::ffi::DeviceOrdinal>()
                         .Attr<int64_t>("group")
                         .Attr<bool>("zero_tail")
                         .Attr<int32_t>("form")       // a DispatchForm
                         .Arg<xla::ffi::AnyBuffer>()  // x [tokens, hidden]
                         .Arg<wideep::F32Matrix>())   // topk_weights [tokens, k]
        .Ret<xla::ffi::AnyBuffer>()                   // rows [capacity, hidden]
        .Ret<wideep::F32Vector>(),                    // row_weights [capacity]
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepCombineGrad, wideep::CombineGradImpl,
    wideep::WithPlan(xla::ffi::Ffi::Bind()
                         .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                         .Ctx<xla::ffi::DeviceOrdinal>()
                         .Attr<int64_t>("group")
                         .Attr<bool>("zero_tail")
                         .Arg<xla::ffi::AnyBuffer>()  // dout [tokens, hidden]
                         .Arg<xla::ffi::AnyBuffer>()  // y [capacity, hidden]
                         .Arg<wideep::F32Vector>())   // row_weights [capacity]
        .Ret<xla::ffi::AnyBuffer>()                   // dy [capacity, hidden]
        .Ret<wideep::F32Vector>(),                    // drow_weights [capacity]
    {xla::ffi::Traits::kCmdBufferCompatible});
