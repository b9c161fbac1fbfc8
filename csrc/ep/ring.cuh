// Tokens through fixed-size rings in the library's own memory: the path for buffers that peers
// cannot map, and the one that keeps memory and wire traffic small (zero_copy off).
//
// One ring for each (source rank, destination rank, channel), in the destination's arena; it holds
// kRingSlots tokens. The sending warp and the receiving end see tokens of a channel in order.
//
//   sender    waits until taken > sent - kRingSlots, writes a slot (header by ordinary stores of
//   the
//             warp, row by bulk copies of lane 0), and then releases `tail` = tokens put in so far:
//             after the bulk copies are complete (wait_group), a proxy fence and a warp barrier.
//             While there are rows it does so one token late, so that two are under way.
//   receiver  acquires `tail`, fences the proxies, reads the slot, and then releases `head` (in the
//             sender's arena) = tokens taken out so far, after a barrier of all that read.
//   reset     nobody: both only count up. Between two ops every ring is empty, so a sender may take
//             `head` as its own count; a receiver keeps its count in ring_taken.
//
// Rings from and to masked ranks are at rest.
#pragma once

#include "csrc/ep/bulk_pipe.cuh"
#include "csrc/ep/exchange_protocol.cuh"

namespace wideep {

/// The part of `num_tokens` that a channel carries.
struct TokenRange {
  int64_t begin;
  int64_t end;
};
WIDEEP_HOST_DEVICE constexpr TokenRange TokensOfChannel(int64_t num_tokens, int channel,
                                                        int num_channels) {
  return {num_tokens * channel / num_channels, num_tokens * (channel + 1) / num_channels};
}

/// What a block does while tokens go through rings.
struct RingRole {
  bool sends;
  int block;         // among those of its role
  int num_channels;  // of this launch

  __device__ explicit RingRole(int num_ranks) {
    const int senders = gridDim.x / 2;
    sends = static_cast<int>(blockIdx.x) < senders;
    block = sends ? blockIdx.x : blockIdx.x - senders;
    num_channels = RingChannels(gridDim.x, num_ranks);
  }
  /// This warp's ring: peer and channel, if channel < num_channels.
  __device__ int Warp() const { return block * kWarpsPerBlock + threadIdx.x / 32; }
};

/// The sending end of one ring; used by one warp.
class RingSender {
 public:
  __device__ RingSender(Exchange& exchange, int peer, int channel, int64_t slot_bytes)
      : exchange_(exchange), peer_(peer), slot_bytes_(slot_bytes), lane_(threadIdx.x % 32) {
    const ArenaLayout& layout = exchange.layout();
    const int64_t there = layout.RingIndex(exchange.rank(), channel);
    tail_ = exchange.In<uint32_t>(peer, layout.ring_tail) + there;
    slots_ =
        exchange.In<char>(peer, layout.ring_slots) + there * kRingSlots * layout.max_slot_bytes;
    head_ = reinterpret_cast<const uint32_t*>(exchange.arena() + layout.ring_head) +
            layout.RingIndex(peer, channel);
    sent_ = ptx::ld_acquire_sys_u32(head_);
  }

  /// The next free slot, or null if a rank gave up. All lanes.
  __device__ RingHeader* Slot() {
    bool free = true;
    if (lane_ == 0) {
      // Acquire: the receiver has read what the slot held.
      free = exchange_.Wait([&] { return sent_ - ptx::ld_acquire_sys_u32(head_) < kRingSlots; },
                            Phase::kRingHead, peer_);
    }
    if (!__shfl_sync(~0u, free, 0)) return nullptr;
    __syncwarp();              // lane 0's acquire, for all; a shuffle does not order memory
    ptx::fence_proxy_async();  // bulk copies may overwrite what was read
    return reinterpret_cast<RingHeader*>(slots_ + sent_ % kRingSlots * slot_bytes_);
  }

