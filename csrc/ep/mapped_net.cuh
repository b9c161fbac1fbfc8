// A Net (two_hop_rank.cuh) over memory of the other ranks that loads and stores reach: ranks of one
// host in virtual nodes.
#pragma once

#include <cstdint>

#include "csrc/core/layout.h"
#include "csrc/core/ptx.h"

namespace wideep {

/// Slots are written where they are read. Puts are stores of the calling lanes, each word a release
/// by lane 0.
struct MappedNet {
  static constexpr bool kInPlace = true;

  char* memory[kMaxRanks];  // registered, of each rank
  char* arenas[kMaxRanks];

  __device__ void PutWarp(int rank, int64_t to, const char* from, int64_t num_bytes, int64_t signal,
                          uint64_t v) const {
    constexpr int kAtOnce = 4;  // loads of a lane under way
    for (int64_t at = threadIdx.x % 32 * 16; at < num_bytes; at += kAtOnce * 512) {
      int4 bits[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * 512 < num_bytes) bits[i] = ptx::ld_global_no_allocate_v4(from + at + i * 512);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i * 512 < num_bytes) ptx::st_global_v4(memory[rank] + to + at + i * 512, bits[i]);
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) Signal(rank, signal, v);
  }
  __device__ char* At(int rank, int64_t offset) const { return memory[rank] + offset; }
  __device__ void Signal(int rank, int64_t word, uint64_t v) const {
    ptx::st_release_sys_u64(Word(rank, word), v);
  }
  __device__ void Add(int rank, int64_t word, uint64_t v) const {
    ptx::red_add_relaxed_sys_u64(Word(rank, word), v);
  }
  __device__ void PutControl(int rank, int64_t offset, uint32_t v) const {
    ptx::st_relaxed_sys_u32(reinterpret_cast<uint32_t*>(arenas[rank] + offset), v);
  }
  __device__ uint64_t* Word(int rank, int64_t offset) const {
    return reinterpret_cast<uint64_t*>(memory[rank] + offset);
  }
};

}  // namespace wideep
