// How low-latency calls reach ranks whose memory has no address here. Kernels write to a mirror of
// such a rank's arena in this rank's own memory, as if it were the arena; a relay then sends what
// they wrote over the network. So kernels know nothing of it, and what a network needs anyway, the
// bytes in registered memory, is there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/core/layout.h"
#include "csrc/core/status.h"

namespace wideep {

/// What a relay sends.
enum class Relayed : int32_t {
  kControl,  // which calls this rank is done with, and that a rank gave up
  kTokens,   // what dispatch (or combine's gradient) sent: counts, tokens, flags
  kOutputs,  // what combine sent home
  kDots,     // what combine's gradient sent home
};

/// One call's part for a relay. Which of a kind's calls it is stands in *ticket.
struct RelayCall {
  Relayed what = Relayed::kControl;
  const uint32_t* ticket = nullptr;  // null for kControl
  int32_t num_experts = 0;
  int64_t num_tokens = 0;
  int32_t top_k = 0;
  int64_t row_bytes = 0;                // that travel: of a token, or of an output
  const int32_t* counts = nullptr;      // kOutputs: [local_experts]
  const int32_t* row_source = nullptr;  // kOutputs: [local_experts, num_ranks * chunk]
};

class Relay {
 public:
  virtual ~Relay() = default;
  /// On the stream of the call's kernels, after the one that wrote (before the next one that sends,
  /// for kControl).
  virtual Status Launch(const RelayCall& call, cudaStream_t stream) = 0;
  /// A word of the rank's memory for the tickets of whole calls of a kind.
  virtual uint32_t* Ticket(LowLatencyKind kind) = 0;
};

}  // namespace wideep
