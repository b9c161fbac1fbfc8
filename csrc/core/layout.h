// The library's own memory on each rank of a node, and what a rank knows of its peers' memory.
//
// Every rank of a group has one arena of the same layout, zeroed when the group is made and mapped
// by all its peers. Allocation on the host and pointers on the device both come from ArenaLayout.
// Who writes and who reads each part:
//
//   control        its own rank's kernels; `abort` also by peers; `masked` the host
//   peer_table     the host, once
//   published      slot [src] by rank src: where its buffers lie in this epoch
//   done           [src] by rank src: "finished with your buffers in this epoch"
//   counts         [src] by rank src: selections per expert; each word carries its epoch
//   accepted       the same after capacity, only when some rank's capacity is short
//   block_counts   [round][block] its own rank's blocks: scratch of the plan
//   sum_warps      [chunk] its own rank's warps: those that have done their sums of the chunk
//   sums_ready     [src][chunk] by rank src: the epoch in which its sums of the chunk are there
//   ring_tail      [src][channel] by rank src: tokens put into the ring
//   ring_head      [dst][channel] by rank dst: tokens taken out of this rank's ring at dst
//   ring_taken     [src][channel] its own rank: tokens it took out so far
//   ring_slots     [src][channel][slot] by rank src: the tokens
//   low_latency    see LowLatencyLayout
//
// Flags and epochs only ever count up (modulo 2^32), so nothing is cleared between calls and a
// captured graph replays correctly. In the throughput shape no rank starts an op before all ranks
// have finished the one before (see exchange_protocol.cuh), so one copy of each part is enough.
//
// When ranks are masked or taken back, all that take part stop, clear their own arenas but for the
// peer table, and begin again with the counts of a new group.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/core/host_device.h"

namespace wideep {

/// Ranks whose memory reaches each other directly.
constexpr int kMaxRanks = 16;
/// Regions of a rank's memory that its peers can map.
constexpr int kMaxRegions = 8;
/// Buffers that an op publishes to its peers.
constexpr int kMaxPublished = 5;
/// Parts of a rank's tokens whose sums are made and fetched apart (combine_reduce.cuh).
constexpr int kMaxSumChunks = 16;
/// Shared memory that a block may use: 227 KB on compute capability 9.0.
constexpr int64_t kMaxSharedBytes = 227 * 1024;
/// Tokens that a ring holds: how far a sender may run ahead.
constexpr int kRingSlots = 4;
/// Most selections of a token in the kernels: a lane each, beside the lanes of kArrivalWindow.
constexpr int kMaxKernelTopK = 24;

/// A piece of a rank's memory and where this rank sees it.
struct MappedRegion {
  uint64_t owner_base;  // in the owner's address space
  uint64_t num_bytes;
  char* here;
};

struct PeerTable {
  char* arena[kMaxRanks];
  int32_t num_regions[kMaxRanks];
  MappedRegion regions[kMaxRanks][kMaxRegions];
};

/// Where a buffer lies, as one word that vouches for itself: a reader that finds its own epoch in
/// it knows that the buffer is ready.
struct PublishedWord {
  static constexpr uint32_t kNotMapped = 0xff;
  static constexpr uint64_t kMaxOffset = (uint64_t{1} << 40) - 1;

  WIDEEP_HOST_DEVICE static constexpr uint64_t Pack(uint32_t epoch, uint32_t region,
                                                    uint64_t offset) {
    return uint64_t{epoch & 0xffff} << 48 | uint64_t{region} << 40 | offset;
  }
  WIDEEP_HOST_DEVICE static constexpr bool IsOf(uint64_t word, uint32_t epoch) {
    return word >> 48 == (epoch & 0xffff);
  }
  WIDEEP_HOST_DEVICE static constexpr uint32_t Region(uint64_t word) { return word >> 40 & 0xff; }
  WIDEEP_HOST_DEVICE static constexpr uint64_t Offset(uint64_t word) { return word & kMaxOffset; }
};

/// A count that vouches for itself, as above.
struct CountWord {
  WIDEEP_HOST_DEVICE static constexpr uint64_t Pack(uint32_t epoch, uint32_t count) {
    return uint64_t{epoch} << 32 | count;
  }
  WIDEEP_HOST_DEVICE static constexpr bool IsOf(uint64_t word, uint32_t epoch) {
    return word >> 32 == epoch;
  }
  WIDEEP_HOST_DEVICE static constexpr uint32_t Count(uint64_t word) {
    return static_cast<uint32_t>(word);
  }
};

/// What this rank's kernels remember from one launch to the next.
struct Control {
  uint32_t epoch;               // ops finished
  uint32_t blocks_done;         // blocks of the current op that have finished
  uint32_t barrier_arrived;     // blocks at the barrier of the current launch
  uint32_t barrier_generation;  // barriers passed
  uint32_t failed;              // 1 once this rank has written its error record
  uint32_t ll_sent[2];          // low-latency calls of each LowLatencyKind sent
  uint32_t ll_received[4];      // the last one received with each buffer of each kind
  uint32_t ll_blocks_begun[4];  // blocks of a current send (receive) half of each kind that have
                                // begun
  uint32_t masked;              // bit r: rank r is left out; changes only while no kernel runs
  uint32_t pad[16];
  uint32_t abort;  // an AbortWord, or 0; by any rank
  uint32_t pad_to_line[31];
};

/// What a token carries beside its row in a ring slot. Followed by a word for each of its rows at
/// the receiver (where it lies) and, from word top_k on, another one (what the op sends with it).
struct RingHeader {
  int32_t num_rows;  // kRingEnd: no more tokens in this channel
  int32_t token;     // at its home rank
  int32_t arrival;   // place of the first of the rows in arrival order; plan only
  int32_t pad;

