#include "csrc/transport/peer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace wideep {
namespace {

Status Runtime(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string("peer transport: ") + what + ": " +
                          cudaGetErrorString(error));
}

Status OfRank(int rank, const char* what, const Status& status) {
  return status.ok() ? status
                     : Status(status.code(), "peer transport: " + std::string(what) + " of rank " +
                                                 std::to_string(rank) + ": " + status.message());
}

}  // namespace

Status PeerGroup::Make(const Settings& settings, const std::vector<const void*>& pool_pointers,
                       std::unique_ptr<PeerGroup>& out) {
  const int num_ranks = settings.arena.num_ranks;
  if (num_ranks < 1 || num_ranks > kMaxRanks || settings.rank < 0 || settings.rank >= num_ranks) {
    return Status::InvalidArgument("peer transport: expected 1 to " + std::to_string(kMaxRanks) +
                                   " ranks, got rank " + std::to_string(settings.rank) + " of " +
                                   std::to_string(num_ranks));
  }
  const DeviceScope scope(settings.device);
  if (!scope.status().ok()) return scope.status();
  std::unique_ptr<PeerGroup> group(new PeerGroup(settings));
  Status status;
  if (settings.arena_memory == nullptr) {
    status =
        DeviceMemory::Allocate(settings.device, static_cast<uint64_t>(group->layout_.num_bytes),
                               settings.spans_processes, group->arena_);
    if (!status.ok()) return OfRank(settings.rank, "arena", status);
  }

  void* record = nullptr;
  status = Runtime("cudaHostAlloc", cudaHostAlloc(&record, sizeof(ErrorRecord),
                                                  cudaHostAllocMapped | cudaHostAllocPortable));
  if (!status.ok()) return status;
  std::memset(record, 0, sizeof(ErrorRecord));
  group->record_ = static_cast<ErrorRecord*>(record);
  void* device_record = nullptr;
  status = Runtime("cudaHostGetDevicePointer", cudaHostGetDevicePointer(&device_record, record, 0));
  if (!status.ok()) return status;
  group->device_record_ = static_cast<ErrorRecord*>(device_record);

  PeerMemory& memory = group->memory_;
  memory.arena = group->arena_.range();
  if (settings.spans_processes && settings.arena_memory == nullptr) {
    status = DeviceMemory::Export(memory.arena.base, group->descriptors_.emplace_back());
    if (!status.ok()) return OfRank(settings.rank, "arena", status);
  }
  for (const void* pointer : pool_pointers) {
    if (memory.regions.size() == kMaxRegions) break;
    MemoryRange range;
    if (!DeviceMemory::RangeOf(pointer, range).ok()) continue;
    const bool known = std::any_of(memory.regions.begin(), memory.regions.end(),
                                   [&](const MemoryRange& r) { return r.base == range.base; });
    if (known) continue;
    if (settings.spans_processes) {
      FileDescriptor descriptor;
      if (!DeviceMemory::Export(range.base, descriptor).ok()) continue;
      group->descriptors_.push_back(std::move(descriptor));
    }
    memory.regions.push_back(range);
  }

  PeerTable& table = group->table_;
  table.arena[settings.rank] = group->arena();
  table.num_regions[settings.rank] = static_cast<int32_t>(memory.regions.size());
  for (size_t i = 0; i < memory.regions.size(); ++i) {
    const MemoryRange& range = memory.regions[i];
    table.regions[settings.rank][i] = {range.base, range.num_bytes,
                                       reinterpret_cast<char*>(range.base)};
  }
  out = std::move(group);
  return Status();
}

PeerGroup::~PeerGroup() {
  const DeviceScope scope(settings_.device);
  WaitForDevice();
  mapped_.clear();
  arena_ = DeviceMemory();
  if (record_ != nullptr) cudaFreeHost(record_);
}

std::vector<int> PeerGroup::TakeDescriptors() {
  std::vector<int> numbers;
  for (FileDescriptor& descriptor : descriptors_) numbers.push_back(descriptor.Release());
  descriptors_.clear();
  return numbers;
}

