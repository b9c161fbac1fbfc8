#include "csrc/ep/low_latency_relayed.h"

#include "csrc/ep/quantize.h"

namespace wideep {
namespace {

RelayCall CallOf(Relayed what, const LowLatencyTokens& t, const uint32_t* ticket,
                 int64_t row_bytes) {
  RelayCall call;
  call.what = what;
  call.ticket = ticket;
  call.num_experts = t.num_experts;
  call.num_tokens = t.num_tokens;
  call.top_k = t.top_k;
  call.row_bytes = row_bytes;
  return call;
}

int64_t RowBytes(const LowLatencyTokens& t, DType dtype) {
  return t.hidden * static_cast<int64_t>(SizeOf(dtype));
}

/// Before a kernel that sends: it may wait until the others are done with earlier calls, and they
/// for this rank. After one that received: a rank may have given up in it.
Status SayControl(Relay* relay, cudaStream_t stream) { return relay->Launch(RelayCall{}, stream); }

}  // namespace

Status LaunchRelayedDispatch(Relay* relay, const LowLatencyDispatchParams& params,
                             cudaStream_t stream) {
  if (relay == nullptr) return LaunchLowLatencyDispatch(params, stream);
  LowLatencyDispatchParams p = params;
  if (p.part == LowLatencyPart::kBoth) p.ticket = relay->Ticket(LowLatencyKind::kDispatch);
  Status status;
  if (params.part != LowLatencyPart::kReceive) {
    p.part = LowLatencyPart::kSend;
    const int64_t row_bytes =
        p.quantize ? WireRowBytes(p.tokens.hidden) : RowBytes(p.tokens, p.dtype);
    status = SayControl(relay, stream);
    if (status.ok()) status = LaunchLowLatencyDispatch(p, stream);
    if (status.ok()) {
      status = relay->Launch(CallOf(Relayed::kTokens, p.tokens, p.ticket, row_bytes), stream);
    }
  }
  if (status.ok() && params.part != LowLatencyPart::kSend) {
    p.part = LowLatencyPart::kReceive;
    status = LaunchLowLatencyDispatch(p, stream);
  }
  return status.ok() ? SayControl(relay, stream) : status;
}

Status LaunchRelayedCombine(Relay* relay, const LowLatencyCombineParams& params,
                            cudaStream_t stream) {
  if (relay == nullptr) return LaunchLowLatencyCombine(params, stream);
  LowLatencyCombineParams p = params;
  if (p.part == LowLatencyPart::kBoth) p.ticket = relay->Ticket(LowLatencyKind::kCombine);
  Status status;
  if (params.part != LowLatencyPart::kReceive) {
    p.part = LowLatencyPart::kSend;
    RelayCall call = CallOf(Relayed::kOutputs, p.tokens, p.ticket, RowBytes(p.tokens, p.dtype));
    call.counts = p.counts;
    call.row_source = p.row_source;
    status = SayControl(relay, stream);
    if (status.ok()) status = LaunchLowLatencyCombine(p, stream);
    if (status.ok()) status = relay->Launch(call, stream);
  }
  if (status.ok() && params.part != LowLatencyPart::kSend) {
    p.part = LowLatencyPart::kReceive;
    status = LaunchLowLatencyCombine(p, stream);
  }
  return status.ok() ? SayControl(relay, stream) : status;
}

Status LaunchRelayedCombineGrad(Relay* relay, const LowLatencyCombineGradParams& params,
                                cudaStream_t stream) {
  if (relay == nullptr) return LaunchLowLatencyCombineGrad(params, stream);
  LowLatencyCombineGradParams p = params;
  p.ticket = relay->Ticket(LowLatencyKind::kDispatch);
  const auto call = [&](Relayed what) {
    return CallOf(what, p.tokens, p.ticket, RowBytes(p.tokens, p.dtype));
  };
  Status status = SayControl(relay, stream);
  p.part = CombineGradPart::kSend;
  if (status.ok()) status = LaunchLowLatencyCombineGrad(p, stream);
  if (status.ok()) status = relay->Launch(call(Relayed::kTokens), stream);
  p.part = CombineGradPart::kReceive;
  if (status.ok()) status = LaunchLowLatencyCombineGrad(p, stream);
  if (status.ok()) status = relay->Launch(call(Relayed::kDots), stream);
  p.part = CombineGradPart::kHome;
  if (status.ok()) status = LaunchLowLatencyCombineGrad(p, stream);
  return status.ok() ? SayControl(relay, stream) : status;
}

}  // namespace wideep
