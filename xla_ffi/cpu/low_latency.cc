// Handlers of the low-latency shape: the sender's quantisation, dispatch, combine and combine's
// backward.
#include "csrc/core/float_env.h"
#include "csrc/ep/combine_host.h"
#include "csrc/ep/low_latency_host.h"
#include "csrc/ep/row_kernels.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet.h"

namespace wideep {
namespace {

using I32Scalar = ffi::BufferR0<ffi::S32>;
using I32Vector = ffi::BufferR1<ffi::S32>;
using I32Matrix = ffi::BufferR2<ffi::S32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;
using F32Cube = ffi::BufferR3<ffi::F32>;

// Local to a rank: nothing is awaited, so this one returns its result at once.
ffi::Error QuantizeImpl(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> q,
                        ffi::Result<F32Matrix> scales) {
  const std::optional<DType> dtype = RowDType(x.element_type());
  if (!dtype || x.dimensions().size() != 2 || x.dimensions()[1] % kQuantBlock != 0) {
    return ffi::Error(
        ffi::ErrorCode::kInvalidArgument,
        "quantize: x must be [tokens, hidden] float with hidden a multiple of 128, got " +
            ShapeOf(x));
  }
  const int64_t hidden = x.dimensions()[1];
  const auto* row = static_cast<const char*>(x.untyped_data());
  auto* codes = static_cast<uint8_t*>(q->untyped_data());
  const ScopedIeeeDenormals denormals;
  for (int64_t token = 0; token < x.dimensions()[0]; ++token) {
    SelectRowKernels().quantize(*dtype, codes + token * hidden,
                                scales->typed_data() + token * (hidden / kQuantBlock),
                                row + token * hidden * SizeOf(*dtype), hidden);
  }
  return ffi::Error::Success();
}

// The shape that all handlers of one exchange agree on. `rows` is [local_experts, ranks * chunk,
// hidden].
Status MakeShape(const char* op, int64_t num_experts, int64_t chunk, int64_t num_tokens,
                 int64_t top_k, const ffi::AnyBuffer& rows, bool zero_tail,
                 LowLatencyShape& shape) {
  const std::optional<DType> dtype = RowDType(rows.element_type());
  if (!dtype || rows.dimensions().size() != 3 || rows.dimensions()[0] == 0 || num_tokens > chunk ||
      top_k > kMaxTopK) {
    return Status::InvalidArgument(std::string(op) +
                                   ": rows must be [local_experts, ranks * chunk, hidden] "
                                   "float with tokens <= chunk and top-k <= 64, got rows " +
                                   ShapeOf(rows) + ", " + std::to_string(num_tokens) +
                                   " tokens, chunk " + std::to_string(chunk));
  }
  shape.num_ranks = static_cast<int>(num_experts / rows.dimensions()[0]);
  shape.num_tokens = num_tokens;
  shape.top_k = static_cast<int>(top_k);
  shape.num_experts = static_cast<int>(num_experts);
  shape.chunk = chunk;
  shape.hidden = rows.dimensions()[2];
  shape.dtype = *dtype;
  shape.quantized = false;
  shape.zero_tail = zero_tail;
  return Status();
}

ffi::Future DispatchImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                         int64_t num_experts, int64_t chunk, bool zero_tail, I32Scalar rank,
                         ffi::AnyBuffer payload, F32Matrix scales, I32Matrix topk_idx,
                         ffi::Result<ffi::AnyBuffer> rows, ffi::Result<F32Cube> row_scales,
                         ffi::Result<I32Vector> counts, ffi::Result<I32Matrix> row_source) {
  LowLatencyShape shape;
  if (Status status = MakeShape("ll_dispatch", num_experts, chunk, topk_idx.dimensions()[0],
                                topk_idx.dimensions()[1], *rows, zero_tail, shape);
      !status.ok()) {
    return FailedFuture(status);
  }
  shape.quantized = payload.element_type() == ffi::DataType::F8E4M3FN;
  const bool keep_scales = shape.dtype == DType::kF8E4M3;
  const LowLatencyDispatchBuffers buffers{payload.untyped_data(),
                                          shape.quantized ? scales.typed_data() : nullptr,
                                          topk_idx.typed_data(),
                                          rows->untyped_data(),
                                          keep_scales ? row_scales->typed_data() : nullptr,
                                          counts->typed_data(),
                                          row_source->typed_data()};
  const int32_t mesh_rank = *rank.typed_data();
  const auto check = [&](const HostGroup&, HostGroup::Place place) {
    if (place.rank == mesh_rank) return Status();
    return Status::FailedPrecondition(
        "ll_dispatch: device " + std::to_string(device) + " is rank " + std::to_string(place.rank) +
        " of the ExpertGroup but rank " + std::to_string(mesh_rank) +
        " in this shard_map. Build the group from the same mesh that shard_map uses");
  };
  return Meet<LowLatencyShape, LowLatencyDispatchBuffers>(
      "ll_dispatch", {device, run_id, instance, group}, shape, buffers, check,
      [](const LowLatencyShape& agreed, std::vector<LowLatencyDispatchBuffers> ranks,
         Completion finish) {
        LowLatencyDispatch(agreed, std::move(ranks), WorkerPool::Global(), std::move(finish));
      },
      EmptyLowLatencyDispatch);
}

ffi::Future CombineImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                        int64_t num_experts, int64_t chunk, ffi::AnyBuffer y,
                        F32Matrix topk_weights, I32Vector counts, I32Matrix row_source,
                        ffi::Result<ffi::AnyBuffer> out) {
  LowLatencyShape shape;
  if (Status status = MakeShape("ll_combine", num_experts, chunk, topk_weights.dimensions()[0],
                                topk_weights.dimensions()[1], y, /*zero_tail=*/false, shape);
      !status.ok()) {
    return FailedFuture(status);
  }
  LowLatencyCombineBuffers buffers{};
  buffers.y = y.untyped_data();
  buffers.topk_weights = topk_weights.typed_data();
  buffers.counts = counts.typed_data();
  buffers.row_source = row_source.typed_data();
  buffers.out = out->untyped_data();
  return Meet<LowLatencyShape, LowLatencyCombineBuffers>(
      "ll_combine", {device, run_id, instance, group}, shape, buffers, NoCheck,
      [](const LowLatencyShape& agreed, std::vector<LowLatencyCombineBuffers> ranks,
         Completion finish) {
        LowLatencyCombine(agreed, std::move(ranks), WorkerPool::Global(), std::move(finish));
      },
      EmptyLowLatencyCombine);
}

