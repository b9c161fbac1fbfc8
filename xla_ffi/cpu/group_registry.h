// The expert groups of this process: which rank each device is.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "csrc/transport/host_peers.h"

namespace wideep {

/// One group; never changes once it is made, but is replaced when its mask changes.
struct HostGroup {
  struct Place {
    int32_t subgroup;  // several groups side by side exchange separately
    int32_t rank;
  };
  int num_ranks;
  std::chrono::milliseconds deadline;
  std::unordered_map<int64_t, Place> place_of_device;  // by JAX device id; of this process
  std::shared_ptr<const std::vector<bool>> expected;   // by rank: not masked; null: all of them

  // Where ranks are in several processes:
  int process = 0;
  std::shared_ptr<HostPeers> peers;
  // By subgroup, then rank; of the subgroups that span processes.
  std::unordered_map<int32_t, std::shared_ptr<const std::vector<int>>> process_of_rank;
};

class GroupRegistry {
 public:
  static GroupRegistry& Global();

  /// Returns the id of the new group. The ids of groups of this process count up from 1, never to
  /// be used again.
  int64_t Add(HostGroup group);
  /// Ids of groups that span processes are the same in all of them, since they are part of the
  /// compiled program: the processes agree on the largest of what this gives.
  int64_t NextSharedId();
  void AddShared(int64_t id, HostGroup group);
  /// Leaves out these ranks, in all groups side by side, takes back the others, and fails exchanges
  /// that are still waiting. Unknown ids are ignored.
  void Mask(int64_t id, const std::vector<int>& ranks);
  /// Forgets the group and fails its exchanges that are still waiting. Unknown ids are ignored.
  void Close(int64_t id);
  /// Null if the group was closed.
  std::shared_ptr<const HostGroup> Find(int64_t id);

 private:
  std::mutex mutex_;
  int64_t next_id_ = 1;
  int64_t next_shared_id_ = int64_t{1} << 32;
  std::unordered_map<int64_t, std::shared_ptr<const HostGroup>> groups_;
};

}  // namespace wideep
