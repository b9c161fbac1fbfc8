// A network for virtual nodes that delivers late and in any order: every rank posts its messages to
// an outbox, and a kernel that runs beside the rank's ops delivers them, each of its
// threads some of them. What is sent is read from the sender's memory only then, as a network
// card does.
#pragma once

#include <cstdint>

#include "csrc/core/launch.cuh"
#include "csrc/core/layout.h"
#include "csrc/core/ptx.h"

namespace wideep {
namespace testing {

struct Message {
  uint32_t adds;  // 1: adds v to the word; 0: copies, then sets it
  const char* from;
  char* to;
  int64_t num_bytes;
  uint64_t* word;
  uint64_t v;
};

struct Outbox {
  static constexpr uint32_t kMessages = 16;
  uint32_t closing;
  uint32_t next;
  /// Of a place: twice the messages that it has held, and one more while there is one.
  uint32_t states[kMessages];
  Message messages[kMessages];

  /// One thread; what it did before comes before the delivery.
  __device__ void Post(const Message& message) {
    const uint32_t ticket = atomicAdd(&next, 1u);
    const uint32_t place = ticket % kMessages;
    const uint32_t free = ticket / kMessages * 2;
    while (ptx::ld_acquire_sys_u32(&states[place]) != free) {
    }
    messages[place] = message;
    ptx::st_release_sys_u32(&states[place], free + 1);
  }
};

struct NetworkParams {
  Outbox* outbox;
};

template <typename Params>
__global__ void NetworkKernel(const __grid_constant__ Params p) {
  constexpr uint32_t kThreads = 4;
  if (threadIdx.x >= kThreads) return;
  Outbox& outbox = *p.outbox;
  for (;;) {
    // Closed after the rank's last op: what is there then is all there will be.
    const bool closing = ptx::ld_acquire_sys_u32(&outbox.closing) != 0;
    for (uint32_t place = threadIdx.x; place < Outbox::kMessages; place += kThreads) {
      const uint32_t state = ptx::ld_acquire_sys_u32(&outbox.states[place]);
      if (state % 2 == 0) continue;
      const Message& message = outbox.messages[place];
      if (message.adds != 0) {
        ptx::fence_acq_rel_sys();
        ptx::red_add_relaxed_sys_u64(message.word, message.v);
      } else {
        for (int64_t at = 0; at < message.num_bytes; at += 16) {
          ptx::st_global_v4(message.to + at, ptx::ld_global_no_allocate_v4(message.from + at));
        }
        ptx::st_release_sys_u64(message.word, message.v);
      }
      ptx::st_release_sys_u32(&outbox.states[place], state + 1);
    }
    if (closing) return;
  }
}

template <typename Params>
__global__ void CloseNetworkKernel(const __grid_constant__ Params p) {
  if (threadIdx.x == 0) ptx::st_release_sys_u32(&p.outbox->closing, 1);
}

}  // namespace testing
}  // namespace wideep
