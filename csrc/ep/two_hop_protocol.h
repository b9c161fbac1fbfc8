// The rings of the two-hop exchange and everyone who works at them, as state machines over memory
// operations: kernels, threads of a test and a model checker run the same code.
//
// Every part of the exchange is a Stage: it takes tokens in order from its input rings, works on
// each, and puts it into its output rings.
//
//   dispatch   stage       of             inputs                     outputs
//              sender      source, node   -                          across
//              forwarder   source         across, or its own tokens  hosts that want the token
//              receiver    source         in node                    - (writes the rows)
//   combine    host        home           - (sums its rows)          in node
//              reducer     home           hosts that have the token  across
//              home        home           across, and its own node's hosts   - (writes the sum)
//
// Stages of different (rank, channel) share nothing. Where buffers of a node's ranks are mapped,
// the rings in the node fall away: forwarders write rows in place, reducers read them.
//
// Arrival. A sender hands over a batch of consecutive slots with one put and one signal: the word
// of the batch's first slot gets the position after the batch. A network may deliver puts in any
// order, and the signal of one before the data of another; so a signal vouches for its own put
// only, and no word is written again before its batch was read. A receiver at a position therefore
// looks at one word, and a word from an earlier lap is never above the position. Credits are added,
// never set: additions may come in any order.
//
// Memory order. A word: release after the payload of its put; acquire by the receiver, then
// payload. Credits: release after the reads of the slots; acquire by the sender, then new payload,
// in the staging slots too: what the receiver has read has left them.
//
// Progress. Before a stage waits it hands over all that it holds back, and frees all that it has
// read. Rings of a (rank, channel) are separate and all its stages take tokens in the same order,
// so the first token that is not through can always move: nothing ahead of it holds a slot. A
// thread that serves several stages steps them in turn and never waits inside one.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"

namespace wideep::two_hop {

/// The sending end's positions: sent >= handed_over >= credits >= sent - num_slots.
struct SenderEnd {
  uint64_t sent;
  uint64_t handed_over;
  uint64_t credits;  // the last that was seen
  uint32_t num_slots;
  uint32_t batch;
  uint32_t slot;  // of position `sent`; kept, since divisions of 64 bits are slow in kernels
  uint32_t pad;   // the explorer compares states by their bytes

  WIDEEP_HOST_DEVICE void Begin(uint64_t position, uint32_t slots, uint32_t tokens_to_a_put) {
    sent = handed_over = position;
    credits = position - slots;  // none seen yet
    num_slots = slots;
    batch = tokens_to_a_put;
    slot = static_cast<uint32_t>(position % slots);
  }
  WIDEEP_HOST_DEVICE bool HasSpace() const { return sent - credits < num_slots; }
  WIDEEP_HOST_DEVICE bool Holds() const { return sent != handed_over; }
  /// A batch is full, or ends with the ring: its slots have to lie next to each other.
  WIDEEP_HOST_DEVICE bool MustHandOver() const {
    return Holds() && (sent - handed_over == batch || slot == 0);
  }
  WIDEEP_HOST_DEVICE void Send() {
    ++sent;
    if (++slot == num_slots) slot = 0;
  }
  /// The slot of position `handed_over`, if it Holds.
  WIDEEP_HOST_DEVICE uint32_t FirstHeldSlot() const {
    return (slot == 0 ? num_slots : slot) - static_cast<uint32_t>(sent - handed_over);
  }
};

/// The receiving end's positions: known >= taken >= freed.
struct ReceiverEnd {
  uint64_t known;  // tokens before this have arrived
  uint64_t taken;
  uint64_t freed;
  uint32_t num_slots;
  uint32_t slot;  // of position `taken`

