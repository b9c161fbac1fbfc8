#include "xla_ffi/cpu/group_registry.h"

#include <algorithm>
#include <utility>

#include "csrc/transport/host_rendezvous.h"

namespace wideep {

GroupRegistry& GroupRegistry::Global() {
  static GroupRegistry* const registry = new GroupRegistry();
  return *registry;
}

int64_t GroupRegistry::Add(HostGroup group) {
  std::lock_guard<std::mutex> lock(mutex_);
  groups_[next_id_] = std::make_shared<const HostGroup>(std::move(group));
  return next_id_++;
}

int64_t GroupRegistry::NextSharedId() {
  std::lock_guard<std::mutex> lock(mutex_);
  return next_shared_id_;
}

void GroupRegistry::AddShared(int64_t id, HostGroup group) {
  std::lock_guard<std::mutex> lock(mutex_);
  groups_[id] = std::make_shared<const HostGroup>(std::move(group));
  next_shared_id_ = std::max(next_shared_id_, id + 1);
}

void GroupRegistry::Mask(int64_t id, const std::vector<int>& ranks) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = groups_.find(id);
    if (found == groups_.end()) return;
    HostGroup group = *found->second;
    std::vector<bool> expected(group.num_ranks, true);
    for (const int rank : ranks) expected[rank] = false;
    group.expected = ranks.empty() ? nullptr : std::make_shared<const std::vector<bool>>(expected);
    found->second = std::make_shared<const HostGroup>(std::move(group));
  }
  HostRendezvous::Global().CancelGroup(
      id, Status::FailedPrecondition("ranks were masked while an exchange was waiting. Call "
                                     "mask_ranks between steps, once all results are ready"));
}

void GroupRegistry::Close(int64_t id) {
  std::shared_ptr<const HostGroup> group;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = groups_.find(id);
    if (found == groups_.end()) return;
    group = std::move(found->second);
    groups_.erase(found);
  }
  if (group->peers != nullptr) group->peers->Shutdown();
  HostRendezvous::Global().CancelGroup(
      id, Status::FailedPrecondition("the ExpertGroup was closed while an exchange was waiting"));
}

std::shared_ptr<const HostGroup> GroupRegistry::Find(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = groups_.find(id);
  return found == groups_.end() ? nullptr : found->second;
}

}  // namespace wideep
