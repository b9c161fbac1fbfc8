// A rank of a group, as its kernels see it. Passed by value inside each op's params.
#pragma once

#include <cstdint>

#include "csrc/core/error_record.h"
#include "csrc/core/layout.h"

namespace wideep {

struct PeerContext {
  /// This rank's arena; its peer_table says where the others' are.
  char* arena = nullptr;
  ArenaLayout layout;
  /// In pinned host memory, as the device sees it.
  ErrorRecord* record = nullptr;
  /// How long a wait may take.
  uint64_t deadline_ns = 0;
  int32_t rank = 0;
  int32_t num_ranks = 0;
  /// Bit r: this rank can address rank r's memory. All of a group on one node.
  uint32_t node_ranks = ~0u;
  /// Blocks of a kernel, at most; all ranks' blocks must fit on the GPU together.
  int32_t num_sms = 0;
  /// false: buffers are published as not mapped, so that rows go through the rings.
  bool zero_copy = true;
};

}  // namespace wideep
