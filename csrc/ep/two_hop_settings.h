// One rank of a group over nodes.
#pragma once

#include <cstdint>

#include "csrc/ep/two_hop.h"
#include "csrc/ep/two_hop_config.h"

namespace wideep {

struct TwoHopSettings {
  two_hop::GroupShape shape;
  int rank = 0;
  /// Registered and zeroed, two_hop::MemoryBytes, at the same place on every rank.
  char* memory = nullptr;
  int64_t memory_bytes = 0;
};

}  // namespace wideep
