// The two-hop exchange as a transition system, for model checkers: all memory, all messages under
// way and all stages of csrc/ep/two_hop_protocol.h in one plain state.
//
// A transition is one step of a stage, or one thing that the network does: the data of a put
// arrives (read from the staging slots at that moment), then its signal; credits arrive. Messages
// are taken in any order. Rows are tokens' numbers; a stage that works on another token than the
// one that is due sets `error`.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "csrc/ep/two_hop_layout.h"
#include "csrc/ep/two_hop_protocol.h"

namespace wideep::two_hop::model {

constexpr int kMaxRanks = 4;
constexpr int kMaxTokens = 4;
constexpr int kMaxActors = 18;
constexpr int kMaxRings = 16;
constexpr int kMaxSlots = 2;
constexpr int kMaxMessages = 16;
constexpr int kMaxInputs = 3;  // of a stage
constexpr int kMaxOutputs = 2;

/// Faults that a checker has to find.
enum class Fault {
  kNone,
  kOneTailWord,  // a batch's signal sets one word of the ring instead of its first slot's
  kSetCredits,   // credits are set to the position instead of added
  kFreeEarly,    // slots are freed when they arrive, before they are read
  kKeepStaging,  // a sender waits for no credits
  kInTurn,       // a rank finishes a stage before it begins the next one
};

enum class Op { kDispatch, kCombine };

struct Setup {
  Nodes nodes;
  Op op = Op::kDispatch;
  int num_slots = 2;
  int batch = 2;
  bool mapped = false;  // no rings inside nodes
  int num_ops = 1;      // one after the other on every rank
  int num_tokens[kMaxRanks] = {};
  uint32_t hosts[kMaxRanks][kMaxTokens] = {};  // ranks that host experts of a token
  Fault fault = Fault::kNone;
};

enum class Role : uint8_t { kSender, kForwarder, kReceiver, kHost, kReducer, kHome };

/// What a stage is; does not change.
struct Actor {
  Role role;
  int rank;
  int flow;  // the source or home rank
  int node;  // whose tokens count: a sender's target, otherwise its own
  int num_inputs = 0;
  int num_outputs = 0;
  int input_ring[kMaxInputs];
  int input_ranks[kMaxInputs];  // a token comes from an input if it has one of these hosts
  int output_ring[kMaxOutputs];
  int output_ranks[kMaxOutputs];
};

struct Ring {
  bool across;
  int sender_actor;
  int receiver_actor;
};

/// What a stage remembers.
struct ActorState {
  Stage<kMaxInputs, kMaxOutputs> stage;
  uint8_t next_token;  // the next that it looks at
  uint8_t token;       // the one under way
  uint8_t ops_done;
};

struct RingState {
  uint8_t slots[kMaxSlots];  // token numbers
  uint8_t staging[kMaxSlots];
  uint8_t arrived[kMaxSlots];
  uint8_t credits;
};

struct Message {
  enum Kind : uint8_t { kNone, kPut, kSignal, kCredits };
  uint8_t kind;
  uint8_t ring;
  uint8_t first;
  uint8_t end;  // or the credits
};

struct State {
  ActorState actors[kMaxActors];
  RingState rings[kMaxRings];
  Message messages[kMaxMessages];                  // sorted; kNone last
  uint8_t rows[kMaxRanks][kMaxRanks][kMaxTokens];  // [flow][host][token] times delivered
  uint8_t sums[kMaxRanks][kMaxTokens];             // [flow][token] times summed
  uint8_t error;
};

constexpr uint8_t kNoToken = 0xff;

class Model {
 public:
  explicit Model(const Setup& setup) : setup_(setup) {
    const Nodes& nodes = setup.nodes;
    for (int flow = 0; flow < nodes.num_ranks; ++flow) {
      if (setup.num_tokens[flow] == 0) continue;
      if (setup.op == Op::kDispatch) AddDispatch(flow);
      if (setup.op == Op::kCombine) AddCombine(flow);
    }
  }

  int num_actors() const { return static_cast<int>(actors_.size()); }
  int num_actions() const { return num_actors() + kMaxMessages; }
  const std::vector<Actor>& actors() const { return actors_; }

  void Init(State& state) const {
    std::memset(static_cast<void*>(&state), 0, sizeof(state));
    std::memset(state.rings, kNoToken, sizeof(state.rings));
    for (RingState& ring : state.rings) {
      std::memset(ring.arrived, 0, sizeof(ring.arrived));
      ring.credits = 0;
    }
    for (int a = 0; a < num_actors(); ++a) BeginOp(a, state, /*first=*/true);
  }

