// The same transition system for spin: two_hop.pml tracks the state as bytes and calls these.
#include <cstdlib>

#include "csrc/ep/two_hop_config.h"
#include "tests/model/two_hop_model.h"

using namespace wideep::two_hop;
using namespace wideep::two_hop::model;

// In the verifier.
extern "C" unsigned char two_hop_state[];
extern "C" unsigned char
    two_hop_can[];  // [action] 1: possible; then error, finished, all rows there
constexpr int kNumActions = kMaxActors + kMaxMessages;

namespace {

State& Current() { return *reinterpret_cast<State*>(two_hop_state); }

/// TWO_HOP: dispatch or combine, then 1 if buffers are mapped, then tokens of ranks 0, 1, 2, then
/// perhaps a fault.
const Model& TheModel() {
  static const Model* const model = [] {
    const char* text = std::getenv("TWO_HOP");
    if (text == nullptr) text = "d0400";
    Setup setup;
    MakeNodes({2, 1}, setup.nodes);
    setup.op = text[0] == 'd' ? Op::kDispatch : Op::kCombine;
    setup.mapped = text[1] == '1';
    const uint32_t hosts[3][4] = {
        {0b111, 0b100, 0b110, 0b101}, {0b100, 0b111, 0b001, 0b100}, {0b011, 0b111, 0b001, 0b010}};
    for (int rank = 0; rank < 3; ++rank) {
      setup.num_tokens[rank] = text[2 + rank] - '0';
      for (int token = 0; token < 4; ++token) setup.hosts[rank][token] = hosts[rank][token];
    }
    if (text[5] != '\0') {
      setup.fault = static_cast<Fault>(text[5] - '0');
      setup.batch = 1;
    }
    return new Model(setup);
  }();
  return *model;
}

/// Does all steps that touch only a stage's own memory, since they go with every other one, and
/// notes what is possible then.
void Settle() {
  for (bool again = true; again;) {
    again = false;
    for (int action = 0; action < TheModel().num_actors(); ++action) {
      State after = Current();
      bool is_private;
      if (!TheModel().Apply(action, after, &is_private) || !is_private) continue;
      Current() = after;
      again = true;
    }
  }
  for (int action = 0; action < kNumActions; ++action) {
    State copy = Current();
    two_hop_can[action] = action < TheModel().num_actions() && TheModel().Apply(action, copy);
  }
  two_hop_can[kNumActions] = Current().error;
  two_hop_can[kNumActions + 1] = TheModel().Finished(Current());
  two_hop_can[kNumActions + 2] = TheModel().AllThere(Current());
}

}  // namespace

extern "C" {

int two_hop_state_bytes() { return static_cast<int>(sizeof(State)); }
void two_hop_init() {
  TheModel().Init(Current());
  Settle();
}
void two_hop_apply(int action) {
  TheModel().Apply(action, Current());
  Settle();
}

}  // extern "C"
