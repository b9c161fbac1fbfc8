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

/// A call in its halves, with the relay between them. `call` describes it, given its ticket.
template <typename Params, typename Call>
Status LaunchHalves(Relay* relay, Params p, LowLatencyKind kind, Call call,
                    Status (*launch)(const Params&, cudaStream_t), cudaStream_t stream) {
  const LowLatencyPart part = p.part;
  if (part == LowLatencyPart::kBoth) p.ticket = relay->Ticket(kind);
  Status status;
  if (part != LowLatencyPart::kReceive) {
    p.part = LowLatencyPart::kSend;
    status = SayControl(relay, stream);
    if (status.ok()) status = launch(p, stream);
    if (status.ok()) status = relay->Launch(call(p.ticket), stream);
  }
  if (status.ok() && part != LowLatencyPart::kSend) {
    p.part = LowLatencyPart::kReceive;
    status = launch(p, stream);
  }
  return status.ok() ? SayControl(relay, stream) : status;
}

}  // namespace

Status LaunchRelayedDispatch(Relay* relay, const LowLatencyDispatchParams& params,
                             cudaStream_t stream) {
  if (relay == nullptr) return LaunchLowLatencyDispatch(params, stream);
  const auto call = [&](const uint32_t* ticket) {
    const int64_t row_bytes = params.quantize ? WireRowBytes(params.tokens.hidden)
                                              : RowBytes(params.tokens, params.dtype);
    return CallOf(Relayed::kTokens, params.tokens, ticket, row_bytes);
  };
  return LaunchHalves(relay, params, LowLatencyKind::kDispatch, call, LaunchLowLatencyDispatch,
                      stream);
}

Status LaunchRelayedCombine(Relay* relay, const LowLatencyCombineParams& params,
                            cudaStream_t stream) {
  if (relay == nullptr) return LaunchLowLatencyCombine(params, stream);
  const auto call = [&](const uint32_t* ticket) {
    RelayCall described =
        CallOf(Relayed::kOutputs, params.tokens, ticket, RowBytes(params.tokens, params.dtype));
    described.counts = params.counts;
    described.row_source = params.row_source;
    return described;
  };
  return LaunchHalves(relay, params, LowLatencyKind::kCombine, call, LaunchLowLatencyCombine,
                      stream);
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
