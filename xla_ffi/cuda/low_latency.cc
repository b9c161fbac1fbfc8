// Handlers of the low-latency shape: dispatch, combine and combine's backward pass, and the halves
// of the first two. A half's ticket says which call it belongs to.
#include "csrc/ep/low_latency_relayed.h"
#include "csrc/ep/row_kernels.h"
#include "xla_ffi/cuda/exchange.h"
#include "xla_ffi/cuda/handlers.h"

namespace wideep {
namespace {

using F32Cube = ffi::BufferR3<ffi::F32>;
using Ticket = ffi::BufferR1<ffi::U32>;

/// What every op of the shape is told, and the rank it runs on.
struct LowLatencyOp {
  const char* name;
  int64_t group;
  int64_t num_experts;
  int64_t chunk;
  std::shared_ptr<const PeerRank> rank;

  int64_t local_experts() const { return num_experts / rank->context.num_ranks; }
  int64_t rows_per_expert() const { return rank->context.num_ranks * chunk; }

  Status Find(int32_t device) {
    Status status = PeerGroups::Global().Find(name, group, device, rank);
    if (!status.ok()) return status;
    const ArenaLayout& layout = rank->context.layout;
    if (num_experts == layout.num_experts && chunk == layout.low_latency.chunk) return Status();
    return Status::InvalidArgument(std::string(name) + ": the ExpertGroup was made for " +
                                   std::to_string(layout.num_experts) + " experts and chunk " +
                                   std::to_string(layout.low_latency.chunk) + ", got " +
                                   std::to_string(num_experts) + " and " + std::to_string(chunk));
  }
  Status WrongRows(const char* array, const ffi::AnyBuffer& got) const {
    return Status::InvalidArgument(std::string(name) + ": " + array +
                                   " must be rows of bfloat16, float16 or float32, got " +
                                   ShapeOf(got));
  }
  LowLatencyTokens Tokens(int64_t num_tokens, int64_t top_k, int64_t hidden) const {
    return {num_tokens, static_cast<int32_t>(top_k), static_cast<int32_t>(num_experts), hidden};
  }
};

/// The type of rows that are computed with, if they are `rank_of_array`-dimensional.
std::optional<DType> FloatRows(const ffi::AnyBuffer& buffer, size_t rank_of_array) {
  const std::optional<DType> dtype = RowDType(buffer.element_type());
  if (!dtype || *dtype == DType::kF8E4M3 || buffer.dimensions().size() != rank_of_array) {
    return std::nullopt;
  }
  return dtype;
}

/// Checks and fills in what a receiving dispatch returns.
Status SetRows(const LowLatencyOp& op, ffi::AnyBuffer& rows, F32Cube& row_scales, I32Vector& counts,
               I32Matrix& row_source, bool quantize, LowLatencyDispatchParams& p) {
  const std::optional<DType> rows_dtype = RowDType(rows.element_type());
  if (!rows_dtype || rows.dimensions().size() != 3) return op.WrongRows("rows", rows);
  const bool fp8 = *rows_dtype == DType::kF8E4M3;
  const int64_t hidden = rows.dimensions()[2];
  const int64_t experts = op.local_experts();
  const int64_t expert_rows = op.rows_per_expert();
  Status status =
      CheckShapes(op.name, {{"rows", rows.dimensions(), {experts, expert_rows, hidden}},
                            {"counts", counts.dimensions(), {experts}},
                            {"row_source", row_source.dimensions(), {experts, expert_rows}}});
  if (status.ok() && fp8) {
    status = CheckShapes(
        op.name,
        {{"scales", row_scales.dimensions(), {experts, expert_rows, hidden / kQuantBlock}}});
  }
  if (!status.ok()) return status;
  if (fp8 && !quantize) return op.WrongRows("x", rows);
  p.dtype = fp8 ? DType::kBF16 : *rows_dtype;
  p.quantize = quantize;
  p.dequantize = !fp8;
  p.rows = static_cast<char*>(rows.untyped_data());
  p.row_scales = fp8 ? row_scales.typed_data() : nullptr;
  p.counts = counts.typed_data();
  p.row_source = row_source.typed_data();
  return Status();
}

/// Checks and fills in what a sending dispatch takes.
Status SetTokens(const LowLatencyOp& op, const ffi::AnyBuffer& x, const I32Matrix& topk_idx,
                 LowLatencyDispatchParams& p) {
  const std::optional<DType> dtype = FloatRows(x, 2);
  if (!dtype) return op.WrongRows("x", x);
  const int64_t num_tokens = topk_idx.dimensions()[0];
  const int64_t hidden = x.dimensions()[1];
  p.dtype = *dtype;
  p.tokens = op.Tokens(num_tokens, topk_idx.dimensions()[1], hidden);
  p.x = static_cast<const char*>(x.untyped_data());
  p.topk_idx = topk_idx.typed_data();
  return CheckShapes(op.name, {{"x", x.dimensions(), {num_tokens, hidden}}});
}

ffi::Error DispatchImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                        int64_t chunk, bool zero_tail, bool quantize, ffi::AnyBuffer x, F32Matrix,
                        I32Matrix topk_idx, ffi::Result<ffi::AnyBuffer> rows,
                        ffi::Result<F32Cube> row_scales, ffi::Result<I32Vector> counts,
                        ffi::Result<I32Matrix> row_source) {
  LowLatencyOp op{"ll_dispatch", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  LowLatencyDispatchParams p;
  if (status.ok()) {
    status = SetRows(op, *rows, *row_scales, *counts, *row_source, quantize, p);
  }
  const DType rows_dtype = p.dtype;
  if (status.ok()) status = SetTokens(op, x, topk_idx, p);
  if (status.ok() && p.dequantize && rows_dtype != p.dtype) status = op.WrongRows("rows", *rows);
  if (!status.ok()) return ToFfiError(status);
  p.peers = op.rank->context;
  p.zero_tail = zero_tail;
  return ToFfiError(LaunchRelayedDispatch(op.rank->across.relay.get(), p, stream));
}

ffi::Error DispatchSendImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                            int64_t chunk, bool quantize, ffi::AnyBuffer x, I32Matrix topk_idx,
                            ffi::Result<Ticket> ticket) {
  LowLatencyOp op{"ll_dispatch_send", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  LowLatencyDispatchParams p;
  if (status.ok()) status = SetTokens(op, x, topk_idx, p);
  if (!status.ok()) return ToFfiError(status);
  p.peers = op.rank->context;
  p.part = LowLatencyPart::kSend;
  p.quantize = quantize;
  p.ticket = ticket->typed_data();
  return ToFfiError(LaunchRelayedDispatch(op.rank->across.relay.get(), p, stream));
}

ffi::Error DispatchRecvImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                            int64_t chunk, bool zero_tail, bool quantize, Ticket ticket,
                            I32Matrix topk_idx, ffi::Result<ffi::AnyBuffer> rows,
                            ffi::Result<F32Cube> row_scales, ffi::Result<I32Vector> counts,
                            ffi::Result<I32Matrix> row_source) {
  LowLatencyOp op{"ll_dispatch_recv", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  LowLatencyDispatchParams p;
  if (status.ok()) {
    status = SetRows(op, *rows, *row_scales, *counts, *row_source, quantize, p);
  }
  if (!status.ok()) return ToFfiError(status);
  p.tokens = op.Tokens(topk_idx.dimensions()[0], topk_idx.dimensions()[1], rows->dimensions()[2]);
  p.peers = op.rank->context;
  p.part = LowLatencyPart::kReceive;
  p.zero_tail = zero_tail;
  p.ticket = ticket.typed_data();
  return ToFfiError(LaunchRelayedDispatch(op.rank->across.relay.get(), p, stream));
}

/// Checks and fills in what a sending combine takes.
Status SetOutputs(const LowLatencyOp& op, const ffi::AnyBuffer& y, const I32Vector& counts,
                  const I32Matrix& row_source, LowLatencyCombineParams& p) {
  const std::optional<DType> dtype = FloatRows(y, 3);
  if (!dtype) return op.WrongRows("y", y);
  p.dtype = *dtype;
  p.y = static_cast<const char*>(y.untyped_data());
  p.counts = counts.typed_data();
  p.row_source = row_source.typed_data();
  const int64_t experts = op.local_experts();
  const int64_t expert_rows = op.rows_per_expert();
  return CheckShapes(op.name, {{"y", y.dimensions(), {experts, expert_rows, y.dimensions()[2]}},
                               {"counts", counts.dimensions(), {experts}},
                               {"row_source", row_source.dimensions(), {experts, expert_rows}}});
}

/// Checks and fills in what a receiving combine takes and returns.
Status SetHome(const LowLatencyOp& op, const F32Matrix& topk_weights, const I32Matrix& topk_idx,
               ffi::AnyBuffer& out, LowLatencyCombineParams& p) {
  const std::optional<DType> dtype = FloatRows(out, 2);
  if (!dtype) return op.WrongRows("out", out);
  const int64_t num_tokens = topk_idx.dimensions()[0];
  const int64_t top_k = topk_idx.dimensions()[1];
  const int64_t hidden = out.dimensions()[1];
  p.dtype = *dtype;
  p.tokens = op.Tokens(num_tokens, top_k, hidden);
  p.topk_idx = topk_idx.typed_data();
  p.topk_weights = topk_weights.typed_data();
  p.out = static_cast<char*>(out.untyped_data());
  return CheckShapes(op.name, {{"topk_weights", topk_weights.dimensions(), {num_tokens, top_k}},
                               {"out", out.dimensions(), {num_tokens, hidden}}});
}

ffi::Error CombineImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                       int64_t chunk, ffi::AnyBuffer y, F32Matrix topk_weights, I32Vector counts,
                       I32Matrix row_source, I32Matrix topk_idx, ffi::Result<ffi::AnyBuffer> out) {
  LowLatencyOp op{"ll_combine", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  LowLatencyCombineParams p;
  if (status.ok()) status = SetOutputs(op, y, counts, row_source, p);
  const DType y_dtype = p.dtype;
  if (status.ok()) status = SetHome(op, topk_weights, topk_idx, *out, p);
  if (status.ok() && (y_dtype != p.dtype || y.dimensions()[2] != p.tokens.hidden)) {
    status = op.WrongRows("out", *out);
  }
  if (!status.ok()) return ToFfiError(status);
  p.peers = op.rank->context;
  return ToFfiError(LaunchRelayedCombine(op.rank->across.relay.get(), p, stream));
}

ffi::Error CombineSendImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                           int64_t chunk, ffi::AnyBuffer y, I32Vector counts, I32Matrix row_source,
                           I32Matrix topk_idx, ffi::Result<Ticket> ticket) {
  LowLatencyOp op{"ll_combine_send", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  LowLatencyCombineParams p;
  if (status.ok()) status = SetOutputs(op, y, counts, row_source, p);
  if (!status.ok()) return ToFfiError(status);
  p.tokens = op.Tokens(topk_idx.dimensions()[0], topk_idx.dimensions()[1], y.dimensions()[2]);
  p.peers = op.rank->context;
  p.part = LowLatencyPart::kSend;
  p.ticket = ticket->typed_data();
  return ToFfiError(LaunchRelayedCombine(op.rank->across.relay.get(), p, stream));
}

ffi::Error CombineRecvImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                           int64_t chunk, Ticket ticket, F32Matrix topk_weights, I32Matrix topk_idx,
                           ffi::Result<ffi::AnyBuffer> out) {
  LowLatencyOp op{"ll_combine_recv", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  LowLatencyCombineParams p;
  if (status.ok()) status = SetHome(op, topk_weights, topk_idx, *out, p);
  if (!status.ok()) return ToFfiError(status);
  p.peers = op.rank->context;
  p.part = LowLatencyPart::kReceive;
  p.ticket = ticket.typed_data();
  return ToFfiError(LaunchRelayedCombine(op.rank->across.relay.get(), p, stream));
}

ffi::Error CombineGradImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                           int64_t chunk, bool zero_tail, ffi::AnyBuffer dout, ffi::AnyBuffer y,
                           F32Matrix topk_weights, I32Vector counts, I32Matrix row_source,
                           I32Matrix topk_idx, ffi::Result<ffi::AnyBuffer> dy,
                           ffi::Result<F32Matrix> dtopk_weights) {
  LowLatencyOp op{"ll_combine's gradient", group, num_experts, chunk, nullptr};
  Status status = op.Find(device);
  if (!status.ok()) return ToFfiError(status);
  const std::optional<DType> dtype = FloatRows(dout, 2);
  if (!dtype || y.element_type() != dout.element_type() ||
      dy->element_type() != dout.element_type()) {
    return ToFfiError(op.WrongRows("dout", dout));
  }
  const int64_t hidden = dout.dimensions()[1];
  LowLatencyCombineGradParams p;
  p.peers = op.rank->context;
  p.tokens = op.Tokens(topk_idx.dimensions()[0], topk_idx.dimensions()[1], hidden);
  p.dtype = *dtype;
  p.zero_tail = zero_tail;
  const int64_t experts = op.local_experts();
  const int64_t expert_rows = op.rows_per_expert();
  const auto top_k = int64_t{p.tokens.top_k};
  status = CheckShapes(
      op.name, {{"dout", dout.dimensions(), {p.tokens.num_tokens, hidden}},
                {"y", y.dimensions(), {experts, expert_rows, hidden}},
                {"counts", counts.dimensions(), {experts}},
                {"row_source", row_source.dimensions(), {experts, expert_rows}},
                {"topk_weights", topk_weights.dimensions(), {p.tokens.num_tokens, top_k}},
                {"dy", dy->dimensions(), {experts, expert_rows, hidden}},
                {"dtopk_weights", dtopk_weights->dimensions(), {p.tokens.num_tokens, top_k}}});
  if (!status.ok()) return ToFfiError(status);
  p.dout = static_cast<const char*>(dout.untyped_data());
  p.y = static_cast<const char*>(y.untyped_data());
  p.topk_idx = topk_idx.typed_data();
  p.topk_weights = topk_weights.typed_data();
  p.counts = counts.typed_data();
  p.dy = static_cast<char*>(dy->untyped_data());
  p.dtopk_weights = dtopk_weights->typed_data();
  return ToFfiError(LaunchRelayedCombineGrad(op.rank->across.relay.get(), p, stream));
}

/// What every handler of the shape takes first.
auto BindLowLatency() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Attr<int64_t>("group")
      .Attr<int64_t>("num_experts")
      .Attr<int64_t>("chunk");
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyDispatch, wideep::DispatchImpl,
                              wideep::BindLowLatency()
                                  .Attr<bool>("zero_tail")
                                  .Attr<bool>("quantize")
                                  .Arg<xla::ffi::AnyBuffer>()  // x [tokens, hidden]
                                  .Arg<wideep::F32Matrix>()    // scales: empty
                                  .Arg<wideep::I32Matrix>()    // topk_idx [tokens, k]
                                  // rows [local_experts, ranks * chunk, hidden]
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<wideep::F32Cube>()     // row_scales, or empty
                                  .Ret<wideep::I32Vector>()   // counts [local_experts]
                                  .Ret<wideep::I32Matrix>(),  // row_source
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyDispatchSend, wideep::DispatchSendImpl,
                              wideep::BindLowLatency()
                                  .Attr<bool>("quantize")
                                  .Arg<xla::ffi::AnyBuffer>()  // x [tokens, hidden]
                                  .Arg<wideep::I32Matrix>()    // topk_idx [tokens, k]
                                  .Ret<wideep::Ticket>(),      // ticket [1]
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyDispatchRecv, wideep::DispatchRecvImpl,
                              wideep::BindLowLatency()
                                  .Attr<bool>("zero_tail")
                                  .Attr<bool>("quantize")
                                  .Arg<wideep::Ticket>()     // ticket [1]
                                  .Arg<wideep::I32Matrix>()  // topk_idx, for its shape
                                  // rows [local_experts, ranks * chunk, hidden]
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<wideep::F32Cube>()     // row_scales, or empty
                                  .Ret<wideep::I32Vector>()   // counts [local_experts]
                                  .Ret<wideep::I32Matrix>(),  // row_source
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyCombine, wideep::CombineImpl,
                              wideep::BindLowLatency()
                                  // y [local_experts, ranks * chunk, hidden]
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<wideep::F32Matrix>()     // topk_weights [tokens, k]
                                  .Arg<wideep::I32Vector>()     // counts [local_experts]
                                  .Arg<wideep::I32Matrix>()     // row_source
                                  .Arg<wideep::I32Matrix>()     // topk_idx [tokens, k]
                                  .Ret<xla::ffi::AnyBuffer>(),  // out [tokens, hidden]
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyCombineSend, wideep::CombineSendImpl,
                              wideep::BindLowLatency()
                                  // y [local_experts, ranks * chunk, hidden]
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<wideep::I32Vector>()  // counts [local_experts]
                                  .Arg<wideep::I32Matrix>()  // row_source
                                  .Arg<wideep::I32Matrix>()  // topk_idx, for its shape
                                  .Ret<wideep::Ticket>(),    // ticket [1]
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyCombineRecv, wideep::CombineRecvImpl,
                              wideep::BindLowLatency()
                                  .Arg<wideep::Ticket>()        // ticket [1]
                                  .Arg<wideep::F32Matrix>()     // topk_weights [tokens, k]
                                  .Arg<wideep::I32Matrix>()     // topk_idx [tokens, k]
                                  .Ret<xla::ffi::AnyBuffer>(),  // out [tokens, hidden]
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepLowLatencyCombineGrad, wideep::CombineGradImpl,
                              wideep::BindLowLatency()
                                  .Attr<bool>("zero_tail")
                                  .Arg<xla::ffi::AnyBuffer>()  // dout [tokens, hidden]
                                  .Arg<xla::ffi::AnyBuffer>()  // y
                                  .Arg<wideep::F32Matrix>()    // topk_weights [tokens, k]
                                  .Arg<wideep::I32Vector>()    // counts [local_experts]
                                  .Arg<wideep::I32Matrix>()    // row_source
                                  .Arg<wideep::I32Matrix>()    // topk_idx [tokens, k]
                                  .Ret<xla::ffi::AnyBuffer>()  // dy
                                  .Ret<wideep::F32Matrix>(),   // dtopk_weights
                              {xla::ffi::Traits::kCmdBufferCompatible});
