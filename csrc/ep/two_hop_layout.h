// The two-hop exchange between nodes: which ranks stand where, and the registered memory of a rank.
//
//   dispatch   source --across--> forwarder --in node--> hosts of the token's experts
//   combine    hosts --in node--> forwarder --across--> home
//
// A token crosses once to each node that hosts experts of it, to the node's rank of the same index,
// its forwarder there. Within its own node a token's forwarder is its home rank. Nodes need not be
// equal: index i of a node of S ranks stands for index i, i + S, i + 2 S .. of larger nodes.
//
// All memory is in one arena of the same layout on every rank, zeroed once. Every word of it has
// one writer: see RingPlace.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"

namespace wideep::two_hop {

constexpr int kMaxNodes = 128;
/// Ranks of a node: a bit each in the masks of the protocol.
constexpr int kMaxNodeRanks = 16;

/// Ranks in nodes: node n has ranks first_rank[n] to first_rank[n + 1].
struct Nodes {
  int32_t num_ranks = 0;
  int32_t num_nodes = 0;
  int32_t max_node_ranks = 0;
  /// Most ranks of one node that the same rank of another node stands for.
  int32_t fan = 1;
  int16_t first_rank[kMaxNodes + 1] = {};

  WIDEEP_HOST_DEVICE constexpr int SizeOf(int node) const {
    return first_rank[node + 1] - first_rank[node];
  }
  WIDEEP_HOST_DEVICE constexpr int NodeOf(int rank) const {
    int low = 0;
    int high = num_nodes;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_rank[middle] <= rank ? low : high) = middle;
    }
    return low;
  }
  WIDEEP_HOST_DEVICE constexpr int IndexOf(int rank) const {
    return rank - first_rank[NodeOf(rank)];
  }
  /// Who takes in the tokens of `rank` on `node`, and sends its sums back.
  WIDEEP_HOST_DEVICE constexpr int Forwarder(int rank, int node) const {
    return first_rank[node] + IndexOf(rank) % SizeOf(node);
  }
  /// The number under which a forwarder on `node` knows `rank`, below num_inputs().
  WIDEEP_HOST_DEVICE constexpr int Input(int rank, int node) const {
    return NodeOf(rank) * fan + IndexOf(rank) / SizeOf(node);
  }
  WIDEEP_HOST_DEVICE constexpr int num_inputs() const { return num_nodes * fan; }
  /// The rank that `forwarder` knows as `input`; -1: none.
  WIDEEP_HOST_DEVICE constexpr int SourceOf(int forwarder, int input) const {
    const int node = input / fan;
    const int index = IndexOf(forwarder) + input % fan * SizeOf(NodeOf(forwarder));
    return index < SizeOf(node) ? first_rank[node] + index : -1;
  }
};

/// The same on every rank.
struct Config {
  Nodes nodes;
  int32_t num_experts = 0;
  int32_t num_channels = 1;  // parts of a rank's tokens that travel apart
  int32_t across_slots = 8;  // tokens that a ring between nodes holds
  int32_t across_batch = 4;  // tokens to a put
  int32_t node_slots = 4;    // tokens that a ring in a node holds; 0: hosts' buffers are mapped
  int64_t slot_bytes = 0;    // header and row
};

/// What travels before a token's row in a slot. Entries: the token's selections that the slot is
/// for, in order of k.
struct SlotHeader {
  struct Entry {
    int16_t host;  // index in its node
    int16_t k;
    int32_t row;      // at the host
    int32_t arrival;  // place in the host's order of arrival
    int32_t word;     // what the op sends with the selection
  };
  int32_t token;  // at its home rank
  int32_t num_entries;
  int32_t last;  // 1: the channel ends with this token, which may have no entries
  int32_t pad;

  WIDEEP_HOST_DEVICE Entry* entries() { return reinterpret_cast<Entry*>(this + 1); }
  WIDEEP_HOST_DEVICE const Entry* entries() const {
    return reinterpret_cast<const Entry*>(this + 1);
  }
};
WIDEEP_HOST_DEVICE constexpr int64_t SlotHeaderBytes(int top_k) {
  return (16 + 16 * int64_t{top_k} + 127) / 128 * 128;
}

/// The part of a rank's tokens that travels in a channel.
struct ChannelTokens {
  int64_t begin;
  int64_t end;
};
WIDEEP_HOST_DEVICE constexpr ChannelTokens TokensOf(int64_t num_tokens, int channel,
                                                    int num_channels) {
  return {num_tokens * channel / num_channels, num_tokens * (channel + 1) / num_channels};
}

/// One ring as its two ends see it; offsets in bytes from the start of the arena of the rank named.
/// Positions count tokens over all ops and are never reset.
///
///   slots     at receiver  [num_slots] by the sender
///   arrived   at receiver  [num_slots] u64 by the sender: the position after the batch that begins
///                          in the slot
///   taken     at receiver  u64 by the receiver: its position between ops
///   staging   at sender    [num_slots] by the sender, for puts
///   credits   at sender    u64 by the receiver, which adds: tokens taken out so far
///   sent      at sender    u64 by the sender: its position between ops
struct RingPlace {
  int32_t sender = 0;
  int32_t receiver = 0;
  int32_t num_slots = 0;
  int32_t batch = 1;
  int64_t slots = 0;
  int64_t arrived = 0;
  int64_t taken = 0;
  int64_t staging = -1;
  int64_t credits = 0;
  int64_t sent = 0;
};

/// Directions have rings of their own, so that a dispatch and a combine may be under way together.
enum class Direction { kOut, kBack };