  /// Does an action; false, and the state as it was, if it is not possible now. `is_private`: it
  /// touched nothing but the stage's own memory.
  bool Apply(int action, State& state, bool* is_private = nullptr) const {
    if (is_private != nullptr) *is_private = false;
    if (action >= num_actors()) return Deliver(action - num_actors(), state);
    ActorState& actor = state.actors[action];
    if (actor.stage.phase == decltype(actor.stage)::kEnded) return NextOp(action, state);
    if (setup_.fault == Fault::kInTurn && !IsFirstOpen(action, state)) return false;
    ActorState before;
    std::memcpy(static_cast<void*>(&before), &actor, sizeof(before));
    Env env{*this, action, state};
    const Progress progress = actor.stage.Step(env);
    if (is_private != nullptr) *is_private = !env.touched;
    // What an ended stage last saw does not matter any more.
    if (actor.stage.phase == decltype(actor.stage)::kEnded) BeginOp(action, state, false, true);
    return progress == Progress::kMoved ||
           std::memcmp(static_cast<void*>(&before), &actor, sizeof(before)) != 0;
  }

  bool Finished(const State& state) const {
    for (int a = 0; a < num_actors(); ++a) {
      if (state.actors[a].ops_done != setup_.num_ops) return false;
    }
    return state.messages[0].kind == Message::kNone;
  }

  /// Whether a finished state has every row and sum as often as it should be.
  bool AllThere(const State& state) const {
    for (int flow = 0; flow < setup_.nodes.num_ranks; ++flow) {
      for (int token = 0; token < setup_.num_tokens[flow]; ++token) {
        if (setup_.op == Op::kCombine && state.sums[flow][token] != setup_.num_ops) return false;
        for (int host = 0; host < setup_.nodes.num_ranks && setup_.op == Op::kDispatch; ++host) {
          const int wanted = (setup_.hosts[flow][token] >> host & 1) * setup_.num_ops;
          if (state.rows[flow][host][token] != wanted) return false;
        }
      }
    }
    return true;
  }

  /// The part of the exchange that an action belongs to: stages that rings connect. Actions of
  /// different parts touch different memory.
  int PartOf(int action, const State& state) const {
    const Actor& actor =
        actors_[action < num_actors()
                    ? action
                    : rings_[state.messages[action - num_actors()].ring].receiver_actor];
    return setup_.op == Op::kDispatch ? actor.flow * kMaxRanks + actor.node : actor.flow;
  }

  /// Visits the bytes of a state that this model uses, 8 at a time.
  template <typename Visit>
  void ForEachWord(const State& state, Visit visit) const {
    const auto words = [&](const void* from, size_t num_bytes) {
      for (size_t at = 0; at < num_bytes; at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, static_cast<const char*>(from) + at,
                    num_bytes - at < 8 ? num_bytes - at : 8);
        visit(word);
      }
    };
    words(state.actors, actors_.size() * sizeof(ActorState));
    words(state.rings, rings_.size() * sizeof(RingState));
    for (const Message& message : state.messages) {
      if (message.kind != Message::kNone) words(&message, sizeof(message));
    }
    words(state.rows, sizeof(state.rows));
    words(state.sums, sizeof(state.sums));
    visit(state.error);
  }

 private:
  struct Env {
    const Model& model;
    int index;
    State& state;
    bool touched = false;

    const Actor& actor() const { return model.actors_[index]; }
    ActorState& own() { return state.actors[index]; }
    RingState& in(int i) { return state.rings[actor().input_ring[i]]; }
    RingState& out(int o) { return state.rings[actor().output_ring[o]]; }
    uint32_t HostsOf(int token) const { return model.setup_.hosts[actor().flow][token]; }

