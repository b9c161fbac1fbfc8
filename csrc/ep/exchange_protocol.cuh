// What every exchange kernel does around its own work, on each rank of a node.
//
//   1. Begin: block 0 publishes where this rank's buffers lie; every block reads what the peers
//      published. A peer's word of this epoch also says that its buffer may be used.
//   2. The work: rows move between the ranks' buffers.
//   3. Finish: the last block of a rank tells every peer that this rank is done with its buffers,
//      and waits until every peer has said so. Only then does the kernel end and XLA may reuse
//      them.
//
// Memory order. publish: release at system scope, after everything earlier kernels of this rank
// wrote; acquire by the readers. done: every thread's writes, then the block barrier, then an
// acquire-release count of blocks, then the last block's release at system scope; acquire by the
// peers. Bulk copies are completed (wait_group) and fenced (fence.proxy.async) before the barrier.
//
// Ranks on other nodes (outside PeerContext::node_ranks) have no address here: Begin, Finish and
// the abort stores leave them out, and what they report counts (two_hop_rank.cuh brings it).
//
// Masked ranks. Nobody waits for a rank that is masked (Control::masked, the same on all ranks that
// take part), and nobody reads or writes its memory. A masked rank that launches a kernel all the
// same writes empty outputs and ends, without Begin or Finish.
#pragma once

#include "csrc/core/error_record.h"
#include "csrc/core/layout.h"
#include "csrc/core/ptx.h"
#include "csrc/ep/peer_context.h"

namespace wideep {

/// One thread's view of the exchange that runs.
class Exchange {
 public:
  __device__ Exchange(const PeerContext& peers, ExchangeOp op)
      : Exchange(peers, op,
                 ptx::ld_relaxed_gpu_u32(
                     &reinterpret_cast<Control*>(peers.arena + ArenaLayout::kControl)->epoch) +
                     1) {}
  /// With an epoch of its own, for ops that use neither Begin nor Finish.
  __device__ Exchange(const PeerContext& peers, ExchangeOp op, uint32_t epoch)
      : peers_(peers),
        control_(reinterpret_cast<Control*>(peers.arena + ArenaLayout::kControl)),
        table_(reinterpret_cast<const PeerTable*>(peers.arena + peers.layout.peer_table)),
        masked_(control_->masked),
        epoch_(epoch),
        op_(op) {}

  __device__ int rank() const { return peers_.rank; }
  __device__ int num_ranks() const { return peers_.num_ranks; }
  __device__ bool IsMasked(int rank) const { return (masked_ >> rank & 1) != 0; }
  __device__ bool any_masked() const { return masked_ != 0; }
  /// Whether `rank` takes part, and its memory has an address here.
  __device__ bool Reaches(int rank) const {
    return ((peers_.node_ranks & ~masked_) >> rank & 1) != 0;
  }
  /// Whether this rank is not masked; otherwise it only writes empty outputs.
  __device__ bool takes_part() const { return !IsMasked(rank()); }
  __device__ uint32_t epoch() const { return epoch_; }
  __device__ const ArenaLayout& layout() const { return peers_.layout; }
  __device__ char* arena(int rank) const { return table_->arena[rank]; }
  __device__ char* arena() const { return peers_.arena; }
  __device__ Control* control() const { return control_; }

  template <typename T>
  __device__ T* In(int rank, int64_t offset) const {
    return reinterpret_cast<T*>(arena(rank) + offset);
  }

  /// Waits until `ready()`. False if this rank or another one gave up; the caller then drains.
  /// `patience_ns` is added to the deadline: where a peer may itself wait for one that does not
  /// come, it gives up first and names that one.
  template <typename Ready>
  __device__ bool Wait(Ready ready, Phase phase, int peer, uint64_t patience_ns = 0) {
    if (ready()) return true;
    const uint64_t begin = ptx::globaltimer();
    for (uint32_t spins = 1;; ++spins) {
      if (ready()) return true;
      if (spins % 64 != 0) continue;
      if (Aborted()) return false;
      if (ptx::globaltimer() - begin > peers_.deadline_ns + patience_ns) {
        Fail(Failure::kDeadline, phase, peer, 0, 0);
        return false;
      }
    }
  }
  __device__ uint64_t deadline_ns() const { return peers_.deadline_ns; }