  /// Hands over the slot, whose row lane 0 has written by one group of bulk copies, or none of it.
  /// The receiver sees it after the next Push or Flush. All lanes.
  __device__ void PushLate() {
    __syncwarp();  // the header
    ++sent_;
    // All groups but this token's are complete.
    if (lane_ == 0) {
      ptx::cp_async_bulk_wait_group<1>();
      ptx::fence_proxy_async();
      // Release: headers and rows of the tokens before.
      ptx::st_release_sys_u32(tail_, sent_ - 1);
    }
  }
  /// Hands over the slot and all before. All lanes.
  __device__ void Push() {
    ++sent_;
    Flush();
  }
  /// Ends the slot; the receiver sees it after the next Flush. All lanes.
  __device__ void Defer() { ++sent_; }
  /// Hands over what PushLate or Defer kept back, and waits until it is written. All lanes.
  __device__ void Flush() {
    __syncwarp();
    if (lane_ == 0) {
      ptx::cp_async_bulk_wait_group<0>();
      ptx::fence_proxy_async();
      ptx::st_release_sys_u32(tail_, sent_);
    }
  }

 private:
  Exchange& exchange_;
  const int peer_;
  const int64_t slot_bytes_;
  const int lane_;
  uint32_t* tail_;
  const uint32_t* head_;
  char* slots_;
  uint32_t sent_;
};

/// The receiving end of one ring. Every thread that reads the slots has one; one of them frees.
class RingReceiver {
 public:
  __device__ RingReceiver(Exchange& exchange, int src, int channel, int64_t slot_bytes)
      : exchange_(exchange), src_(src), slot_bytes_(slot_bytes) {
    const ArenaLayout& layout = exchange.layout();
    const int64_t here = layout.RingIndex(src, channel);
    tail_ = reinterpret_cast<const uint32_t*>(exchange.arena() + layout.ring_tail) + here;
    slots_ = exchange.arena() + layout.ring_slots + here * kRingSlots * layout.max_slot_bytes;
    stored_count_ = reinterpret_cast<uint32_t*>(exchange.arena() + layout.ring_taken) + here;
    head_ =
        exchange.In<uint32_t>(src, layout.ring_head) + layout.RingIndex(exchange.rank(), channel);
    taken_ = *stored_count_;
  }

  /// Waits for the next token; false if a rank gave up. Any one thread of those that will read, if
  /// a barrier among them follows.
  __device__ bool Wait() {
    return exchange_.Wait(
        [&] { return static_cast<int32_t>(ptx::ld_acquire_sys_u32(tail_) - taken_) > 0; },
        Phase::kRingTail, src_);
  }
  __device__ const RingHeader* Slot() const {
    return reinterpret_cast<const RingHeader*>(slots_ + taken_ % kRingSlots * slot_bytes_);
  }
  /// On to the next token. `frees`: this thread tells the sender; a barrier among all that read
  /// comes before.
  __device__ void Pop(bool frees) {
    ++taken_;
    if (frees) Free();
  }
  /// Tells the sender how far this end is.
  __device__ void Free() { ptx::st_release_sys_u32(head_, taken_); }
  /// Remembers the count for the next op; one thread, after its last Pop.
  __device__ void Store() { *stored_count_ = taken_; }

