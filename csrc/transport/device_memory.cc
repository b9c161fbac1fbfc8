#include "csrc/transport/device_memory.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <string>

namespace wideep {
namespace {

/// The driver's entry points.
struct Driver {
  PFN_cuGetErrorName_v6000 get_error_name = nullptr;
  PFN_cuPointerGetAttribute_v4000 pointer_get_attribute = nullptr;
  PFN_cuMemGetAddressRange_v3020 mem_get_address_range = nullptr;
  PFN_cuMemGetAllocationGranularity_v10020 mem_get_allocation_granularity = nullptr;
  PFN_cuMemCreate_v10020 mem_create = nullptr;
  PFN_cuMemRelease_v10020 mem_release = nullptr;
  PFN_cuMemAddressReserve_v10020 mem_address_reserve = nullptr;
  PFN_cuMemAddressFree_v10020 mem_address_free = nullptr;
  PFN_cuMemMap_v10020 mem_map = nullptr;
  PFN_cuMemUnmap_v10020 mem_unmap = nullptr;
  PFN_cuMemSetAccess_v10020 mem_set_access = nullptr;
  PFN_cuMemRetainAllocationHandle_v11000 mem_retain_allocation_handle = nullptr;
  PFN_cuMemExportToShareableHandle_v10020 mem_export = nullptr;
  PFN_cuMemImportFromShareableHandle_v10020 mem_import = nullptr;
  Status status;

  Driver() {
    Find("cuGetErrorName", 6000, get_error_name);
    Find("cuPointerGetAttribute", 4000, pointer_get_attribute);
    Find("cuMemGetAddressRange", 3020, mem_get_address_range);
    Find("cuMemGetAllocationGranularity", 10020, mem_get_allocation_granularity);
    Find("cuMemCreate", 10020, mem_create);
    Find("cuMemRelease", 10020, mem_release);
    Find("cuMemAddressReserve", 10020, mem_address_reserve);
    Find("cuMemAddressFree", 10020, mem_address_free);
    Find("cuMemMap", 10020, mem_map);
    Find("cuMemUnmap", 10020, mem_unmap);
    Find("cuMemSetAccess", 10020, mem_set_access);
    Find("cuMemRetainAllocationHandle", 11000, mem_retain_allocation_handle);
    Find("cuMemExportToShareableHandle", 10020, mem_export);
    Find("cuMemImportFromShareableHandle", 10020, mem_import);
  }

  static const Driver& Get() {
    static const Driver driver;
    return driver;
  }

 private:
  template <typename Entry>
  void Find(const char* name, unsigned version, Entry& entry) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
    if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) {
      entry = reinterpret_cast<Entry>(found);
    } else if (status.ok()) {
      status = Status::FailedPrecondition(std::string("the CUDA driver has no ") + name +
                                          "; a driver of CUDA 12 or newer is needed");
    }
  }
};

Status FromRuntime(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string(what) + ": " + cudaGetErrorString(error));
}

Status FromDriver(const char* what, CUresult result) {
  if (result == CUDA_SUCCESS) return Status();
  const char* name = nullptr;
  Driver::Get().get_error_name(result, &name);
  return Status::Internal(std::string(what) + ": " +
                          (name != nullptr ? name : "error " + std::to_string(result)));
}

CUmemLocation LocationOf(int device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

CUdeviceptr AddressOf(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    Close();
    number_ = other.Release();
  }
  return *this;
}

void FileDescriptor::Close() {
  if (number_ >= 0) close(number_);
  number_ = -1;
}

DeviceScope::DeviceScope(int device) {
  status_ = FromRuntime("cudaGetDevice", cudaGetDevice(&previous_));
  if (status_.ok()) status_ = FromRuntime("cudaSetDevice", cudaSetDevice(device));
  // The driver's calls need a context, which the runtime makes with its first call that uses one.
  if (status_.ok()) status_ = FromRuntime("CUDA context", cudaFree(nullptr));
  if (status_.ok()) status_ = Driver::Get().status;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  if (this != &other) {
    Free();
    kind_ = std::exchange(other.kind_, Kind::kNone);
    data_ = std::exchange(other.data_, nullptr);
    num_bytes_ = std::exchange(other.num_bytes_, 0);
  }
  return *this;
}