ffi::Future CombineGradImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                            int64_t num_experts, int64_t chunk, bool zero_tail, ffi::AnyBuffer dout,
                            ffi::AnyBuffer y, F32Matrix topk_weights, I32Vector counts,
                            I32Matrix row_source, ffi::Result<ffi::AnyBuffer> dy,
                            ffi::Result<F32Matrix> dtopk_weights) {
  LowLatencyShape shape;
  if (Status status =
          MakeShape("ll_combine's gradient", num_experts, chunk, topk_weights.dimensions()[0],
                    topk_weights.dimensions()[1], y, zero_tail, shape);
      !status.ok()) {
    return FailedFuture(status);
  }
  LowLatencyCombineBuffers buffers{};
  buffers.y = y.untyped_data();
  buffers.topk_weights = topk_weights.typed_data();
  buffers.counts = counts.typed_data();
  buffers.row_source = row_source.typed_data();
  buffers.dout = dout.untyped_data();
  buffers.dy = dy->untyped_data();
  buffers.dtopk_weights = dtopk_weights->typed_data();
  return Meet<LowLatencyShape, LowLatencyCombineBuffers>(
      "ll_combine's gradient", {device, run_id, instance, group}, shape, buffers, NoCheck,
      [](const LowLatencyShape& agreed, std::vector<LowLatencyCombineBuffers> ranks,
         Completion finish) {
        LowLatencyCombineGrad(agreed, std::move(ranks), WorkerPool::Global(), std::move(finish));
      },
      EmptyLowLatencyCombineGrad);
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepQuantize, wideep::QuantizeImpl,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()  // x [tokens, hidden]
                                  .Ret<xla::ffi::AnyBuffer>()  // q [tokens, hidden], e4m3fn
                                  .Ret<wideep::F32Matrix>());  // scales [tokens, hidden / 128]

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepLowLatencyDispatch, wideep::DispatchImpl,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::DeviceOrdinal>()
        .Ctx<xla::ffi::RunId>()
        .Ctx<xla::ffi::State<wideep::OpInstance>>()
        .Attr<int64_t>("group")
        .Attr<int64_t>("num_experts")
        .Attr<int64_t>("chunk")
        .Attr<bool>("zero_tail")
        .Arg<wideep::I32Scalar>()    // rank
        .Arg<xla::ffi::AnyBuffer>()  // payload [tokens, hidden]
        .Arg<wideep::F32Matrix>()    // scales [tokens, hidden / 128], or empty
        .Arg<wideep::I32Matrix>()    // topk_idx [tokens, k]
        .Ret<xla::ffi::AnyBuffer>()  // rows [local_experts, ranks * chunk, hidden]
        .Ret<wideep::F32Cube>()      // row_scales, or empty
        .Ret<wideep::I32Vector>()    // counts [local_experts]
        .Ret<wideep::I32Matrix>());  // row_source [local_experts, ranks * chunk]

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepLowLatencyCombine, wideep::CombineImpl,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::DeviceOrdinal>()
        .Ctx<xla::ffi::RunId>()
        .Ctx<xla::ffi::State<wideep::OpInstance>>()
        .Attr<int64_t>("group")
        .Attr<int64_t>("num_experts")
        .Attr<int64_t>("chunk")
        .Arg<xla::ffi::AnyBuffer>()    // y [local_experts, ranks * chunk, hidden]
        .Arg<wideep::F32Matrix>()      // topk_weights [tokens, k]
        .Arg<wideep::I32Vector>()      // counts
        .Arg<wideep::I32Matrix>()      // row_source
        .Ret<xla::ffi::AnyBuffer>());  // out [tokens, hidden]

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    WideepLowLatencyCombineGrad, wideep::CombineGradImpl,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::DeviceOrdinal>()
        .Ctx<xla::ffi::RunId>()
        .Ctx<xla::ffi::State<wideep::OpInstance>>()
        .Attr<int64_t>("group")
        .Attr<int64_t>("num_experts")
        .Attr<int64_t>("chunk")
        .Attr<bool>("zero_tail")
        .Arg<xla::ffi::AnyBuffer>()  // dout [tokens, hidden]
        .Arg<xla::ffi::AnyBuffer>()  // y [local_experts, ranks * chunk, hidden]
        .Arg<wideep::F32Matrix>()    // topk_weights [tokens, k]
        .Arg<wideep::I32Vector>()    // counts
        .Arg<wideep::I32Matrix>()    // row_source
        .Ret<xla::ffi::AnyBuffer>()  // dy
        .Ret<wideep::F32Matrix>());  // dtopk_weights
