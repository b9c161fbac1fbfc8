// One warp's way of moving rows: pieces come into shared memory by bulk copies, ahead of their use,
// and leave by bulk copies to as many places as lanes want.
//
//   Load(source)   lane 0 starts the copy into the next buffer; all lanes have waited until the
//                  stores that read the buffer before are done reading (wait_group.read).
//   Wait()         all lanes wait for the oldest load (mbarrier; its phase follows from a count).
//   Store(..)      each lane that wants it starts a copy out of that buffer.
//   Release()      ends the stores of the buffer: one group per lane, empty for lanes without.
#pragma once

#include <cstdint>

#include "csrc/core/ptx.h"

namespace wideep {

class BulkPipe {
 public:
  /// `buffers`: num_stages * piece_bytes of this warp's shared memory, `barriers`: num_stages of
  /// them.
  __device__ BulkPipe(char* buffers, uint64_t* barriers, int piece_bytes, int num_stages)
      : generic_buffers_(buffers),
        buffers_(ptx::SharedAddress(buffers)),
        barriers_(ptx::SharedAddress(barriers)),
        piece_bytes_(piece_bytes),
        num_stages_(num_stages),
        lane_(threadIdx.x % 32) {
    if (lane_ == 0) {
      for (int i = 0; i < num_stages; ++i) ptx::mbarrier_init_shared(barriers_ + 8 * i, 1);
      ptx::fence_proxy_async();
    }
    __syncwarp();
  }

  __device__ int piece_bytes() const { return piece_bytes_; }
  __device__ int num_stages() const { return num_stages_; }

  __device__ void Load(const char* from, uint32_t num_bytes) {
    LoadBy(num_bytes, [&](uint32_t to, uint32_t barrier) {
      ptx::cp_async_bulk_load(to, from, num_bytes, barrier);
    });
  }
  /// From a place that nobody reads again soon.
  __device__ void LoadOnce(const char* from, uint32_t num_bytes) {
    LoadBy(num_bytes, [&](uint32_t to, uint32_t barrier) {
      ptx::cp_async_bulk_load_cache_hint(to, from, num_bytes, barrier, evict_first_);
    });
  }

  __device__ void Wait() {
    while (!ptx::mbarrier_try_wait_parity_acquire_cta(barriers_ + 8 * store_stage_, parity_)) {
    }
  }

  /// To a place that nobody reads soon.
  __device__ void Store(char* to, uint32_t num_bytes) {
    ptx::cp_async_bulk_store_cache_hint(to, Oldest(), num_bytes, evict_first_);
  }
  /// To a place that is read at once, and should stay in L2 until then.
  __device__ void StoreForReading(char* to, uint32_t num_bytes) {
    ptx::cp_async_bulk_store_cache_hint(to, Oldest(), num_bytes, ptx::createpolicy_l2_evict_last());
  }

  __device__ void Release() {
    ptx::cp_async_bulk_commit_group();
    Drop();
  }

  /// Instead of Store and Release: the oldest piece, to be read by ordinary loads, and the end of
  /// that. The next Load has a warp barrier before it overwrites the buffer.
  __device__ const char* Data() const { return generic_buffers_ + store_stage_ * piece_bytes_; }
  __device__ void Drop() {
    if (++store_stage_ == num_stages_) {
      store_stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  template <typename Start>
  __device__ void LoadBy(uint32_t num_bytes, Start start) {
    ptx::cp_async_bulk_wait_group_read<0>();
    __syncwarp();
    if (lane_ == 0) {
      const uint32_t barrier = barriers_ + 8 * load_stage_;
      ptx::mbarrier_arrive_expect_tx_release_cta(barrier, num_bytes);
      start(buffers_ + load_stage_ * piece_bytes_, barrier);
    }
    if (++load_stage_ == num_stages_) load_stage_ = 0;
  }
  __device__ uint32_t Oldest() const { return buffers_ + store_stage_ * piece_bytes_; }

  const char* const generic_buffers_;
  const uint32_t buffers_;
  const uint32_t barriers_;
  const uint64_t evict_first_ = ptx::createpolicy_l2_evict_first();
  const int piece_bytes_;
  const int num_stages_;
  const int lane_;
  int load_stage_ = 0;
  int store_stage_ = 0;
  uint32_t parity_ = 0;  // of the round of stages that is stored
};

}  // namespace wideep
