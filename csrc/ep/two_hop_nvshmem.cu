#include <nvshmem.h>
#include <nvshmemx.h>

#include "csrc/ep/two_hop_launch.cuh"
#include "csrc/ep/two_hop_mapped.h"
#include "csrc/ep/two_hop_nvshmem.h"

namespace wideep {
namespace {

/// The rings of the throughput shape, and the arenas.
struct NvshmemRingNet {
  static constexpr bool kInPlace = false;

  char* memory;
  char* arena;
  int32_t pe_of_rank[kMaxRanks];

  __device__ void PutWarp(int rank, int64_t to, const char* from, int64_t num_bytes, int64_t signal,
                          uint64_t v) const {
    nvshmemx_putmem_signal_nbi_warp(memory + to, from, static_cast<size_t>(num_bytes),
                                    reinterpret_cast<uint64_t*>(memory + signal), v,
                                    NVSHMEM_SIGNAL_SET, pe_of_rank[rank]);
  }
  __device__ void Add(int rank, int64_t word, uint64_t v) const {
    nvshmemx_signal_op(reinterpret_cast<uint64_t*>(memory + word), v, NVSHMEM_SIGNAL_ADD,
                       pe_of_rank[rank]);
  }
  __device__ void PutControl(int rank, int64_t offset, uint32_t v) const {
    nvshmem_uint32_p(reinterpret_cast<uint32_t*>(arena + offset), v, pe_of_rank[rank]);
  }
};

}  // namespace

Status NvshmemTwoHopBytes(const ArenaConfig& arena, const std::vector<int>& node_of_rank,
                          int64_t& num_bytes) {
  return two_hop::MemoryBytes({arena, node_of_rank}, num_bytes);
}

Status MakeNvshmemTwoHop(const NvshmemTwoHopSettings& settings, std::shared_ptr<TwoHop>& out) {
  const TwoHopSettings two_hop{{settings.arena, settings.node_of_rank},
                               settings.rank,
                               settings.ring_memory,
                               settings.ring_bytes};
  NvshmemRingNet net{settings.ring_memory, settings.arena_memory, {}};
  MappedNet mapped{};
  bool reaches_all = true;
  for (int rank = 0; rank < settings.arena.num_ranks; ++rank) {
    const int pe = settings.pe_of_rank[rank];
    net.pe_of_rank[rank] = pe;
    mapped.memory[rank] = static_cast<char*>(nvshmem_ptr(settings.ring_memory, pe));
    mapped.arenas[rank] = static_cast<char*>(nvshmem_ptr(settings.arena_memory, pe));
    reaches_all &= mapped.memory[rank] != nullptr;
  }
  return reaches_all && !settings.only_puts ? MakeMappedTwoHop(two_hop, mapped, out)
                                            : MakeTwoHop(two_hop, net, out);
}

}  // namespace wideep