class Layout {
 public:
  Layout() = default;
  explicit constexpr Layout(const Config& config) : config_(config) {
    const int64_t across = int64_t{config.nodes.num_inputs()} * config.num_channels;
    const int64_t in_node = config.node_slots > 0 ? across * config.nodes.max_node_ranks : 0;
    for (Set& set : sets_) {
      const bool crosses = &set == &sets_[0] || &set == &sets_[1];
      const int64_t rings = crosses ? across : in_node;
      const int64_t slots = crosses ? config.across_slots : config.node_slots;
      set.slots = Take(rings * slots * config.slot_bytes);
      set.staging = crosses ? Take(rings * slots * config.slot_bytes) : -1;
      set.arrived = Take(rings * slots * 8);
      set.taken = Take(rings * 8);
      set.credits = Take(rings * 8);
      set.sent = Take(rings * 8);
    }
    counts_ = Take(2 * int64_t{config.nodes.num_ranks} * counts_bytes());
    counts_arrived_ = Take(2 * int64_t{config.nodes.num_ranks} * 8);
  }

  WIDEEP_HOST_DEVICE constexpr const Config& config() const { return config_; }
  WIDEEP_HOST_DEVICE constexpr int64_t num_bytes() const { return num_bytes_; }

  /// Between `rank` and its forwarder on another node.
  WIDEEP_HOST_DEVICE constexpr RingPlace Across(Direction direction, int rank, int node,
                                                int channel) const {
    const Nodes& nodes = config_.nodes;
    const int64_t here = int64_t{node} * config_.num_channels + channel;
    const int64_t there = int64_t{nodes.Input(rank, node)} * config_.num_channels + channel;
    const int forwarder = nodes.Forwarder(rank, node);
    return direction == Direction::kOut ? Place(sets_[0], rank, here, forwarder, there, true)
                                        : Place(sets_[1], forwarder, there, rank, here, true);
  }
  /// Between the forwarder of `rank` on the node of `host`, and `host`.
  WIDEEP_HOST_DEVICE constexpr RingPlace InNode(Direction direction, int rank, int host,
                                                int channel) const {
    const Nodes& nodes = config_.nodes;
    const int node = nodes.NodeOf(host);
    const int forwarder = nodes.Forwarder(rank, node);
    const int input = nodes.Input(rank, node);
    const auto ring = [&](int peer) {
      const int64_t of_peer = int64_t{nodes.IndexOf(peer)} * nodes.num_inputs() + input;
      return of_peer * config_.num_channels + channel;
    };
    return direction == Direction::kOut
               ? Place(sets_[2], forwarder, ring(host), host, ring(forwarder), false)
               : Place(sets_[3], host, ring(forwarder), forwarder, ring(host), false);
  }

  /// Counts of `rank`, [num_experts] int32, in the plan of that epoch. Two buffers: a rank sends
  /// counts of epoch e + 2 only after it has those of e + 1 from all, who have read those of e.
  /// Each buffer has a word of its own, since what was sent for e + 2 may come before something of
  /// e + 1.
  WIDEEP_HOST_DEVICE constexpr int64_t Counts(uint64_t epoch, int rank) const {
    const int64_t block = int64_t(epoch & 1) * config_.nodes.num_ranks + rank;
    return counts_ + block * counts_bytes();
  }
  /// Of a rank's counts, rounded up: networks move units of 16 bytes.
  WIDEEP_HOST_DEVICE constexpr int64_t counts_bytes() const {
    return (int64_t{config_.num_experts} * 4 + 15) / 16 * 16;
  }
  /// u64: the epoch of the counts that the buffer holds.
  WIDEEP_HOST_DEVICE constexpr int64_t CountsArrived(uint64_t epoch, int rank) const {
    const int64_t block = int64_t(epoch & 1) * config_.nodes.num_ranks + rank;
    return counts_arrived_ + block * 8;
  }

 private:
  struct Set {
    int64_t slots = 0;
    int64_t staging = 0;
    int64_t arrived = 0;
    int64_t taken = 0;
    int64_t credits = 0;
    int64_t sent = 0;
  };

  constexpr int64_t Take(int64_t bytes) {
    const int64_t offset = num_bytes_;
    num_bytes_ += (bytes + 127) / 128 * 128;
    return offset;
  }
  WIDEEP_HOST_DEVICE constexpr RingPlace Place(const Set& set, int sender, int64_t of_sender,
                                               int receiver, int64_t of_receiver,
                                               bool across) const {
    RingPlace place;
    place.sender = sender;
    place.receiver = receiver;
    place.num_slots = across ? config_.across_slots : config_.node_slots;
    place.batch = across ? config_.across_batch : 1;
    place.slots = set.slots + of_receiver * place.num_slots * config_.slot_bytes;
    place.arrived = set.arrived + of_receiver * place.num_slots * 8;
    place.taken = set.taken + of_receiver * 8;
    place.staging = across ? set.staging + of_sender * place.num_slots * config_.slot_bytes : -1;
    place.credits = set.credits + of_sender * 8;
    place.sent = set.sent + of_sender * 8;
    return place;
  }

  Config config_;
  Set sets_[4];  // across: out, back; in node: out, back
  int64_t counts_ = 0;
  int64_t counts_arrived_ = 0;
  int64_t num_bytes_ = 0;
};

/// What a rank's kernels remember from one op to the next; in its registered memory after what
/// Layout places, zeroed with it.
struct RankState {
  /// By Direction: slots with a row that this rank has put, and the bytes of all slots that it has.
  unsigned long long tokens_put[2];
  unsigned long long bytes_put[2];
  /// The plan's last exchange of counts.
  uint64_t counts_epoch;
  uint64_t pad[11];
};

}  // namespace wideep::two_hop
