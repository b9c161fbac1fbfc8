// Device memory that peers can map: the driver's virtual memory calls, found at run time, so that
// nothing links libcuda.
#pragma once

#include <cstdint>
#include <utility>

#include "csrc/core/status.h"

namespace wideep {

/// Where memory lies in its owner's address space.
struct MemoryRange {
  uint64_t base = 0;
  uint64_t num_bytes = 0;
};

/// A file descriptor that is closed with its owner.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int number) : number_(number) {}
  FileDescriptor(FileDescriptor&& other) noexcept : number_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor() { Close(); }

  int number() const { return number_; }
  /// Hands it to the caller, who closes it.
  int Release() { return std::exchange(number_, -1); }

 private:
  void Close();

  int number_ = -1;
};

/// Makes `device` current, and the caller's device again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  const Status& status() const { return status_; }

 private:
  int previous_ = -1;
  Status status_;
};

/// Memory that `device` can use, owned or mapped; freed or unmapped with the object, before which
/// the device must have finished with it.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory() { Free(); }

  /// Zeroed memory on `device`. `exportable`: other processes can map it.
  static Status Allocate(int device, uint64_t num_bytes, bool exportable, DeviceMemory& out);
  /// Another process's memory, from its descriptor, which stays the caller's.
  static Status Import(int device, int descriptor, uint64_t num_bytes, DeviceMemory& out);
  /// Memory of this process on another device. Where it is a virtual allocation, it is mapped once
  /// more, for `device`; otherwise peer access is switched on and the address stays.
  static Status OfPeerDevice(int device, int owner_device, const MemoryRange& range,
                             DeviceMemory& out);

  /// The whole allocation that holds `pointer`; fails for memory of a stream-ordered pool.
  static Status RangeOf(const void* pointer, MemoryRange& range);
  /// A descriptor of the virtual allocation that begins at `base`; fails for other allocations.
  static Status Export(uint64_t base, FileDescriptor& descriptor);

  char* data() const { return data_; }
  MemoryRange range() const { return {reinterpret_cast<uint64_t>(data_), num_bytes_}; }

 private:
  enum class Kind { kNone, kBorrowed, kRuntime, kVirtual };

  static Status Map(int device, uint64_t handle, uint64_t num_bytes, DeviceMemory& out);
  void Free();

  Kind kind_ = Kind::kNone;
  char* data_ = nullptr;
  uint64_t num_bytes_ = 0;
};

}  // namespace wideep
