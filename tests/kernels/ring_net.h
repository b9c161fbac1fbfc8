// The network of virtual nodes (Net of csrc/ep/two_hop_rank.cuh): it copies, at once or, in the
// emulator, late.
#pragma once

#include <cstdint>

#include "csrc/ep/mapped_net.cuh"
#include "tests/kernels/late_network.h"

namespace wideep {
namespace testing {

/// Puts from staging memory: MappedNet's; or, with an outbox, messages.
struct RingNet : MappedNet {
  static constexpr bool kInPlace = false;
  Outbox* outbox;  // of the rank that sends

  __device__ void PutWarp(int rank, int64_t to, const char* from, int64_t num_bytes, int64_t signal,
                          uint64_t v) const {
    if (outbox == nullptr) return MappedNet::PutWarp(rank, to, from, num_bytes, signal, v);
    if (threadIdx.x % 32 == 0) {
      outbox->Post({0, from, memory[rank] + to, num_bytes, Word(rank, signal), v});
    }
    __syncwarp();
  }
  __device__ void Add(int rank, int64_t word, uint64_t v) const {
    if (outbox == nullptr) return MappedNet::Add(rank, word, v);
    outbox->Post({1, nullptr, nullptr, 0, Word(rank, word), v});
  }
};

}  // namespace testing
}  // namespace wideep
