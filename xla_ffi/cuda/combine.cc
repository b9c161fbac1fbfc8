// Handlers of combine and of dispatch's backward pass.
#include "csrc/ep/combine.h"

#include <optional>

#include "xla_ffi/cuda/exchange.h"
#include "xla_ffi/cuda/handlers.h"

namespace wideep {
namespace {

/// Scratch of CombineForm::kReduce; the other forms have none.
using Sums = std::optional<ffi::Result<ffi::AnyBuffer>>;

/// What both take: rows at their experts with a scalar each, the tokens' outputs, and scratch.
Status ReadCombine(const char* op, int64_t group, int32_t device, int32_t form,
                   const PlanOperands& plan, const ffi::AnyBuffer& rows,
                   const F32Vector& row_scalars, ffi::AnyBuffer& out, Sums sums,
                   std::shared_ptr<const PeerRank>& rank, CombineParams& p) {
  const std::optional<DType> dtype = RowDType(rows.element_type());
  if (!dtype || rows.dimensions().size() != 2 || out.element_type() != rows.element_type()) {
    return Status::InvalidArgument(std::string(op) +
                                   ": rows must be [capacity, hidden] float of the output's type, "
                                   "got " +
                                   ShapeOf(rows));
  }
  p.dtype = *dtype;
  p.hidden = rows.dimensions()[1];
  Status status =
      FindRank(op, group, device, plan, p.hidden * static_cast<int64_t>(SizeOf(*dtype)), rank);
  if (status.ok()) {
    status = CheckShapes(op, {{"rows", rows.dimensions(), {plan.capacity(), p.hidden}},
                              {"row weights", row_scalars.dimensions(), {plan.capacity()}},
                              {"output", out.dimensions(), {plan.num_tokens(), p.hidden}}});
  }
  p.form = static_cast<CombineForm>(form);
  if (status.ok() && p.form == CombineForm::kReduce) {
    if (!sums || (*sums)->element_type() != rows.element_type()) {
      return Status::InvalidArgument(std::string(op) +
                                     ": form reduce needs scratch of the rows' type");
    }
    status = CheckShapes(op, {{"sums", (*sums)->dimensions(), {plan.capacity(), p.hidden}}});
    p.sums = static_cast<char*>((*sums)->untyped_data());
  }
  if (!status.ok()) return status;
  p.peers = rank->context;
  p.plan = plan.arrays();
  p.num_tokens = plan.num_tokens();
  p.top_k = plan.top_k();
  p.y = static_cast<const char*>(rows.untyped_data());
  p.row_scalars = row_scalars.typed_data();
  p.out = static_cast<char*>(out.untyped_data());
  return Status();
}

Status Launch(const PeerRank& rank, const CombineParams& p, cudaStream_t stream) {
  return rank.across.two_hop != nullptr ? rank.across.two_hop->Combine(p, stream)
                                        : LaunchCombine(p, stream);
}

ffi::Error CombineImpl(cudaStream_t stream, int32_t device, int64_t group, int32_t form,
                       ffi::AnyBuffer y, F32Vector row_weights, I32Matrix dest_rank,
                       I32Matrix dest_row, I32Scalar num_rows, I32Vector row_source,
                       I32Vector arrival_rows, I32Vector rows_per_source,
                       ffi::Result<ffi::AnyBuffer> out, Sums sums) {
  const PlanOperands plan{dest_rank, dest_row, num_rows, row_source, arrival_rows, rows_per_source};
  std::shared_ptr<const PeerRank> rank;
  CombineParams p;
  const Status status =
      ReadCombine("combine", group, device, form, plan, y, row_weights, *out, sums, rank, p);
  return ToFfiError(status.ok() ? Launch(*rank, p, stream) : status);
}

ffi::Error DispatchGradImpl(cudaStream_t stream, int32_t device, int64_t group, int32_t form,
                            ffi::AnyBuffer drows, F32Vector drow_weights, I32Matrix dest_rank,
                            I32Matrix dest_row, I32Scalar num_rows, I32Vector row_source,
                            I32Vector arrival_rows, I32Vector rows_per_source,
                            ffi::Result<ffi::AnyBuffer> dx, ffi::Result<F32Matrix> dweights,
                            Sums sums) {
  constexpr char kOp[] = "dispatch's gradient";
  const PlanOperands plan{dest_rank, dest_row, num_rows, row_source, arrival_rows, rows_per_source};
  std::shared_ptr<const PeerRank> rank;
  CombineParams p;
  Status status =
      ReadCombine(kOp, group, device, form, plan, drows, drow_weights, *dx, sums, rank, p);
  if (status.ok()) {
    status = CheckShapes(kOp, {{"dtopk_weights", dweights->dimensions(), {p.num_tokens, p.top_k}}});
  }
  if (!status.ok()) return ToFfiError(status);
  p.dweights = dweights->typed_data();
  // Without tokens there is nothing to write, but the kernel tells the two ops apart by it.
  static float no_weights;
  if (p.dweights == nullptr) p.dweights = &no_weights;
  return ToFfiError(Launch(*rank, p, stream));
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepCombine, wideep::CombineImpl,
    wideep::WithPlan(xla::ffi::Ffi::Bind()
                         .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                         .Ctx<xla::ffi::DeviceOrdinal>()
                         .Attr<int64_t>("group")
                         .Attr<int32_t>("form")       // a CombineForm
                         .Arg<xla::ffi::AnyBuffer>()  // y [capacity, hidden]
                         .Arg<wideep::F32Vector>())   // row_weights [capacity]
        .Ret<xla::ffi::AnyBuffer>()                   // out [tokens, hidden]
        .OptionalRet<xla::ffi::AnyBuffer>(),          // sums [capacity, hidden]
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepDispatchGrad, wideep::DispatchGradImpl,
    wideep::WithPlan(xla::ffi::Ffi::Bind()
                         .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                         .Ctx<xla::ffi::DeviceOrdinal>()
                         .Attr<int64_t>("group")
                         .Attr<int32_t>("form")       // a CombineForm
                         .Arg<xla::ffi::AnyBuffer>()  // drows [capacity, hidden]
                         .Arg<wideep::F32Vector>())   // drow_weights [capacity]
        .Ret<xla::ffi::AnyBuffer>()                   // dx [tokens, hidden]
        .Ret<wideep::F32Matrix>()                     // dtopk_weights [tokens, k]
        .OptionalRet<xla::ffi::AnyBuffer>(),          // sums [capacity, hidden]
    {xla::ffi::Traits::kCmdBufferCompatible});
