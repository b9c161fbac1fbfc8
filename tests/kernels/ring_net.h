// The network of virtual nodes (Net of csrc/ep/two_hop_rank.cuh): it copies, at once or, in the
// emulator, late.
#pragma once

#include <cstdint>

#include "csrc/core/layout.h"
#include "csrc/core/ptx.h"
#include "csrc/ep/warp_copy.cuh"
#include "tests/kernels/late_network.h"

namespace wideep {
namespace testing {

/// Puts are stores of the calling lanes, each word a release by lane 0; or, with an outbox,
/// messages.
struct RingNet {
  char* memory[kMaxRanks];
  char* arenas[kMaxRanks];
  Outbox* outbox;  // of the rank that sends

  __device__ void PutWarp(int rank, int64_t to, const char* from, int64_t num_bytes, int64_t signal,
                          uint64_t v) const {
    if (outbox != nullptr) {
      if (threadIdx.x % 32 == 0) {
        outbox->Post({0, from, memory[rank] + to, num_bytes, Word(rank, signal), v});
      }
      __syncwarp();
      return;
    }
    CopyWarp(memory[rank] + to, from, num_bytes);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      ptx::st_release_sys_u64(Word(rank, signal), v);
    }
  }
  __device__ void Add(int rank, int64_t word, uint64_t v) const {
    if (outbox != nullptr) return outbox->Post({1, nullptr, nullptr, 0, Word(rank, word), v});
    ptx::red_add_relaxed_sys_u64(Word(rank, word), v);
  }
  __device__ void PutControl(int rank, int64_t offset, uint32_t v) const {
    ptx::st_relaxed_sys_u32(reinterpret_cast<uint32_t*>(arenas[rank] + offset), v);
  }
  __device__ uint64_t* Word(int rank, int64_t offset) const {
    return reinterpret_cast<uint64_t*>(memory[rank] + offset);
  }
};

}  // namespace testing
}  // namespace wideep
