// The expert groups of this process on the backend "cuda", and how a handler finds its rank.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/ep/peer_context.h"
#include "csrc/ep/two_hop.h"
#include "csrc/transport/peer.h"
#include "csrc/transport/relay.h"

namespace wideep {

/// What the ranks of a group have in common beside the memory's layout.
struct PeerSettings {
  double deadline_s = 0;
  int top_k = 0;
  bool zero_copy = true;
};

/// What carries a rank's exchanges to ranks that have no address here; null: all have one.
struct AcrossNodes {
  std::shared_ptr<Relay> relay;     // low latency
  std::shared_ptr<TwoHop> two_hop;  // throughput
};

/// One rank of a group, on a device of this process; never changes once it is made.
struct PeerRank {
  std::shared_ptr<PeerGroup> memory;
  PeerSettings settings;
  PeerContext context;
  AcrossNodes across;

  /// OK, or what made the rank give up.
  Status Check() const;
};

class PeerGroups {
 public:
  static PeerGroups& Global();

  /// Returns the id of the new group. The ids of a process count up from 1.
  /// `across`: of each of `ranks`; empty: every rank has the addresses of all.
  int64_t Open(const std::vector<std::shared_ptr<PeerGroup>>& ranks, const PeerSettings& settings,
               const std::vector<AcrossNodes>& across = {});
  /// Forgets the group and, once its devices are idle, frees its memory. Unknown ids are ignored.
  void Close(int64_t id);
  /// This process's rank on `device`; fails if the group was closed or a rank of it gave up.
  Status Find(const char* op, int64_t id, int32_t device, std::shared_ptr<const PeerRank>& rank);
  /// The same for all devices: OK, or what made one give up.
  Status Check(int64_t id);
  /// Until no kernel of this process uses the group's devices.
  void Wait(int64_t id);
  /// Masks the ranks whose bit is set, in all groups side by side; see PeerGroup::Reset.
  Status Mask(int64_t id, uint32_t masked);
  /// What this process's ranks have sent between nodes, all together.
  Status Crossed(int64_t id, CrossedNodes& crossed);

 private:
  // By device.
  using Ranks = std::unordered_map<int32_t, std::shared_ptr<const PeerRank>>;

  /// None if the group was closed.
  Ranks RanksOf(int64_t id);

  std::mutex mutex_;
  int64_t next_id_ = 1;
  std::unordered_map<int64_t, Ranks> groups_;
};

}  // namespace wideep
