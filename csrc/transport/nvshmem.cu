#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstring>
#include <mutex>

#include "csrc/transport/nvshmem.h"
#include "csrc/transport/relay.cuh"

namespace wideep {
namespace {

Status Failed(const std::string& what, int code) {
  return Status::Internal("nvshmem transport: " + what + " returned " + std::to_string(code) +
                          "; NVSHMEM_DEBUG=INFO shows why");
}

Status Runtime(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string("nvshmem transport: ") + what + ": " +
                          cudaGetErrorString(error));
}

std::mutex start_mutex;
int started_pes = 0;  // 0: not started

struct NvshmemNet {
  char* arena;
  int32_t pe_of_rank[kMaxRanks];

  __device__ void PutWarp(int rank, int64_t offset, const char* from, int64_t num_bytes) const {
    nvshmemx_putmem_nbi_warp(arena + offset, from, static_cast<size_t>(num_bytes),
                             pe_of_rank[rank]);
  }
  __device__ void Fence() const { nvshmem_fence(); }
  __device__ void Put32(int rank, int64_t offset, uint32_t v) const {
    nvshmem_uint32_p(reinterpret_cast<uint32_t*>(arena + offset), v, pe_of_rank[rank]);
  }
  __device__ void Put64(int rank, int64_t offset, uint64_t v) const {
    nvshmemx_signal_op(reinterpret_cast<uint64_t*>(arena + offset), v, NVSHMEM_SIGNAL_SET,
                       pe_of_rank[rank]);
  }
};

class NvshmemRelay : public Relay {
 public:
  NvshmemRelay(const RelayParams<NvshmemNet>& params, int num_blocks, uint32_t* tickets)
      : params_(params), num_blocks_(num_blocks), tickets_(tickets) {}
  Status Launch(const RelayCall& call, cudaStream_t stream) override {
    RelayParams<NvshmemNet> p = params_;
    p.call = call;
    return LaunchRelay(p, num_blocks_, stream);
  }
  uint32_t* Ticket(LowLatencyKind kind) override { return tickets_ + static_cast<int>(kind); }

 private:
  const RelayParams<NvshmemNet> params_;
  const int num_blocks_;
  uint32_t* const tickets_;
};

}  // namespace

std::string Nvshmem::Version() {
  int major = 0;
  int minor = 0;
  int patch = 0;
  nvshmemx_vendor_get_version_info(&major, &minor, &patch);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

Status Nvshmem::UniqueId(std::string& id) {
  nvshmemx_uniqueid_t value = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (const int code = nvshmemx_get_uniqueid(&value); code != 0) {
    return Failed("nvshmemx_get_uniqueid", code);
  }
  id.assign(reinterpret_cast<const char*>(&value), sizeof(value));
  return Status();
}

Status Nvshmem::Start(int device, int pe, int num_pes, const std::string& id) {
  const std::lock_guard<std::mutex> lock(start_mutex);
  if (started_pes != 0) {
    if (nvshmem_my_pe() == pe && started_pes == num_pes) return Status();
    return Status::FailedPrecondition(
        "nvshmem transport: this process is already PE " + std::to_string(nvshmem_my_pe()) +
        " of " + std::to_string(started_pes) + ", got PE " + std::to_string(pe) + " of " +
        std::to_string(num_pes) +
        ". NVSHMEM starts once in a process: give all groups the same processes");
  }
  nvshmemx_uniqueid_t value = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (id.size() != sizeof(value)) {
    return Status::Internal("nvshmem transport: expected a unique id of " +
                            std::to_string(sizeof(value)) + " bytes, got " +
                            std::to_string(id.size()));
  }
  std::memcpy(&value, id.data(), sizeof(value));
  if (Status status = Runtime("cudaSetDevice", cudaSetDevice(device)); !status.ok()) return status;
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  nvshmemx_set_attr_uniqueid_args(pe, num_pes, &value, &attributes);
  if (const int code = nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes); code != 0) {
    return Failed("nvshmemx_init_attr", code);
  }
  started_pes = num_pes;
  return Status();
}

Status Nvshmem::Allocate(int device, int64_t num_bytes, char*& out) {
  if (Status status = Runtime("cudaSetDevice", cudaSetDevice(device)); !status.ok()) return status;
  out = static_cast<char*>(nvshmem_malloc(static_cast<size_t>(num_bytes)));
  if (out == nullptr) {
    return Status::Internal("nvshmem transport: no " + std::to_string(num_bytes) +
                            " bytes to be had; raise NVSHMEM_SYMMETRIC_SIZE, or leave the GPU more "
                            "memory (XLA_PYTHON_CLIENT_MEM_FRACTION)");
  }
  Status status = Runtime("cudaMemset", cudaMemset(out, 0, static_cast<size_t>(num_bytes)));
  if (status.ok()) status = Runtime("cudaDeviceSynchronize", cudaDeviceSynchronize());
  return status;
}

char* Nvshmem::PointerTo(const char* memory, int pe) {
  return static_cast<char*>(nvshmem_ptr(memory, pe));
}

Status MakeNvshmemRelay(const NvshmemRelaySettings& settings, std::shared_ptr<Relay>& out) {
  if (!settings.arena.once_per_rank) {
    return Status::InvalidArgument("nvshmem transport: once_per_rank: expected true, got false");
  }
  RelayParams<NvshmemNet> params;
  params.layout = ArenaLayout(settings.arena);
  params.arena = settings.arena_memory;
  params.rank = settings.rank;
  params.num_ranks = settings.arena.num_ranks;
  params.net.arena = settings.arena_memory;
  for (int rank = 0; rank < params.num_ranks; ++rank) {
    params.mirrors[rank] = settings.mirrors[rank];
    params.net.pe_of_rank[rank] = settings.pe_of_rank[rank];
  }
  if (Status status =
          LoadKernels<RelayParams<NvshmemNet>>({RelayKernel<NvshmemNet>}, "low-latency relay");
      !status.ok()) {
    return status;
  }
  out = std::make_shared<NvshmemRelay>(params, settings.num_blocks, settings.tickets);
  return Status();
}

}  // namespace wideep