  /// Whether a rank gave up; leaves this rank's own record of it.
  __device__ bool Aborted() {
    const uint32_t word = ptx::ld_relaxed_sys_u32(&control_->abort);
    // A masked rank that was late for its mask does not stop the others.
    if (word == 0 || IsMasked(AbortWord::Reporter(word))) return false;
    if (ptx::atom_cas_acq_rel_gpu_u32(&control_->failed, 0, 1) == 0) {
      WriteRecord(AbortWord::FailureOf(word), AbortWord::Op(word), AbortWord::PhaseOf(word),
                  AbortWord::Reporter(word), AbortWord::Peer(word), 0, 0);
    }
    return true;
  }

  /// Gives up: writes this rank's record and tells everyone. The first call counts.
  __device__ void Fail(Failure failure, Phase phase, int peer, uint64_t expected, uint64_t got) {
    if (ptx::atom_cas_acq_rel_gpu_u32(&control_->failed, 0, 1) != 0) return;
    WriteRecord(static_cast<uint32_t>(failure), static_cast<uint32_t>(op_),
                static_cast<uint32_t>(phase), rank(), peer, expected, got);
    const uint32_t word = AbortWord::Pack(failure, rank(), peer, op_, phase);
    for (int r = 0; r < num_ranks(); ++r) {
      if (!Reaches(r)) continue;
      ptx::st_release_sys_u32(&In<Control>(r, ArenaLayout::kControl)->abort, word);
    }
  }

  /// Publishes `mine` and reads the peers' into here[buffer * kMaxRanks + rank], in shared memory;
  /// only those of ranks that it Reaches. All threads of the block. Returns false if a rank gave
  /// up. `all_mapped` is the same on every rank of a node: whether every rank's buffers can be
  /// reached.
  template <int kBuffers>
  __device__ bool Begin(const void* const (&mine)[kBuffers], char** here, uint32_t* flags,
                        bool& all_mapped);

  /// Barrier of this rank's blocks. All threads of all blocks; false if a rank gave up.
  __device__ bool BlockBarrier(uint32_t* flags);

  /// Ends the exchange. All threads of all blocks. `patience_ns` as of Wait.
  __device__ void Finish(uint32_t* flags, uint64_t patience_ns = 0);

 private:
  __device__ void WriteRecord(uint32_t failure, uint32_t op, uint32_t phase, int reporter, int peer,
                              uint64_t expected, uint64_t got) {
    ErrorRecord* record = peers_.record;
    record->op = op;
    record->phase = phase;
    record->rank = rank();
    record->reporter = reporter;
    record->peer = peer;
    record->epoch = epoch_;
    record->expected = expected;
    record->got = got;
    // Release: the host reads the rest once it sees this.
    ptx::st_release_sys_u32(&record->failure, failure);
  }

  /// Region of this rank that holds `pointer`, as its peers know it.
  __device__ uint64_t PublishedWordOf(const void* pointer) const {
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (peers_.zero_copy) {
      for (int i = 0; i < table_->num_regions[rank()]; ++i) {
        const MappedRegion& region = table_->regions[rank()][i];
        const uint64_t offset = address - region.owner_base;
        if (address >= region.owner_base && offset < region.num_bytes &&
            offset <= PublishedWord::kMaxOffset) {
          return PublishedWord::Pack(epoch_, i, offset);
        }
      }
    }
    return PublishedWord::Pack(epoch_, PublishedWord::kNotMapped, 0);
  }