    bool Next(Bits<kMaxInputs>& inputs) {
      const Actor& a = actor();
      for (; own().next_token < model.setup_.num_tokens[a.flow]; ++own().next_token) {
        if (!model.Concerns(a, HostsOf(own().next_token))) continue;
        own().token = own().next_token++;
        for (int i = 0; i < a.num_inputs; ++i) {
          if ((HostsOf(own().token) & a.input_ranks[i]) != 0) inputs.Set(i);
        }
        return true;
      }
      return false;
    }
    void Outputs(Bits<kMaxOutputs>& outputs) {
      for (int o = 0; o < actor().num_outputs; ++o) {
        if ((HostsOf(own().token) & actor().output_ranks[o]) != 0) outputs.Set(o);
      }
    }
    void Work() {
      touched = true;
      const Actor& a = actor();
      const int token = own().token;
      for (int i = 0; i < a.num_inputs; ++i) {
        if (!own().stage.inputs.Has(i)) continue;
        if (in(i).slots[own().stage.InputSlot(i)] != Number(token)) state.error = 1;
      }
      for (int o = 0; o < a.num_outputs; ++o) {
        if (!own().stage.outputs.Has(o)) continue;
        RingState& ring = out(o);
        uint8_t* slots = model.rings_[a.output_ring[o]].across ? ring.staging : ring.slots;
        slots[own().stage.OutputSlot(o)] = Number(token);
      }
      const auto deliver = [&](int host) { ++state.rows[a.flow][host][token]; };
      if (a.role == Role::kReceiver) deliver(a.rank);
      if (a.role == Role::kForwarder && model.setup_.mapped) {
        for (int host = 0; host < model.setup_.nodes.num_ranks; ++host) {
          const bool here = model.setup_.nodes.NodeOf(host) == a.node;
          if (here && (HostsOf(token) >> host & 1) != 0) deliver(host);
        }
      }
      if (a.role == Role::kHome) ++state.sums[a.flow][token];
    }
    uint64_t Arrived(int i, uint32_t slot) {
      touched = true;
      const bool one_word = model.setup_.fault == Fault::kOneTailWord;
      const uint64_t word = in(i).arrived[one_word ? 0 : slot];
      const ReceiverEnd& end = own().stage.in[i];
      if (model.setup_.fault == Fault::kFreeEarly && word > end.taken) {
        SendCredits(i, word - end.taken);
      }
      return word;
    }
    uint64_t Credits(int o) {
      touched = true;
      if (model.setup_.fault == Fault::kKeepStaging) return own().stage.out[o].sent;
      return out(o).credits;
    }
    void Free(int i, uint64_t tokens) {
      touched = true;
      if (model.setup_.fault == Fault::kFreeEarly) return;
      SendCredits(i, tokens);
    }
    void SendCredits(int i, uint64_t tokens) {
      Message message{};
      message.kind = Message::kCredits;
      message.ring = static_cast<uint8_t>(actor().input_ring[i]);
      message.end = static_cast<uint8_t>(tokens);
      if (model.setup_.fault == Fault::kSetCredits) {
        message.first = static_cast<uint8_t>(own().stage.in[i].taken);
      }
      Send(message, model.rings_[message.ring].across);
    }
    void HandOver(int o, uint64_t first, uint64_t end) {
      touched = true;
      Message message{};
      message.ring = static_cast<uint8_t>(actor().output_ring[o]);
      const bool across = model.rings_[message.ring].across;
      message.kind = across ? Message::kPut : Message::kSignal;
      message.first = static_cast<uint8_t>(first);
      message.end = static_cast<uint8_t>(end);
      Send(message, across);
    }
    void Send(const Message& message, bool across) {
      if (!across) {
        model.Receive(message, state);
        return;
      }
      int place = 0;
      while (place < kMaxMessages && state.messages[place].kind != Message::kNone) ++place;
      if (place == kMaxMessages) {
        state.error = 2;  // more messages than the model holds
        return;
      }
      state.messages[place] = message;
      SortMessages(state);
    }
    uint8_t Number(int token) const { return static_cast<uint8_t>(actor().flow * 16 + token); }
  };

  static bool Before(const Message& a, const Message& b) {
    if ((a.kind == Message::kNone) != (b.kind == Message::kNone)) return b.kind == Message::kNone;
    return std::memcmp(&a, &b, sizeof(a)) < 0;
  }
  static void SortMessages(State& state) {
    for (int i = 1; i < kMaxMessages; ++i) {
      for (int j = i; j > 0 && Before(state.messages[j], state.messages[j - 1]); --j) {
        const Message swapped = state.messages[j];
        state.messages[j] = state.messages[j - 1];
        state.messages[j - 1] = swapped;
      }
    }
  }

  void Receive(const Message& message, State& state) const {
    RingState& ring = state.rings[message.ring];
    if (message.kind == Message::kSignal) {
      const bool one_word = setup_.fault == Fault::kOneTailWord;
      ring.arrived[one_word ? 0 : message.first % setup_.num_slots] = message.end;
    } else if (setup_.fault == Fault::kSetCredits) {
      ring.credits = message.first;
    } else {
      ring.credits = static_cast<uint8_t>(ring.credits + message.end);
    }
  }

  bool Deliver(int place, State& state) const {
    Message& message = state.messages[place];
    if (message.kind == Message::kNone) return false;
    if (message.kind == Message::kPut) {
      RingState& ring = state.rings[message.ring];
      for (int position = message.first; position < message.end; ++position) {
        const int slot = position % setup_.num_slots;
        ring.slots[slot] = ring.staging[slot];
      }
      message.kind = Message::kSignal;
    } else {
      Receive(message, state);
      message = Message{};
    }
    SortMessages(state);
    return true;
  }

