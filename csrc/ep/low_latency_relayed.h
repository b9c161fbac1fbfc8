// Low-latency calls of a group with ranks that have no address here: the halves of a call with a
// relay between them. Without a relay the calls of low_latency.h.
#pragma once

#include "csrc/ep/low_latency.h"
#include "csrc/transport/relay.h"

namespace wideep {

Status LaunchRelayedDispatch(Relay* relay, const LowLatencyDispatchParams& params,
                             cudaStream_t stream);
Status LaunchRelayedCombine(Relay* relay, const LowLatencyCombineParams& params,
                            cudaStream_t stream);
Status LaunchRelayedCombineGrad(Relay* relay, const LowLatencyCombineGradParams& params,
                                cudaStream_t stream);

}  // namespace wideep
