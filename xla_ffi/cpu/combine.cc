// Handlers of combine and of dispatch's backward pass.
#include "csrc/ep/combine_host.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet.h"

namespace wideep {
namespace {

using I32Scalar = ffi::BufferR0<ffi::S32>;
using I32Vector = ffi::BufferR1<ffi::S32>;
using I32Matrix = ffi::BufferR2<ffi::S32>;
using F32Vector = ffi::BufferR1<ffi::F32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;

Status RowShape(const char* op, const ffi::AnyBuffer& tokens, const I32Matrix& dest_rank,
                CombineShape& shape) {
  const std::optional<DType> dtype = RowDType(tokens.element_type());
  if (!dtype || tokens.dimensions().size() != 2) {
    return Status::InvalidArgument(
        std::string(op) + ": rows must be [capacity, hidden] float, got " + ShapeOf(tokens));
  }
  shape = {tokens.dimensions()[0], static_cast<int>(dest_rank.dimensions()[1]),
           tokens.dimensions()[1], *dtype};
  if (shape.top_k <= kMaxTopK) return Status();
  return Status::InvalidArgument(std::string(op) + ": top-k must be at most " +
                                 std::to_string(kMaxTopK) + ", got " + std::to_string(shape.top_k));
}

ffi::Future CombineImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                        ffi::AnyBuffer y, F32Vector row_weights, I32Matrix dest_rank,
                        I32Matrix dest_row, I32Scalar num_rows, I32Vector row_source,
                        ffi::Result<ffi::AnyBuffer> out) {
  CombineShape shape;
  if (Status status = RowShape("combine", *out, dest_rank, shape); !status.ok()) {
    return FailedFuture(status);
  }
  CombineBuffers buffers{y.untyped_data(), row_weights.typed_data(), dest_rank.typed_data(),
                         dest_row.typed_data(), out->untyped_data()};
  buffers.num_rows = num_rows.typed_data();
  buffers.row_source = row_source.typed_data();
  return Meet<CombineShape, CombineBuffers>(
      "combine", {device, run_id, instance, group}, shape, buffers, NoCheck,
      [](const CombineShape& agreed, std::vector<CombineBuffers> ranks, Completion finish) {
        Combine(agreed, std::move(ranks), WorkerPool::Global(), [finish] { finish(Status()); });
      },
      EmptyCombine);
}

ffi::Future DispatchGradImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                             ffi::AnyBuffer drows, F32Vector drow_weights, I32Matrix dest_rank,
                             I32Matrix dest_row, I32Scalar num_rows, I32Vector row_source,
                             ffi::Result<ffi::AnyBuffer> dx, ffi::Result<F32Matrix> dweights) {
  CombineShape shape;
  if (Status status = RowShape("dispatch's gradient", *dx, dest_rank, shape); !status.ok()) {
    return FailedFuture(status);
  }
  DispatchGradBuffers buffers{drows.untyped_data(),   drow_weights.typed_data(),
                              dest_rank.typed_data(), dest_row.typed_data(),
                              dx->untyped_data(),     dweights->typed_data()};
  buffers.num_rows = num_rows.typed_data();
  buffers.row_source = row_source.typed_data();
  return Meet<CombineShape, DispatchGradBuffers>(
      "dispatch's gradient", {device, run_id, instance, group}, shape, buffers, NoCheck,
      [](const CombineShape& agreed, std::vector<DispatchGradBuffers> ranks, Completion finish) {
        DispatchGrad(agreed, std::move(ranks), WorkerPool::Global(),
                     [finish] { finish(Status()); });
      },
      EmptyDispatchGrad);
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepCombine, wideep::CombineImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::State<wideep::OpInstance>>()
                                  .Attr<int64_t>("group")
                                  .Arg<xla::ffi::AnyBuffer>()    // y [capacity, hidden]
                                  .Arg<wideep::F32Vector>()      // row_weights [capacity]
                                  .Arg<wideep::I32Matrix>()      // dest_rank [tokens, k]
                                  .Arg<wideep::I32Matrix>()      // dest_row [tokens, k]
                                  .Arg<wideep::I32Scalar>()      // num_rows
                                  .Arg<wideep::I32Vector>()      // row_source [capacity]
                                  .Ret<xla::ffi::AnyBuffer>());  // out [tokens, hidden]

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepDispatchGrad, wideep::DispatchGradImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::State<wideep::OpInstance>>()
                                  .Attr<int64_t>("group")
                                  .Arg<xla::ffi::AnyBuffer>()  // drows [capacity, hidden]
                                  .Arg<wideep::F32Vector>()    // drow_weights [capacity]
                                  .Arg<wideep::I32Matrix>()    // dest_rank [tokens, k]
                                  .Arg<wideep::I32Matrix>()    // dest_row [tokens, k]
                                  .Arg<wideep::I32Scalar>()    // num_rows
                                  .Arg<wideep::I32Vector>()    // row_source [capacity]
                                  .Ret<xla::ffi::AnyBuffer>()  // dx [tokens, hidden]
                                  .Ret<wideep::F32Matrix>());  // dtopk_weights [tokens, k]