  const PeerContext& peers_;
  Control* control_;
  const PeerTable* table_;
  const uint32_t masked_;
  uint32_t epoch_;
  ExchangeOp op_;
};

/// Words of shared memory that Begin, BlockBarrier and Finish use.
constexpr int kProtocolFlags = 3;

template <int kBuffers>
__device__ bool Exchange::Begin(const void* const (&mine)[kBuffers], char** here, uint32_t* flags,
                                bool& all_mapped) {
  static_assert(kBuffers <= kMaxPublished, "raise kMaxPublished");
  if (threadIdx.x == 0) {
    // A rank gave up, now or in an op before: what was published may be stale.
    flags[0] = Aborted();
    flags[1] = 0;  // somebody's buffer is not mapped
    flags[2] = 0;  // a thread of this block waited in vain
  }
  __syncthreads();
  const bool alone = num_ranks() == 1 || (peers_.node_ranks & ~masked_) == 1u << rank();
  const int slot = threadIdx.x;  // one thread for each peer's buffer
  const int peer = slot / kBuffers;
  const int buffer = slot % kBuffers;
  if (peer < num_ranks() && Reaches(peer) && flags[0] == 0) {
    uint64_t word = PublishedWordOf(mine[buffer]);
    if (blockIdx.x == 0 && peer != rank()) {
      auto* published = In<uint64_t>(peer, layout().published);
      // Release: the peer may use the buffer, and what earlier kernels wrote there, once it sees
      // this.
      ptx::st_release_sys_u64(&published[rank() * kMaxPublished + buffer], word);
    }
    char* pointer = static_cast<char*>(const_cast<void*>(mine[buffer]));
    if (peer != rank()) {
      const auto* published = reinterpret_cast<const uint64_t*>(arena() + layout().published);
      const bool came = Wait(
          [&] {
            word = ptx::ld_acquire_sys_u64(&published[peer * kMaxPublished + buffer]);
            return PublishedWord::IsOf(word, epoch_);
          },
          Phase::kPublished, peer);
      const uint32_t region = PublishedWord::Region(word);
      if (!came) {
        flags[2] = 1;
      } else if (region != PublishedWord::kNotMapped) {
        pointer = table_->regions[peer][region].here + PublishedWord::Offset(word);
      }
    }
    if (!alone && PublishedWord::Region(word) == PublishedWord::kNotMapped) flags[1] = 1;
    here[buffer * kMaxRanks + peer] = pointer;
  }
  __syncthreads();
  all_mapped = flags[1] == 0;
  const bool ok = flags[0] == 0 && flags[2] == 0;
  __syncthreads();
  return ok;
}

__device__ inline bool Exchange::BlockBarrier(uint32_t* flags) {
  if (gridDim.x == 1) {
    __syncthreads();
    return true;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    flags[0] = 1;
    const uint32_t generation = ptx::ld_relaxed_gpu_u32(&control_->barrier_generation);
    // Acquire-release: carries every block's writes to the last one, which passes them on below.
    if (ptx::atom_add_acq_rel_gpu_u32(&control_->barrier_arrived, 1) == gridDim.x - 1) {
      control_->barrier_arrived = 0;
      ptx::st_release_gpu_u32(&control_->barrier_generation, generation + 1);
    } else {
      const bool passed =
          Wait([&] { return ptx::ld_acquire_gpu_u32(&control_->barrier_generation) != generation; },
               Phase::kBlocks, rank());
      if (!passed) flags[0] = 0;
    }
  }
  __syncthreads();
  const bool ok = flags[0] != 0;
  __syncthreads();
  return ok;
}

__device__ inline void Exchange::Finish(uint32_t* flags, uint64_t patience_ns) {
  // Bulk stores that this thread issued are complete and ordered before the barrier.
  ptx::cp_async_bulk_wait_group<0>();
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    flags[0] = ptx::atom_add_acq_rel_gpu_u32(&control_->blocks_done, 1) == gridDim.x - 1;
    flags[1] = 1;
  }
  __syncthreads();
  if (flags[0] == 0) return;

  const int peer = threadIdx.x;
  if (peer < num_ranks() && peer != rank() && Reaches(peer)) {
    // Release: everything this rank wrote to, and read from, the peer's buffers comes before.
    ptx::st_release_sys_u32(&In<uint32_t>(peer, layout().done)[rank()], epoch_);
    const auto* done = reinterpret_cast<const uint32_t*>(arena() + layout().done);
    const bool came = Wait(
        [&] { return static_cast<int32_t>(ptx::ld_acquire_sys_u32(&done[peer]) - epoch_) >= 0; },
        Phase::kDone, peer, patience_ns);
    if (!came) flags[1] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    control_->blocks_done = 0;
    // A group that failed stays where it is: later kernels see the abort word and end at once. A
    // peer that failed in this op has said so before it was done.
    if (flags[1] != 0 && !Aborted()) control_->epoch = epoch_;
  }
}

}  // namespace wideep
