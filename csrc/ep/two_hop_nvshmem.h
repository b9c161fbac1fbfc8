// The throughput shape over nodes on the transport `nvshmem`.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/core/layout.h"
#include "csrc/core/status.h"
#include "csrc/ep/two_hop.h"

namespace wideep {

/// Of one rank. Rows cross nodes by NVSHMEM's puts with signals; where stores reach all ranks'
/// memory (virtual nodes of a host), by stores (MappedNet): NVSHMEM's puts have one load of 16
/// bytes a thread under way there.
struct NvshmemTwoHopSettings {
  /// Of it: num_ranks, num_experts, top_k, max_row_bytes, num_sms.
  ArenaConfig arena{};
  int rank = 0;
  std::vector<int> node_of_rank;  // [num_ranks], never falling
  std::vector<int> pe_of_rank;
  /// This rank's arena (the group's), in NVSHMEM's memory.
  char* arena_memory = nullptr;
  /// Zeroed NVSHMEM memory of NvshmemTwoHopBytes, the same on every PE.
  char* ring_memory = nullptr;
  int64_t ring_bytes = 0;
  /// Puts in any case.
  bool only_puts = false;
};
/// Fails, saying what is wrong, for nodes or num_sms that do not do.
Status NvshmemTwoHopBytes(const ArenaConfig& arena, const std::vector<int>& node_of_rank,
                          int64_t& num_bytes);
/// Takes ops once every rank has made its own.
Status MakeNvshmemTwoHop(const NvshmemTwoHopSettings& settings, std::shared_ptr<TwoHop>& out);

}  // namespace wideep