  WIDEEP_HOST_DEVICE void Begin(uint64_t position, uint32_t slots) {
    known = taken = freed = position;
    num_slots = slots;
    slot = static_cast<uint32_t>(position % slots);
  }
  WIDEEP_HOST_DEVICE bool HasToken() const { return known != taken; }
  WIDEEP_HOST_DEVICE bool MustFree() const { return taken == known && taken != freed; }
  WIDEEP_HOST_DEVICE void Take() {
    ++taken;
    if (++slot == num_slots) slot = 0;
  }
};

enum class Progress : uint8_t { kMoved, kWaits, kDone };

/// A set of inputs or outputs.
template <int kMax>
struct Bits {
  static constexpr int kWords = kMax > 0 ? (kMax + 63) / 64 : 1;
  uint64_t words[kWords] = {};

  WIDEEP_HOST_DEVICE void Set(int i) { words[i / 64] |= uint64_t{1} << i % 64; }
  WIDEEP_HOST_DEVICE bool Has(int i) const { return words[i / 64] >> i % 64 & 1; }
};

/// `Env` does what touches memory; a stage calls at most one of these in a step:
///
///   bool Next(Bits<kMaxInputs>& inputs)    whether there is another token; adds the inputs it
///   comes
///                                          from to the empty set
///   void Outputs(Bits<kMaxOutputs>&)       adds the outputs it goes to; all inputs have arrived
///   void Work()                            read input slots, write output slots
///   uint64_t Arrived(int input, uint32_t slot)                   acquire
///   void Free(int input, uint64_t tokens)                        release; adds
///   uint64_t Credits(int output)                                 acquire
///   void HandOver(int output, uint64_t first, uint64_t end)      put, release
template <int kMaxInputs, int kMaxOutputs>
struct Stage {
  enum Phase : uint8_t { kNext, kInputs, kChoose, kOutputs, kWork, kAfter, kFlush, kEnded };

  ReceiverEnd in[kMaxInputs > 0 ? kMaxInputs : 1];
  SenderEnd out[kMaxOutputs > 0 ? kMaxOutputs : 1];
  Bits<kMaxInputs> inputs;
  Bits<kMaxOutputs> outputs;
  int8_t ready = 0;  // inputs, then outputs, below this one are
  Phase phase = kNext;

  template <typename Env>
  WIDEEP_HOST_DEVICE Progress Step(Env& env) {
    switch (phase) {
      case kNext:
        inputs = {};
        ready = 0;
        phase = env.Next(inputs) ? kInputs : kFlush;
        return Progress::kMoved;
      case kInputs:
        while (ready < kMaxInputs && !inputs.Has(ready)) ++ready;
        if constexpr (kMaxInputs > 0) {
          if (ready < kMaxInputs) return WaitForInput(env, ready);
        }
        phase = kChoose;
        return Progress::kMoved;
      case kChoose:
        outputs = {};
        ready = 0;
        env.Outputs(outputs);
        phase = kOutputs;
        return Progress::kMoved;
      case kOutputs:
        while (ready < kMaxOutputs && !outputs.Has(ready)) ++ready;
        if constexpr (kMaxOutputs > 0) {
          if (ready < kMaxOutputs) return WaitForOutput(env, ready);
        }
        phase = kWork;
        return Progress::kMoved;
      case kWork:
        env.Work();
        for (int i = 0; i < kMaxInputs; ++i) {
          if (inputs.Has(i)) in[i].Take();
        }
        for (int i = 0; i < kMaxOutputs; ++i) {
          if (outputs.Has(i)) out[i].Send();
        }
        phase = kAfter;
        return Progress::kMoved;
      case kAfter:
        for (int i = 0; i < kMaxOutputs; ++i) {
          if (outputs.Has(i) && out[i].MustHandOver()) return HandOver(env, i);
        }
        for (int i = 0; i < kMaxInputs; ++i) {
          if (inputs.Has(i) && in[i].MustFree()) return Free(env, i);
        }
        phase = kNext;
        return Progress::kMoved;
      case kFlush:
        if (GiveAway(env)) return Progress::kMoved;
        phase = kEnded;
        return Progress::kMoved;
      case kEnded:
        break;
    }
    return Progress::kDone;
  }