Status PeerGroup::MapPeer(int rank, const PeerMemory& memory, const std::vector<int>& descriptors) {
  const size_t first = settings_.arena_memory == nullptr ? 1 : 0;  // descriptor of a region
  if (memory.regions.size() > kMaxRegions || descriptors.size() != first + memory.regions.size()) {
    return Status::Internal("peer transport: rank " + std::to_string(rank) + " described " +
                            std::to_string(memory.regions.size()) + " regions and sent " +
                            std::to_string(descriptors.size()) + " descriptors");
  }
  Status status;
  if (first == 1) {
    status = DeviceMemory::Import(settings_.device, descriptors[0], memory.arena.num_bytes,
                                  mapped_.emplace_back());
    if (!status.ok()) return OfRank(rank, "arena", status);
    table_.arena[rank] = mapped_.back().data();
  }
  for (size_t i = 0; i < memory.regions.size(); ++i) {
    const MemoryRange& range = memory.regions[i];
    status = DeviceMemory::Import(settings_.device, descriptors[first + i], range.num_bytes,
                                  mapped_.emplace_back());
    if (!status.ok()) return OfRank(rank, "memory pool", status);
    table_.regions[rank][i] = {range.base, range.num_bytes, mapped_.back().data()};
  }
  table_.num_regions[rank] = static_cast<int32_t>(memory.regions.size());
  return Status();
}

Status PeerGroup::MapPeer(int rank, const PeerGroup& peer) {
  const PeerMemory& memory = peer.memory();
  Status status = DeviceMemory::OfPeerDevice(settings_.device, peer.device(), memory.arena,
                                             mapped_.emplace_back());
  if (!status.ok()) return OfRank(rank, "arena", status);
  table_.arena[rank] = mapped_.back().data();
  for (size_t i = 0; i < memory.regions.size(); ++i) {
    const MemoryRange& range = memory.regions[i];
    status =
        DeviceMemory::OfPeerDevice(settings_.device, peer.device(), range, mapped_.emplace_back());
    if (!status.ok()) return OfRank(rank, "memory pool", status);
    table_.regions[rank][i] = {range.base, range.num_bytes, mapped_.back().data()};
  }
  table_.num_regions[rank] = static_cast<int32_t>(memory.regions.size());
  return Status();
}

Status PeerGroup::Finish() {
  for (int rank = 0; rank < settings_.arena.num_ranks; ++rank) {
    if (table_.arena[rank] == nullptr) {
      return Status::Internal("peer transport: rank " + std::to_string(rank) + " is not mapped");
    }
  }
  const DeviceScope scope(settings_.device);
  if (!scope.status().ok()) return scope.status();
  const Status status = Runtime("peer table", cudaMemcpy(arena() + layout_.peer_table, &table_,
                                                         sizeof(table_), cudaMemcpyHostToDevice));
  if (!status.ok()) return status;
  return Runtime("cudaDeviceSynchronize", cudaDeviceSynchronize());
}

bool PeerGroup::Failed(ErrorRecord& record) const {
  // Acquire: a kernel writes the rest of the record before `failure`.
  if (__atomic_load_n(&record_->failure, __ATOMIC_ACQUIRE) == 0) return false;
  record = *record_;
  return true;
}

Status PeerGroup::Reset(uint32_t masked) {
  const DeviceScope scope(settings_.device);
  if (!scope.status().ok()) return scope.status();
  Control control{};
  control.masked = masked;
  char* const arena = this->arena();
  const int64_t after_table = layout_.after_peer_table();
  Status status = Runtime("reset", cudaDeviceSynchronize());
  if (status.ok()) {
    status = Runtime("reset", cudaMemset(arena + after_table, 0, layout_.num_bytes - after_table));
  }
  for (int rank = 0; rank < settings_.arena.num_ranks && status.ok(); ++rank) {
    if ((mirrors_ >> rank & 1) == 0) continue;
    status = Runtime("reset", cudaMemset(table_.arena[rank], 0, layout_.num_bytes));
  }
  if (status.ok()) {
    status = Runtime("reset", cudaMemcpy(arena + ArenaLayout::kControl, &control, sizeof(control),
                                         cudaMemcpyHostToDevice));
  }
  if (status.ok()) status = Runtime("reset", cudaDeviceSynchronize());
  if (status.ok()) std::memset(record_, 0, sizeof(ErrorRecord));
  return status;
}

void PeerGroup::WaitForDevice() const {
  const DeviceScope scope(settings_.device);
  cudaDeviceSynchronize();
}

}  // namespace wideep
