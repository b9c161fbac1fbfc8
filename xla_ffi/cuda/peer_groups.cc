#include "xla_ffi/cuda/peer_groups.h"

namespace wideep {
namespace {

Code CodeOf(Failure failure) {
  switch (failure) {
    case Failure::kIndexRange:
    case Failure::kRepeatedExpert:
    case Failure::kForeignRows:
      return Code::kInvalidArgument;
    case Failure::kOverflow:
      return Code::kOutOfRange;
    case Failure::kNotMapped:
      return Code::kFailedPrecondition;
    case Failure::kDeadline:
    case Failure::kNone:
      break;
  }
  return Code::kDeadlineExceeded;
}

}  // namespace

Status PeerRank::Check() const {
  ErrorRecord record;
  if (!memory->Failed(record)) return Status();
  return {CodeOf(static_cast<Failure>(record.failure)),
          Describe(record, settings.deadline_s, settings.top_k)};
}

PeerGroups& PeerGroups::Global() {
  // Never destroyed: XLA's threads may still look a group up while the process ends.
  static auto* groups = new PeerGroups;
  return *groups;
}

int64_t PeerGroups::Open(const std::vector<std::shared_ptr<PeerGroup>>& ranks,
                         const PeerSettings& settings, const std::vector<AcrossNodes>& across) {
  Ranks by_device;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const std::shared_ptr<PeerGroup>& memory = ranks[i];
    PeerContext context;
    context.arena = memory->arena();
    context.layout = memory->layout();
    context.record = memory->device_record();
    context.deadline_ns = static_cast<uint64_t>(settings.deadline_s * 1e9);
    context.rank = memory->rank();
    context.num_ranks = memory->layout().num_ranks;
    context.num_sms = memory->layout().num_blocks;
    context.zero_copy = settings.zero_copy;
    context.node_ranks = memory->node_ranks();
    by_device[memory->device()] = std::make_shared<const PeerRank>(
        PeerRank{memory, settings, context, i < across.size() ? across[i] : AcrossNodes()});
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  groups_[next_id_] = std::move(by_device);
  return next_id_++;
}

void PeerGroups::Close(int64_t id) {
  Ranks ranks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = groups_.find(id);
    if (found == groups_.end()) return;
    ranks = std::move(found->second);
    groups_.erase(found);
  }
  // Kernels of one device use the memory of the others: all of them end before any is freed.
  for (const auto& [device, rank] : ranks) rank->memory->WaitForDevice();
}

Status PeerGroups::Find(const char* op, int64_t id, int32_t device,
                        std::shared_ptr<const PeerRank>& rank) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto group = groups_.find(id);
    if (group == groups_.end()) {
      return Status::FailedPrecondition(
          std::string(op) +
          ": the ExpertGroup was closed. Keep it open for as long as functions that use it run");
    }
    auto found = group->second.find(device);
    if (found == group->second.end()) {
      return Status::FailedPrecondition(std::string(op) + ": device " + std::to_string(device) +
                                        " is not in the ExpertGroup's mesh. Run the op inside "
                                        "shard_map over the group's own mesh");
    }
    rank = found->second;
  }
  return rank->Check();
}

PeerGroups::Ranks PeerGroups::RanksOf(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto group = groups_.find(id);
  return group == groups_.end() ? Ranks() : group->second;
}

Status PeerGroups::Check(int64_t id) {
  for (const auto& [device, rank] : RanksOf(id)) {
    if (Status status = rank->Check(); !status.ok()) return status;
  }
  return Status();
}

void PeerGroups::Wait(int64_t id) {
  for (const auto& [device, rank] : RanksOf(id)) rank->memory->WaitForDevice();
}

Status PeerGroups::Mask(int64_t id, uint32_t masked) {
  for (const auto& [device, rank] : RanksOf(id)) {
    const DeviceScope scope(device);
    Status status = scope.status();
    if (status.ok()) status = rank->memory->Reset(masked);
    if (status.ok() && rank->across.two_hop != nullptr) {
      status = rank->across.two_hop->Reset(masked);
    }
    if (!status.ok()) return status;
  }
  return Status();
}

Status PeerGroups::Crossed(int64_t id, CrossedNodes& crossed) {
  crossed = {};
  for (const auto& [device, rank] : RanksOf(id)) {
    if (rank->across.two_hop == nullptr) continue;
    const DeviceScope scope(device);
    CrossedNodes of_rank;
    Status status = scope.status();
    if (status.ok()) status = rank->across.two_hop->Crossed(of_rank);
    if (!status.ok()) return status;
    crossed.tokens_out += of_rank.tokens_out;
    crossed.bytes_out += of_rank.bytes_out;
    crossed.tokens_back += of_rank.tokens_back;
    crossed.bytes_back += of_rank.bytes_back;
  }
  return Status();
}

}  // namespace wideep
