// Handlers of dispatch and of combine's backward pass.
#include "csrc/ep/dispatch_host.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet.h"

namespace wideep {
namespace {

using I32Scalar = ffi::BufferR0<ffi::S32>;
using I32Matrix = ffi::BufferR2<ffi::S32>;
using F32Vector = ffi::BufferR1<ffi::F32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;

Status RowShape(const char* op, std::optional<DType> dtype, const ffi::AnyBuffer& tokens,
                const I32Matrix& dest_rank, const ffi::AnyBuffer& rows, bool zero_tail,
                DispatchShape& shape) {
  if (!dtype || tokens.dimensions().size() != 2 || rows.dimensions().size() != 2) {
    return Status::InvalidArgument(std::string(op) + ": rows must be [tokens, hidden] float, got " +
                                   ShapeOf(tokens));
  }
  shape = {tokens.dimensions()[0],
           static_cast<int>(dest_rank.dimensions()[1]),
           tokens.dimensions()[1],
           rows.dimensions()[0],
           *dtype,
           zero_tail};
  return Status();
}

ffi::Future DispatchImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                         bool zero_tail, ffi::AnyBuffer x, F32Matrix weights, I32Matrix dest_rank,
                         I32Matrix dest_row, I32Scalar num_rows, ffi::Result<ffi::AnyBuffer> rows,
                         ffi::Result<F32Vector> row_weights) {
  DispatchShape shape;
  // Rows only move, so bytes (an FP8 row and its scales) will do.
  const bool bytes = x.element_type() == ffi::DataType::U8;
  const std::optional<DType> dtype = bytes ? DType::kF8E4M3 : RowDType(x.element_type());
  if (Status status = RowShape("dispatch", dtype, x, dest_rank, *rows, zero_tail, shape);
      !status.ok()) {
    return FailedFuture(status);
  }
  const DispatchBuffers buffers{
      x.untyped_data(),      weights.typed_data(), dest_rank.typed_data(),   dest_row.typed_data(),
      num_rows.typed_data(), rows->untyped_data(), row_weights->typed_data()};
  return Meet<DispatchShape, DispatchBuffers>(
      "dispatch", {device, run_id, instance, group}, shape, buffers, NoCheck,
      [](const DispatchShape& agreed, std::vector<DispatchBuffers> ranks, Completion finish) {
        Dispatch(agreed, std::move(ranks), WorkerPool::Global(), [finish] { finish(Status()); });
      },
      EmptyDispatch);
}

ffi::Future CombineGradImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                            bool zero_tail, ffi::AnyBuffer dout, ffi::AnyBuffer y,
                            F32Vector row_weights, I32Matrix dest_rank, I32Matrix dest_row,
                            I32Scalar num_rows, ffi::Result<ffi::AnyBuffer> dy,
                            ffi::Result<F32Vector> drow_weights) {
  DispatchShape shape;
  if (Status status = RowShape("combine's gradient", RowDType(dout.element_type()), dout, dest_rank,
                               *dy, zero_tail, shape);
      !status.ok()) {
    return FailedFuture(status);
  }
  const CombineGradBuffers buffers{dout.untyped_data(),      y.untyped_data(),
                                   row_weights.typed_data(), dest_rank.typed_data(),
                                   dest_row.typed_data(),    num_rows.typed_data(),
                                   dy->untyped_data(),       drow_weights->typed_data()};
  return Meet<DispatchShape, CombineGradBuffers>(
      "combine's gradient", {device, run_id, instance, group}, shape, buffers, NoCheck,
      [](const DispatchShape& agreed, std::vector<CombineGradBuffers> ranks, Completion finish) {
        CombineGrad(agreed, std::move(ranks), WorkerPool::Global(), [finish] { finish(Status()); });
      },
      EmptyCombineGrad);
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepDispatch, wideep::DispatchImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::State<wideep::OpInstance>>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("zero_tail")
                                  .Arg<xla::ffi::AnyBuffer>()  // x [tokens, hidden]
                                  .Arg<wideep::F32Matrix>()    // topk_weights [tokens, k]
                                  .Arg<wideep::I32Matrix>()    // dest_rank [tokens, k]
                                  .Arg<wideep::I32Matrix>()    // dest_row [tokens, k]
                                  .Arg<wideep::I32Scalar>()    // num_rows
                                  .Ret<xla::ffi::AnyBuffer>()  // rows [capacity, hidden]
                                  .Ret<wideep::F32Vector>());  // row_weights [capacity]

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepCombineGrad, wideep::CombineGradImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::State<wideep::OpInstance>>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("zero_tail")
                                  .Arg<xla::ffi::AnyBuffer>()  // dout [tokens, hidden]
                                  .Arg<xla::ffi::AnyBuffer>()  // y [capacity, hidden]
                                  .Arg<wideep::F32Vector>()    // row_weights [capacity]
                                  .Arg<wideep::I32Matrix>()    // dest_rank [tokens, k]
                                  .Arg<wideep::I32Matrix>()    // dest_row [tokens, k]
                                  .Arg<wideep::I32Scalar>()    // num_rows
                                  .Ret<xla::ffi::AnyBuffer>()  // dy [capacity, hidden]
                                  .Ret<wideep::F32Vector>());  // drow_weights [capacity]