  WIDEEP_HOST_DEVICE int32_t* words() { return reinterpret_cast<int32_t*>(this + 1); }
  WIDEEP_HOST_DEVICE const int32_t* words() const {
    return reinterpret_cast<const int32_t*>(this + 1);
  }
};
constexpr int32_t kRingEnd = -1;

WIDEEP_HOST_DEVICE constexpr int64_t RingHeaderBytes(int top_k) {
  return (16 + 8 * int64_t{top_k} + 127) / 128 * 128;
}

/// Settings that give an arena its size; the same on every rank.
struct ArenaConfig {
  int num_ranks;
  int num_experts;
  int top_k;
  int64_t max_row_bytes;  // of a row in a ring
  int num_sms;            // blocks of an exchange kernel
  /// Most tokens of a rank in a low-latency call; 0: the group makes none.
  int64_t chunk = 0;
  /// Low-latency dispatch sends a token once to each rank that hosts experts of it, or once to each
  /// of its experts.
  bool once_per_rank = true;
};

/// The two numberings of low-latency calls, and their buffers.
enum class LowLatencyKind { kDispatch, kCombine };

/// Most pieces of a row that warps send and receive apart, each with its own flag.
constexpr int kMaxPieces = 8;

/// What the low-latency kernels use of an arena; offsets in bytes from its start. Who writes what:
///
///   done            [kind][buffer][src] by rank src: the last call it received with that buffer
///   and for each of the two buffers, all with the epoch of the call inside:
///   expert_counts   [local expert][src] by rank src: rows it sends to the expert
///   token_counts    [src] by rank src: tokens that it sends, under once_per_rank
///   arrival_flags   [slot][piece] by rank src: the piece is there, and in how many rows it goes
///   arrival_rows    [slot] by rank src: a token as it travels
///   arrival_entries [slot][piece][i] by rank src, vouched for by the flag: an ArrivalEntry
///   home_flags      [selection][piece] by the expert's rank: the piece is there
///   home_rows       [selection] by the expert's rank: a row of expert output
///   home_dots       [selection][piece] by the expert's rank: combine's gradient
///
/// A slot is src * chunk + i for token i from rank src under once_per_rank; otherwise
/// (local expert * num_ranks + src) * chunk + i for its row i to that expert. A selection is
/// token * top_k + k.
struct LowLatencyLayout {
  int64_t done = 0;
  int64_t buffers = 0;
  int64_t buffer_bytes = 0;
  // From the start of a buffer:
  int64_t expert_counts = 0;
  int64_t token_counts = 0;
  int64_t arrival_flags = 0;
  int64_t arrival_entries = 0;
  int64_t arrival_rows = 0;
  int64_t home_flags = 0;
  int64_t home_dots = 0;
  int64_t home_rows = 0;

  int64_t row_stride = 0;
  int64_t chunk = 0;
  int32_t top_k = 0;
  int32_t entries_per_slot = 0;
  bool once_per_rank = true;

  LowLatencyLayout() = default;
  /// Begins at `begin` and ends at `end()`.
  constexpr LowLatencyLayout(const ArenaConfig& config, int64_t begin) {
    const int64_t ranks = config.num_ranks;
    const int64_t local_experts = config.num_experts / ranks;
    chunk = config.chunk;
    top_k = config.top_k;
    once_per_rank = config.once_per_rank;
    entries_per_slot = once_per_rank ? top_k : 1;
    row_stride = (config.max_row_bytes + 127) / 128 * 128;
    const int64_t slots = ranks * chunk * (once_per_rank ? 1 : local_experts);
    const int64_t selections = chunk * top_k;
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t offset = at;
      at = (at + bytes + 127) / 128 * 128;
      return offset;
    };
    expert_counts = take(ranks * local_experts * 8);
    token_counts = take(ranks * 8);
    arrival_flags = take(slots * kMaxPieces * 8);
    arrival_entries = take(slots * kMaxPieces * entries_per_slot * 16);
    arrival_rows = take(slots * row_stride);
    home_flags = take(selections * kMaxPieces * 4);
    home_dots = take(selections * kMaxPieces * 8);
    home_rows = take(selections * row_stride);
    buffer_bytes = chunk > 0 ? at : 0;
    done = begin;
    buffers = begin + (2 * 2 * ranks * 4 + 127) / 128 * 128;
  }
  WIDEEP_HOST_DEVICE constexpr int64_t end() const { return buffers + 2 * buffer_bytes; }

