// The transport `nvshmem`: memory that all ranks of a job can reach, over NVLink or a network.
//
// One process has one GPU and is one PE. NVSHMEM is started once in a process, for all groups; what
// a group takes of its memory it keeps until the process ends, since freeing is collective and
// groups are closed at any time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/core/layout.h"
#include "csrc/core/status.h"
#include "csrc/transport/relay.h"

namespace wideep {

class Nvshmem {
 public:
  /// "3.4.5": of the library that is loaded.
  static std::string Version();
  /// What one process makes and all others need to join it.
  static Status UniqueId(std::string& id);
  /// Joins, as `pe` of `num_pes`; all processes at once. Fails if this process is already a PE of
  /// another job, saying which.
  static Status Start(int device, int pe, int num_pes, const std::string& id);

  /// Zeroed memory, at the same place on every PE; collective, and the same size everywhere.
  static Status Allocate(int device, int64_t num_bytes, char*& out);
  /// `memory` of this PE as it lies on `pe`, if that can be reached by loads and stores; otherwise
  /// null.
  static char* PointerTo(const char* memory, int pe);
};

/// A relay by NVSHMEM's puts: data, fence, signals.
struct NvshmemRelaySettings {
  ArenaConfig arena{};
  int rank = 0;
  char* arena_memory = nullptr;
  /// [num_ranks] mirrors of the arenas that have no address here; null: the rank has one.
  std::vector<char*> mirrors;
  std::vector<int> pe_of_rank;
  int num_blocks = 1;
  /// Two words of NVSHMEM's memory.
  uint32_t* tickets = nullptr;
};
Status MakeNvshmemRelay(const NvshmemRelaySettings& settings, std::shared_ptr<Relay>& out);

}  // namespace wideep