 private:
  Exchange& exchange_;
  const int src_;
  const int64_t slot_bytes_;
  const uint32_t* tail_;
  uint32_t* head_;
  uint32_t* stored_count_;
  char* slots_;
  uint32_t taken_;
};

/// What the home rank's tokens send to the hosts of their experts.
struct RingTokens {
  int64_t num_tokens;
  int32_t top_k;
  const int32_t* dest_rank;  // [num_tokens, top_k]
  const int32_t* dest_row;   // [num_tokens, top_k]
  const char* rows;          // [num_tokens, row_bytes]; unused if row_bytes is 0
  int64_t row_bytes;
  /// [num_tokens, top_k], a word that goes with each selection; null: its k.
  const int32_t* words;
};

/// Every token goes once to each rank that has rows of it. `receive(header, row, src, free_slot)`
/// runs there by one warp, for every token in order, and calls free_slot() once it has read the
/// slot. `first_arrival`, if not null: of this rank's selections at each rank, to number arrivals.
/// `pipe`, of one stage, carries the rows; null if there are none. All threads; false if a rank
/// gave up.
template <typename Receive>
__device__ bool SendTokensThroughRings(Exchange& exchange, const RingTokens& t,
                                       const int32_t* first_arrival, BulkPipe* pipe,
                                       Receive receive) {
  const RingRole role(exchange.num_ranks());
  const int lane = threadIdx.x % 32;
  const int peer = role.Warp() % exchange.num_ranks();
  const int channel = role.Warp() / exchange.num_ranks();
  const int64_t header_bytes = RingHeaderBytes(t.top_k);
  const int64_t slot_bytes = header_bytes + t.row_bytes;
  if (channel >= role.num_channels || exchange.IsMasked(peer)) return true;

  if (!role.sends) {
    RingReceiver ring(exchange, peer, channel, slot_bytes);
    for (bool more = true; more;) {
      bool came = true;
      if (lane == 0) came = ring.Wait();
      if (!__shfl_sync(~0u, came, 0)) return false;
      __syncwarp();
      ptx::fence_proxy_async();
      const RingHeader* header = ring.Slot();
      more = header->num_rows != kRingEnd;
      const auto free_slot = [&] {
        __syncwarp();
        ring.Pop(lane == 0);
      };
      if (more) {
        receive(*header, reinterpret_cast<const char*>(header) + header_bytes, peer, free_slot);
      } else {
        free_slot();
      }
    }
    if (lane == 0) ring.Store();
    return true;
  }

  RingSender ring(exchange, peer, channel, slot_bytes);
  const TokenRange range = TokensOfChannel(t.num_tokens, channel, role.num_channels);
  int32_t arrival = 0;
  if (first_arrival != nullptr) {
    for (int64_t s = lane; s < range.begin * t.top_k; s += 32) arrival += t.dest_rank[s] == peer;
    arrival = first_arrival[peer] + __reduce_add_sync(~0u, arrival);
  }
  for (int64_t token = range.begin; token < range.end; ++token) {
    const int64_t s = token * t.top_k + lane;
    const bool mine = lane < t.top_k && t.dest_rank[s] == peer;
    const uint32_t lanes = __ballot_sync(~0u, mine);
    if (lanes == 0) continue;
    RingHeader* header = ring.Slot();
    if (header == nullptr) return false;
    if (mine) {
      const int place = __popc(lanes & ((1u << lane) - 1));
      header->words()[place] = t.dest_row[s];
      header->words()[t.top_k + place] = t.words != nullptr ? t.words[s] : lane;
    }
    if (lane == 0) {
      header->num_rows = __popc(lanes);
      header->token = static_cast<int32_t>(token);
      header->arrival = arrival;
    }
    arrival += __popc(lanes);
    if (pipe == nullptr) {
      ring.Push();
      continue;
    }
    char* const slot_row = reinterpret_cast<char*>(header) + header_bytes;
    for (int64_t at = 0; at < t.row_bytes; at += pipe->piece_bytes()) {
      const auto bytes = static_cast<uint32_t>(min(int64_t{pipe->piece_bytes()}, t.row_bytes - at));
      pipe->Load(t.rows + token * t.row_bytes + at, bytes);
      pipe->Wait();
      if (lane == 0) pipe->StoreForReading(slot_row + at, bytes);
      pipe->Release();
    }
    // With several groups a token, only a full Push knows that this one's are complete.
    t.row_bytes <= pipe->piece_bytes() ? ring.PushLate() : ring.Push();
  }
  RingHeader* header = ring.Slot();
  if (header == nullptr) return false;
  if (lane == 0) header->num_rows = kRingEnd;
  ring.Push();
  return true;
}

}  // namespace wideep