  WIDEEP_HOST_DEVICE constexpr int64_t Buffer(uint32_t epoch) const {
    return buffers + (epoch & 1) * buffer_bytes;
  }
  /// Which of Control's ll_received, and which part of `done`, belongs to a call.
  WIDEEP_HOST_DEVICE static constexpr int KindAndBuffer(LowLatencyKind kind, uint32_t epoch) {
    return static_cast<int>(kind) * 2 + static_cast<int>(epoch & 1);
  }
  WIDEEP_HOST_DEVICE constexpr int64_t Done(int kind_and_buffer, int num_ranks) const {
    return done + int64_t{kind_and_buffer} * num_ranks * 4;
  }
};

/// Where a row of an arriving token goes.
struct ArrivalEntry {
  int32_t place;      // local expert * chunk + its place among the source's rows of that expert
  int32_t selection;  // token * top_k + k at its home
  float weight;       // combine's gradient only
  int32_t pad;
};

/// Channels: each is one ring per pair of ranks, with a warp at its sending end, and carries a
/// contiguous part of a rank's tokens. Half of the blocks (at least two) send; what the other half
/// can drain bounds the number too.
constexpr int kWarpsPerBlock = 16;
constexpr int kCombineGroupsPerBlock = 2;
WIDEEP_HOST_DEVICE constexpr int RingChannels(int num_blocks, int num_ranks) {
  const int senders = num_blocks / 2 * kWarpsPerBlock / num_ranks;
  const int receivers = num_blocks / 2 * kCombineGroupsPerBlock;
  const int channels = senders < receivers ? senders : receivers;
  return channels < 1 ? 1 : channels;
}

/// Offsets in bytes from the start of the arena.
struct ArenaLayout {
  static constexpr int64_t kControl = 0;
  int64_t peer_table;
  int64_t published;
  int64_t done;
  int64_t counts;
  int64_t accepted;
  int64_t block_counts;
  int64_t sum_warps;
  int64_t sums_ready;
  int64_t ring_tail;
  int64_t ring_head;
  int64_t ring_taken;
  int64_t ring_slots;
  LowLatencyLayout low_latency;
  int64_t num_bytes;

  int32_t num_ranks;
  int32_t num_experts;
  int32_t num_blocks;  // of a kernel, at most
  int32_t ring_channels;
  int64_t max_slot_bytes;

  ArenaLayout() = default;
  explicit constexpr ArenaLayout(const ArenaConfig& config)
      : peer_table(0),
        published(0),
        done(0),
        counts(0),
        accepted(0),
        block_counts(0),
        sum_warps(0),
        sums_ready(0),
        ring_tail(0),
        ring_head(0),
        ring_taken(0),
        ring_slots(0),
        num_bytes(0),
        num_ranks(config.num_ranks),
        num_experts(config.num_experts),
        num_blocks(config.num_sms),
        ring_channels(RingChannels(config.num_sms, config.num_ranks)),
        max_slot_bytes(RingHeaderBytes(config.top_k) + config.max_row_bytes) {
    const int64_t ranks = config.num_ranks;
    const int64_t rings = ranks * ring_channels;
    int64_t at = sizeof(Control);
    const auto take = [&at](int64_t bytes) {
      const int64_t offset = at;
      at = (at + bytes + 127) / 128 * 128;
      return offset;
    };
    peer_table = take(sizeof(PeerTable));
    published = take(ranks * kMaxPublished * 8);
    done = take(ranks * 4);
    counts = take(ranks * num_experts * 8);
    accepted = take(ranks * num_experts * 8);
    block_counts = take(2 * int64_t{config.num_sms} * (num_experts + ranks) * 4);
    sum_warps = take(kMaxSumChunks * 4);
    sums_ready = take(ranks * kMaxSumChunks * 4);
    ring_tail = take(rings * 4);
    ring_head = take(rings * 4);
    ring_taken = take(rings * 4);
    ring_slots = take(rings * kRingSlots * max_slot_bytes);
    low_latency = LowLatencyLayout(config, at);
    num_bytes = low_latency.end();
  }

  WIDEEP_HOST_DEVICE int64_t RingIndex(int peer, int channel) const {
    return int64_t{peer} * ring_channels + channel;
  }
  /// Where the parts after the peer table begin; everything but that table can be cleared.
  constexpr int64_t after_peer_table() const { return published; }
};

}  // namespace wideep