Status DeviceMemory::Allocate(int device, uint64_t num_bytes, bool exportable, DeviceMemory& out) {
  const DeviceScope scope(device);
  if (!scope.status().ok()) return scope.status();
  Status status;
  if (!exportable) {
    void* data = nullptr;
    status = FromRuntime("arena: cudaMalloc", cudaMalloc(&data, num_bytes));
    if (!status.ok()) return status;
    out = DeviceMemory();
    out.kind_ = Kind::kRuntime;
    out.data_ = static_cast<char*>(data);
    out.num_bytes_ = num_bytes;
  } else {
    const Driver& driver = Driver::Get();
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    prop.location = LocationOf(device);
    size_t granularity = 0;
    status = FromDriver("arena: cuMemGetAllocationGranularity",
                        driver.mem_get_allocation_granularity(&granularity, &prop,
                                                              CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    if (!status.ok()) return status;
    const uint64_t mapped_bytes = (num_bytes + granularity - 1) / granularity * granularity;
    CUmemGenericAllocationHandle handle = 0;
    status = FromDriver("arena: cuMemCreate", driver.mem_create(&handle, mapped_bytes, &prop, 0));
    if (status.ok()) status = Map(device, handle, mapped_bytes, out);
    if (!status.ok()) return status;
  }
  status = FromRuntime("arena: cudaMemset", cudaMemset(out.data_, 0, out.num_bytes_));
  if (!status.ok()) return status;
  return FromRuntime("arena: cudaDeviceSynchronize", cudaDeviceSynchronize());
}

Status DeviceMemory::Import(int device, int descriptor, uint64_t num_bytes, DeviceMemory& out) {
  const DeviceScope scope(device);
  if (!scope.status().ok()) return scope.status();
  CUmemGenericAllocationHandle handle = 0;
  const Status status = FromDriver(
      "cuMemImportFromShareableHandle",
      Driver::Get().mem_import(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(descriptor)),
                               CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  return status.ok() ? Map(device, handle, num_bytes, out) : status;
}

Status DeviceMemory::OfPeerDevice(int device, int owner_device, const MemoryRange& range,
                                  DeviceMemory& out) {
  const DeviceScope scope(device);
  if (!scope.status().ok()) return scope.status();
  if (device != owner_device) {
    CUmemGenericAllocationHandle handle = 0;
    if (Driver::Get().mem_retain_allocation_handle(&handle, reinterpret_cast<void*>(range.base)) ==
        CUDA_SUCCESS) {
      return Map(device, handle, range.num_bytes, out);
    }
    const cudaError_t error = cudaDeviceEnablePeerAccess(owner_device, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();  // clears it
    } else if (error != cudaSuccess) {
      return FromRuntime("cudaDeviceEnablePeerAccess", error);
    }
  }
  out = DeviceMemory();
  out.kind_ = Kind::kBorrowed;
  out.data_ = reinterpret_cast<char*>(range.base);
  out.num_bytes_ = range.num_bytes;
  return Status();
}

/// Takes over `handle`: the mapping keeps the memory.
Status DeviceMemory::Map(int device, uint64_t handle, uint64_t num_bytes, DeviceMemory& out) {
  const Driver& driver = Driver::Get();
  CUdeviceptr address = 0;
  Status status =
      FromDriver("cuMemAddressReserve", driver.mem_address_reserve(&address, num_bytes, 0, 0, 0));
  if (status.ok()) {
    status = FromDriver("cuMemMap", driver.mem_map(address, num_bytes, 0, handle, 0));
    if (!status.ok()) driver.mem_address_free(address, num_bytes);
  }
  driver.mem_release(handle);
  if (!status.ok()) return status;
  out = DeviceMemory();
  out.kind_ = Kind::kVirtual;
  out.data_ = reinterpret_cast<char*>(address);
  out.num_bytes_ = num_bytes;
  CUmemAccessDesc access{};
  access.location = LocationOf(device);
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return FromDriver("cuMemSetAccess", driver.mem_set_access(address, num_bytes, &access, 1));
}

Status DeviceMemory::RangeOf(const void* pointer, MemoryRange& range) {
  // A stream-ordered pool may give its memory back at any time, and peers have no access to it.
  CUmemoryPool pool = nullptr;
  if (Driver::Get().pointer_get_attribute(&pool, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
                                          AddressOf(pointer)) == CUDA_SUCCESS &&
      pool != nullptr) {
    return Status::FailedPrecondition("memory of a stream-ordered pool cannot be mapped");
  }
  CUdeviceptr base = 0;
  size_t num_bytes = 0;
  const Status status =
      FromDriver("cuMemGetAddressRange",
                 Driver::Get().mem_get_address_range(&base, &num_bytes, AddressOf(pointer)));
  range = {base, num_bytes};
  return status;
}

Status DeviceMemory::Export(uint64_t base, FileDescriptor& descriptor) {
  const Driver& driver = Driver::Get();
  CUmemGenericAllocationHandle handle = 0;
  Status status =
      FromDriver("cuMemRetainAllocationHandle",
                 driver.mem_retain_allocation_handle(&handle, reinterpret_cast<void*>(base)));
  if (!status.ok()) return status;
  int number = -1;
  status =
      FromDriver("cuMemExportToShareableHandle",
                 driver.mem_export(&number, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  driver.mem_release(handle);
  if (status.ok()) descriptor = FileDescriptor(number);
  return status;
}

void DeviceMemory::Free() {
  switch (std::exchange(kind_, Kind::kNone)) {
    case Kind::kRuntime:
      cudaFree(data_);
      break;
    case Kind::kVirtual:
      Driver::Get().mem_unmap(AddressOf(data_), num_bytes_);
      Driver::Get().mem_address_free(AddressOf(data_), num_bytes_);
      break;
    case Kind::kNone:
    case Kind::kBorrowed:
      break;
  }
  data_ = nullptr;
  num_bytes_ = 0;
}

}  // namespace wideep