  /// The slot of the token that Work reads (writes).
  WIDEEP_HOST_DEVICE uint32_t InputSlot(int i) const { return in[i].slot; }
  WIDEEP_HOST_DEVICE uint32_t OutputSlot(int i) const { return out[i].slot; }

 private:
  template <typename Env>
  WIDEEP_HOST_DEVICE Progress WaitForInput(Env& env, int i) {
    ReceiverEnd& ring = in[i];
    if (!ring.HasToken()) {
      const uint64_t word = env.Arrived(i, InputSlot(i));
      if (word <= ring.taken) return Wait(env);
      ring.known = word;
    }
    ++ready;
    return Progress::kMoved;
  }

  template <typename Env>
  WIDEEP_HOST_DEVICE Progress WaitForOutput(Env& env, int i) {
    SenderEnd& ring = out[i];
    if (!ring.HasSpace()) {
      ring.credits = env.Credits(i);
      if (!ring.HasSpace()) return Wait(env);
    }
    ++ready;
    return Progress::kMoved;
  }

  template <typename Env>
  WIDEEP_HOST_DEVICE Progress Wait(Env& env) {
    return GiveAway(env) ? Progress::kMoved : Progress::kWaits;
  }

  /// One thing that is held back; false: nothing is.
  template <typename Env>
  WIDEEP_HOST_DEVICE bool GiveAway(Env& env) {
    for (int i = 0; i < kMaxOutputs; ++i) {
      if (out[i].Holds()) return HandOver(env, i) == Progress::kMoved;
    }
    for (int i = 0; i < kMaxInputs; ++i) {
      if (in[i].taken != in[i].freed) return Free(env, i) == Progress::kMoved;
    }
    return false;
  }

  template <typename Env>
  WIDEEP_HOST_DEVICE Progress HandOver(Env& env, int i) {
    env.HandOver(i, out[i].handed_over, out[i].sent);
    out[i].handed_over = out[i].sent;
    return Progress::kMoved;
  }

  template <typename Env>
  WIDEEP_HOST_DEVICE Progress Free(Env& env, int i) {
    env.Free(i, in[i].taken - in[i].freed);
    in[i].freed = in[i].taken;
    return Progress::kMoved;
  }
};

/// The counts of a plan, gathered as they go: each rank sends its own to its forwarder on every
/// other node and to the ranks of its node; a forwarder passes what came on within its node. Ends
/// when the counts of all ranks are here. `Nodes` as in two_hop_layout.h. `Env`:
///
///   bool Came(int src)                   acquire: the counts of another rank, src, are here
///   void Send(int src, int peer)         the counts of src, which are here, to peer; release
struct CountsExchange {
  int32_t step = 0;  // 0: own counts are to be sent; then 1 + the rank that is waited for
  int32_t peer = 0;

  template <typename Nodes, typename Env>
  WIDEEP_HOST_DEVICE Progress Step(const Nodes& nodes, int rank, Env& env) {
    if (step > nodes.num_ranks) return Progress::kDone;
    const int src = step == 0 ? rank : step - 1;
    const bool again = step > 0 && src == rank;
    if (peer == 0 && !again && step > 0 && !env.Came(src)) return Progress::kWaits;
    while (peer < nodes.num_ranks && (again || !Sends(nodes, rank, src, peer))) ++peer;
    if (peer < nodes.num_ranks) {
      env.Send(src, peer++);
    } else {
      peer = 0;
      ++step;
    }
    return Progress::kMoved;
  }

  /// Whether `rank` sends the counts of `src` to `peer`.
  template <typename Nodes>
  static WIDEEP_HOST_DEVICE bool Sends(const Nodes& nodes, int rank, int src, int peer) {
    if (peer == rank || peer == src) return false;
    const int node = nodes.NodeOf(rank);
    const int peer_node = nodes.NodeOf(peer);
    if (peer_node == node) return nodes.Forwarder(src, node) == rank;
    return src == rank && nodes.Forwarder(src, peer_node) == peer;
  }
};

}  // namespace wideep::two_hop
