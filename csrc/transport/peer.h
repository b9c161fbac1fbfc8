// The transport `peer`: ranks of one node whose GPUs reach each other's memory. Each rank owns an
// arena (csrc/core/layout.h) that all peers map, maps their arenas and the memory pools that XLA's
// buffers lie in, and keeps a pinned record of what went wrong.
//
// Made in steps, in all ranks at the same pace: Make, then MapPeer for every other rank, then
// Finish; whoever carries the descriptions between the processes sees to it that no kernel starts
// before every rank has finished.
#pragma once

#include <memory>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/layout.h"
#include "csrc/transport/device_memory.h"

namespace wideep {

/// What a rank tells its peers. Across processes a descriptor goes with each: the arena's first.
struct PeerMemory {
  MemoryRange arena;
  std::vector<MemoryRange> regions;
};

class PeerGroup {
 public:
  struct Settings {
    int device = 0;  // of this process, as the CUDA runtime numbers them
    int rank = 0;
    ArenaConfig arena{};
    bool spans_processes = false;
    /// Zeroed memory of another transport, which keeps it; null: the group allocates its own, and
    /// its peers map it.
    char* arena_memory = nullptr;
  };

  /// Allocates arena and record. `pool_pointers`: buffers of XLA's; the allocations that hold them
  /// become the regions that peers map. One that cannot be exported is left out: buffers in it
  /// travel through the rings.
  static Status Make(const Settings& settings, const std::vector<const void*>& pool_pointers,
                     std::unique_ptr<PeerGroup>& out);
  ~PeerGroup();
  PeerGroup(const PeerGroup&) = delete;
  PeerGroup& operator=(const PeerGroup&) = delete;

  const PeerMemory& memory() const { return memory_; }
  /// Of its own arena and the regions, in order; the caller's to close. Empty within one process.
  std::vector<int> TakeDescriptors();

  /// A rank of another process; the descriptors stay the caller's.
  Status MapPeer(int rank, const PeerMemory& memory, const std::vector<int>& descriptors);
  /// A rank of this process.
  Status MapPeer(int rank, const PeerGroup& peer);
  /// Where this rank writes to the arena of a rank, if another transport has it: MapPeer then maps
  /// the regions. `mirror`: memory of this rank's own, from which a relay sends to a rank on
  /// another node.
  void SetArena(int rank, char* here, bool mirror) {
    table_.arena[rank] = here;
    if (mirror) mirrors_ |= 1u << rank;
  }
  /// Tells this rank's kernels where everything lies. Every peer has been mapped.
  Status Finish();

  int device() const { return settings_.device; }
  int rank() const { return settings_.rank; }
  /// A bit for each rank whose arena this one can address.
  uint32_t node_ranks() const { return ~mirrors_; }
  const ArenaLayout& layout() const { return layout_; }
  char* arena() const {
    return settings_.arena_memory != nullptr ? settings_.arena_memory : arena_.data();
  }
  /// The record as kernels see it.
  ErrorRecord* device_record() const { return device_record_; }
  /// Whether this rank has given up, and what it left.
  bool Failed(ErrorRecord& record) const;
  /// Masks the ranks whose bit is set in `masked`, takes back the others, and forgets errors and
  /// everything under way, in mirrors too. Collective among the ranks that are not masked: none of
  /// them runs a kernel of the group from before the first Reset until after the last one.
  Status Reset(uint32_t masked);
  /// Until no kernel of this process uses the device.
  void WaitForDevice() const;

 private:
  explicit PeerGroup(const Settings& settings) : settings_(settings), layout_(settings.arena) {}

  Settings settings_;
  ArenaLayout layout_;
  DeviceMemory arena_;
  PeerMemory memory_;
  std::vector<FileDescriptor> descriptors_;
  std::vector<DeviceMemory> mapped_;
  PeerTable table_{};
  uint32_t mirrors_ = 0;  // bit r: table_.arena[r] is a mirror
  ErrorRecord* record_ = nullptr;
  ErrorRecord* device_record_ = nullptr;
};

}  // namespace wideep
