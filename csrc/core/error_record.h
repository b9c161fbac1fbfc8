// What a kernel leaves behind when it gives up: nothing traps, nothing waits for ever.
//
// The first thread of a rank that fails writes the rank's record, which lies in pinned host memory,
// and raises the abort word in every peer's arena. Everyone who waits sees the word and drains.
// The host reads the record before the next launch and raises it in Python on every rank.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/core/layout.h"

namespace wideep {

enum class ExchangeOp : uint32_t {
  kNone,
  kPlan,
  kDispatch,
  kDispatchGrad,
  kCombine,
  kCombineGrad,
  kLowLatencyDispatch,
  kLowLatencyCombine,
  kLowLatencyCombineGrad,
};

/// What was waited for.
enum class Phase : uint32_t {
  kNone,
  kPublished,  // a peer's buffers
  kCounts,     // a peer's counts
  kAccepted,   // a peer's counts after capacity
  kBlocks,     // this rank's own blocks
  kRingTail,   // a peer to put a token into a ring
  kRingHead,   // a peer to take a token out of a ring
  kDone,       // a peer to be done with this rank's buffers
  kRegion,     // a peer's low-latency region
  kSlots,      // a peer's low-latency combine slots
  kSums,       // a peer's sums of its rows
};

enum class Failure : uint32_t {
  kNone,
  kDeadline,        // `peer` did not come within the deadline
  kIndexRange,      // topk_idx out of range: `got` at selection `expected`
  kRepeatedExpert,  // an expert twice in a token: `got` at selection `expected`
  kOverflow,        // rows above the capacity: `got` wanted, `expected` the capacity
  kForeignRows,     // recv of another call: row_source or counts hold `got`, not below `expected`
  kNotMapped,       // buffers of a rank have no address at the others of its node
};

struct ErrorRecord {
  uint32_t failure;  // a Failure; written last
  uint32_t op;
  uint32_t phase;
  int32_t rank;      // whose record this is
  int32_t reporter;  // the rank that gave up; where it is another one, got and expected are unknown
  int32_t peer;
  uint32_t epoch;
  uint32_t pad;
  uint64_t expected;
  uint64_t got;
};

/// What a rank that gives up tells its peers, in one word.
struct AbortWord {
  WIDEEP_HOST_DEVICE static constexpr uint32_t Pack(Failure failure, int reporter, int peer,
                                                    ExchangeOp op, Phase phase) {
    return 1u << 31 | static_cast<uint32_t>(failure) << 24 | static_cast<uint32_t>(reporter) << 16 |
           static_cast<uint32_t>(peer & 0xff) << 8 | static_cast<uint32_t>(op) << 4 |
           static_cast<uint32_t>(phase);
  }
  WIDEEP_HOST_DEVICE static constexpr int Reporter(uint32_t word) { return word >> 16 & 0xff; }
  WIDEEP_HOST_DEVICE static constexpr int Peer(uint32_t word) { return word >> 8 & 0xff; }
  WIDEEP_HOST_DEVICE static constexpr uint32_t Op(uint32_t word) { return word >> 4 & 0xf; }
  WIDEEP_HOST_DEVICE static constexpr uint32_t PhaseOf(uint32_t word) { return word & 0xf; }
  WIDEEP_HOST_DEVICE static constexpr uint32_t FailureOf(uint32_t word) {
    return word >> 24 & 0x7f;
  }
};

/// In plain words, with what to do.
std::string Describe(const ErrorRecord& record, double deadline_s, int top_k);

}  // namespace wideep