  bool Concerns(const Actor& a, uint32_t hosts) const {
    switch (a.role) {
      case Role::kReceiver:
      case Role::kHost:
        return hosts >> a.rank & 1;
      case Role::kHome:
        return true;
      default:
        return (hosts & RanksOf(a.node)) != 0;
    }
  }
  uint32_t RanksOf(int node) const {
    return ((1u << setup_.nodes.SizeOf(node)) - 1) << setup_.nodes.first_rank[node];
  }

  void BeginOp(int a, State& state, bool first, bool ended = false) const {
    ActorState& actor = state.actors[a];
    for (int i = 0; i < actors_[a].num_inputs; ++i) {
      ReceiverEnd& end = actor.stage.in[i];
      end.Begin(first ? 0 : end.taken, setup_.num_slots);
    }
    for (int o = 0; o < actors_[a].num_outputs; ++o) {
      SenderEnd& end = actor.stage.out[o];
      const bool across = rings_[actors_[a].output_ring[o]].across;
      end.Begin(first ? 0 : end.sent, setup_.num_slots, across ? setup_.batch : 1);
    }
    actor.stage.phase = ended ? decltype(actor.stage)::kEnded : decltype(actor.stage)::kNext;
    actor.stage.inputs = {};
    actor.stage.outputs = {};
    actor.stage.ready = 0;
    actor.next_token = actor.token = 0;
  }
  /// A stage that has ended: its rank's next op begins when all its stages have.
  bool NextOp(int index, State& state) const {
    ActorState& actor = state.actors[index];
    if (actor.ops_done == setup_.num_ops) return false;
    int lowest = setup_.num_ops;
    for (int a = 0; a < num_actors(); ++a) {
      if (actors_[a].rank != actors_[index].rank) continue;
      const bool ended = state.actors[a].stage.phase == decltype(actor.stage)::kEnded;
      const int done = state.actors[a].ops_done + (ended ? 1 : 0);
      lowest = done < lowest ? done : lowest;
    }
    if (lowest <= actor.ops_done) return false;
    if (++actor.ops_done < setup_.num_ops) BeginOp(index, state, /*first=*/false);
    return true;
  }
  bool IsFirstOpen(int index, const State& state) const {
    for (int a = 0; a < index; ++a) {
      const ActorState& actor = state.actors[a];
      if (actors_[a].rank == actors_[index].rank &&
          actor.ops_done <= state.actors[index].ops_done &&
          actor.stage.phase != decltype(actor.stage)::kEnded) {
        return false;
      }
    }
    return true;
  }

  int AddActor(Role role, int rank, int flow, int node) {
    Actor actor{};
    actor.role = role;
    actor.rank = rank;
    actor.flow = flow;
    actor.node = node;
    actors_.push_back(actor);
    return num_actors() - 1;
  }
  void Connect(int from, int to, bool across, uint32_t ranks) {
    const int ring = static_cast<int>(rings_.size());
    rings_.push_back({across, from, to});
    Actor& sender = actors_[from];
    sender.output_ring[sender.num_outputs] = ring;
    sender.output_ranks[sender.num_outputs++] = static_cast<int>(ranks);
    Actor& receiver = actors_[to];
    receiver.input_ring[receiver.num_inputs] = ring;
    receiver.input_ranks[receiver.num_inputs++] = static_cast<int>(ranks);
  }
  void AddDispatch(int flow) {
    const Nodes& nodes = setup_.nodes;
    for (int node = 0; node < nodes.num_nodes; ++node) {
      const bool own = nodes.NodeOf(flow) == node;
      const int sender = own ? -1 : AddActor(Role::kSender, flow, flow, node);
      const int forwarder = AddActor(Role::kForwarder, nodes.Forwarder(flow, node), flow, node);
      if (!own) Connect(sender, forwarder, true, RanksOf(node));
      for (int host = nodes.first_rank[node]; !setup_.mapped && host < nodes.first_rank[node + 1];
           ++host) {
        Connect(forwarder, AddActor(Role::kReceiver, host, flow, node), false, 1u << host);
      }
    }
  }
  void AddCombine(int flow) {
    const Nodes& nodes = setup_.nodes;
    const int home = AddActor(Role::kHome, flow, flow, nodes.NodeOf(flow));
    for (int node = 0; node < nodes.num_nodes; ++node) {
      const bool own = nodes.NodeOf(flow) == node;
      const int reducer =
          own ? home : AddActor(Role::kReducer, nodes.Forwarder(flow, node), flow, node);
      if (!own) Connect(reducer, home, true, RanksOf(node));
      for (int host = nodes.first_rank[node]; !setup_.mapped && host < nodes.first_rank[node + 1];
           ++host) {
        Connect(AddActor(Role::kHost, host, flow, node), reducer, false, 1u << host);
      }
    }
  }

  const Setup setup_;
  std::vector<Actor> actors_;
  std::vector<Ring> rings_;
};

}  // namespace wideep::two_hop::model
