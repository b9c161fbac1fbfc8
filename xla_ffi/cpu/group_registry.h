// The expert groups of this process: which rank each device is.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace wideep {

/// One group; never changes once it is made.
struct HostGroup {
  struct Place {
    int32_t subgroup;  // several groups side by side exchange separately
    int32_t rank;
  };
  int num_ranks;
  std::chrono::milliseconds deadline;
  std::unordered_map<int64_t, Place> place_of_device;  // by JAX device id
};

class GroupRegistry {
 public:
  static GroupRegistry& Global();

  /// Returns the id of the new group. The ids of a process count up from 1.
  int64_t Add(HostGroup group);
  /// Forgets the group and fails its exchanges that are still waiting. Unknown ids are ignored.
  void Close(int64_t id);
  /// Null if the group was closed.
  std::shared_ptr<const HostGroup> Find(int64_t id);

 private:
  std::mutex mutex_;
  int64_t next_id_ = 1;
  std::unordered_map<int64_t, std::shared_ptr<const HostGroup>> groups_;
};

}  // namespace wideep
