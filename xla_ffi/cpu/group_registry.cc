#include "xla_ffi/cpu/group_registry.h"

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

void GroupRegistry::Close(int64_t id) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    groups_.erase(id);
  }
  HostRendezvous::Global().CancelGroup(
      id, Status::FailedPrecondition("the ExpertGroup was closed while an exchange was waiting"));
}

std::shared_ptr<const HostGroup> GroupRegistry::Find(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = groups_.find(id);
  return found == groups_.end() ? nullptr : found->second;
}

}  // namespace wideep
