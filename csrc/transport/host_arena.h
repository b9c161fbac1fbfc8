// Memory that the processes of a group on one host share: each owns an arena, in which it stages
// what its ranks send, and maps its peers' arenas for reading.
//
// An arena is a sealed memfd: it has no name that anybody could open, is not bounded by the size of
// /dev/shm, and goes when the last process that has mapped it goes, however that ends. Its length
// is address space only; pages come with the first write and are used again by later blocks, so
// that it grows to what is in flight at once and stays there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "csrc/core/status.h"

namespace wideep {

constexpr size_t kArenaBytes = size_t{64} << 30;
constexpr size_t kBlockAlignment = 64;

/// A mapping of `bytes` of a descriptor, unmapped with the object.
class Mapping {
 public:
  static Status Map(int descriptor, size_t bytes, bool writable, std::unique_ptr<Mapping>& mapping);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Mapping(char* data, size_t bytes) : data_(data), bytes_(bytes) {}
  char* data_;
  size_t bytes_;
};

class HostArena {
 public:
  static Status Make(std::unique_ptr<HostArena>& arena, size_t bytes = kArenaBytes);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  /// What peers map, for reading only: the memfd is sealed against further writable mappings.
  int descriptor() const { return descriptor_; }
  char* data() const { return mapping_->data(); }
  size_t bytes() const { return mapping_->bytes(); }

  static constexpr uint64_t kNone = ~uint64_t{0};
  /// Offset of a block, a multiple of kBlockAlignment, or kNone where nothing that large is left.
  /// The lowest place that fits: pages that exist already come first.
  uint64_t Allocate(size_t bytes);
  void Free(uint64_t offset);
  /// Bytes in blocks that are not free.
  size_t bytes_in_use();

 private:
  HostArena(int descriptor, std::unique_ptr<Mapping> mapping);

  const int descriptor_;
  const std::unique_ptr<Mapping> mapping_;
  std::mutex mutex_;
  std::map<uint64_t, size_t> free_;  // bytes by offset; neighbours are merged
  std::map<uint64_t, size_t> used_;
};

}  // namespace wideep
