#include "csrc/transport/host_arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

namespace wideep {
namespace {

// Since Linux 5.1; older headers lack it.
constexpr int kSealFutureWrite = 0x0010;

Status SystemError(const char* what) {
  return Status::FailedPrecondition(std::string("shared memory: ") + what + ": " +
                                    std::strerror(errno));
}

}  // namespace

Status Mapping::Map(int descriptor, size_t bytes, bool writable,
                    std::unique_ptr<Mapping>& mapping) {
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  void* data = mmap(nullptr, bytes, protection, MAP_SHARED | MAP_NORESERVE, descriptor, 0);
  if (data == MAP_FAILED) return SystemError("mmap");
  madvise(data, bytes, MADV_DONTDUMP);
  mapping.reset(new Mapping(static_cast<char*>(data), bytes));
  return Status();
}

Mapping::~Mapping() { munmap(data_, bytes_); }

Status HostArena::Make(std::unique_ptr<HostArena>& arena, size_t bytes) {
  const int descriptor = memfd_create("jax_wideep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) return SystemError("memfd_create");
  std::unique_ptr<Mapping> mapping;
  Status status;
  if (fchmod(descriptor, 0600) != 0) status = SystemError("fchmod");
  if (status.ok() && ftruncate(descriptor, static_cast<off_t>(bytes)) != 0)
    status = SystemError("ftruncate");
  if (status.ok()) status = Mapping::Map(descriptor, bytes, /*writable=*/true, mapping);
  // Nobody can make a page vanish under a reader; a kernel without the last seal leaves peers,
  // which are processes of the same user, able to write.
  if (status.ok() && fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
    status = SystemError("F_ADD_SEALS");
  if (status.ok()) fcntl(descriptor, F_ADD_SEALS, kSealFutureWrite);
  if (!status.ok()) {
    close(descriptor);
    return status;
  }
  arena.reset(new HostArena(descriptor, std::move(mapping)));
  return status;
}

HostArena::HostArena(int descriptor, std::unique_ptr<Mapping> mapping)
    : descriptor_(descriptor), mapping_(std::move(mapping)) {
  free_[0] = mapping_->bytes();
}

HostArena::~HostArena() { close(descriptor_); }

uint64_t HostArena::Allocate(size_t bytes) {
  bytes = (bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
  if (bytes == 0) bytes = kBlockAlignment;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, room] = *it;
    if (room < bytes) continue;
    free_.erase(it);
    if (room > bytes) free_[offset + bytes] = room - bytes;
    used_[offset] = bytes;
    return offset;
  }
  return kNone;
}

void HostArena::Free(uint64_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto used = used_.find(offset);
  if (used == used_.end()) return;
  uint64_t begin = offset;
  size_t bytes = used->second;
  used_.erase(used);
  const auto after = free_.lower_bound(begin);
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) {
      begin = before->first;
      bytes += before->second;
      free_.erase(before);
    }
  }
  if (after != free_.end() && offset + (bytes - (offset - begin)) == after->first) {
    bytes += after->second;
    free_.erase(after);
  }
  free_[begin] = bytes;
}

size_t HostArena::bytes_in_use() {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (const auto& [offset, bytes] : used_) total += bytes;
  return total;
}

}  // namespace wideep
