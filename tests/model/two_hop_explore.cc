// Explores every interleaving of the two-hop exchange for 3 ranks on 2 nodes (of 2 and 1), rings of
// 2 slots and 4 tokens, and shows that it finds what is wrong with faulty variants.
//
// States are told apart by a hash of 128 bits. Steps that touch only a stage's own memory are done
// first. Whole products are searched for small counts of tokens. For 4 tokens at every rank one
// part goes at a time: parts (the stages between one source, or home, and one node or all) share no
// memory, so the transitions of one are a persistent set, and deadlocks and wrong results are found
// all the same.
//
//   two_hop_explore [--all-routings]    the latter: every choice of hosts too, for a night
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

#include "csrc/ep/two_hop_config.h"
#include "tests/model/two_hop_model.h"

namespace wideep::two_hop::model {
namespace {

struct Hash {
  uint64_t low;
  uint64_t high;
  bool operator==(const Hash& o) const { return low == o.low && high == o.high; }
};
struct HashOf {
  size_t operator()(const Hash& h) const { return h.low; }
};

Hash HashState(const Model& model, const State& state) {
  Hash h{0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu};
  model.ForEachWord(state, [&h](uint64_t word) {
    h.low = (h.low ^ word) * 0xff51afd7ed558ccdu;
    h.low ^= h.low >> 32;
    h.high = (h.high + word) * 0xc4ceb9fe1a85ec53u;
    h.high ^= h.high >> 29;
  });
  return h;
}

struct Result {
  int64_t num_states = 0;
  int64_t num_ends = 0;
  std::string problem;  // empty: none
};

/// Depth first, to the first problem. `one_part_at_a_time`: see above.
Result Explore(const Setup& setup, bool one_part_at_a_time, int64_t max_states = 40'000'000) {
  const Model model(setup);
  Result result;
  std::unordered_set<Hash, HashOf> seen;
  std::vector<State> stack(1);
  model.Init(stack[0]);
  seen.insert(HashState(model, stack[0]));
  std::vector<State> next;
  while (!stack.empty() && result.problem.empty()) {
    const State state = stack.back();
    stack.pop_back();
    if (++result.num_states > max_states) result.problem = "more states than the limit";
    if (state.error == 2) result.problem = "more messages than the model holds";
    if (state.error == 1) result.problem = "a stage read a slot that held another token";
    next.clear();
    int lowest_part = -1;
    for (int action = 0; action < model.num_actions(); ++action) {
      const bool is_message = action >= model.num_actors();
      if (is_message && state.messages[action - model.num_actors()].kind == Message::kNone) break;
      const int part = one_part_at_a_time ? model.PartOf(action, state) : 0;
      if (lowest_part >= 0 && part > lowest_part) continue;
      bool is_private;
      State after = state;
      if (!model.Apply(action, after, &is_private)) continue;
      // A private step goes with every other one: it is enough to do it first.
      if (is_private || part < lowest_part) next.clear();
      next.push_back(after);
      if (is_private) break;
      lowest_part = part;
    }
    for (const State& after : next) {
      if (seen.insert(HashState(model, after)).second) stack.push_back(after);
    }
    if (!next.empty()) continue;
    ++result.num_ends;
    if (!model.Finished(state)) {
      result.problem = "deadlock";
    } else if (!model.AllThere(state)) {
      result.problem = "a row is lost or doubled";
    }
  }
  return result;
}

/// 3 ranks on nodes of 2 and 1.
Setup ThreeRanks(Op op) {
  Setup setup;
  MakeNodes({2, 1}, setup.nodes);
  setup.op = op;
  return setup;
}

void SetTokens(Setup& setup, int rank, const std::vector<uint32_t>& hosts) {
  setup.num_tokens[rank] = static_cast<int>(hosts.size());
  for (size_t t = 0; t < hosts.size(); ++t) setup.hosts[rank][t] = hosts[t];
}

int num_failed = 0;

void Check(const std::string& name, const Setup& setup, bool one_part_at_a_time,
           const std::string& expected = "") {
  const auto begin = std::chrono::steady_clock::now();
  const Result result = Explore(setup, one_part_at_a_time);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const bool ok = expected == "any" ? !result.problem.empty() && result.problem[0] != 'm'
                                    : result.problem == expected;
  std::printf("%-6s %-44s %9lld states %5lld ends %6.1f s  %s\n", ok ? "ok" : "FAILED",
              name.c_str(), static_cast<long long>(result.num_states),
              static_cast<long long>(result.num_ends), seconds.count(), result.problem.c_str());
  std::fflush(stdout);
  num_failed += !ok;
}

const char* Name(Op op) { return op == Op::kDispatch ? "dispatch" : "combine"; }

/// Every rank has 4 tokens, with all kinds of hosts.
Setup FourEach(Op op) {
  Setup setup = ThreeRanks(op);
  SetTokens(setup, 0, {0b111, 0b100, 0b110, 0b101});
  SetTokens(setup, 1, {0b100, 0b111, 0b001, 0b100});
  SetTokens(setup, 2, {0b011, 0b111, 0b001, 0b010});
  return setup;
}

void CheckSound() {
  for (const Op op : {Op::kDispatch, Op::kCombine}) {
    for (const bool mapped : {false, true}) {
      const std::string name = std::string(Name(op)) + (mapped ? ", mapped" : "");
      Setup setup = FourEach(op);
      setup.mapped = mapped;
      for (const int batch : {1, 2}) {
        setup.batch = batch;
        Check(name + ", 4 tokens each, batch " + std::to_string(batch), setup, true);
      }
      setup = ThreeRanks(op);
      setup.mapped = mapped;
      SetTokens(setup, 0, {0b110, 0b100});
      SetTokens(setup, 1, {0b101});
      SetTokens(setup, 2, {0b011});
      // Unmapped, the product is too large for 4.
      Check(name + ", 4 tokens in all", setup, /*one_part_at_a_time=*/!mapped);
      if (!mapped) {
        SetTokens(setup, 0, {0b110});
        setup.num_tokens[1] = 0;
        Check(name + ", 2 tokens in all, product", setup, false);
      }
      setup = ThreeRanks(op);
      setup.mapped = mapped;
      setup.num_ops = 2;
      SetTokens(setup, 0, {0b110, 0b100});
      Check(name + ", 2 tokens, twice", setup, false);
    }
  }
}

/// The explorer finds each fault.
void CheckFaults() {
  const auto faulty = [](Op op, Fault fault) {
    Setup setup = ThreeRanks(op);
    SetTokens(setup, 0, {0b100, 0b110, 0b100, 0b100});
    setup.batch = 1;
    setup.fault = fault;
    return setup;
  };
  Check("fault: one tail word", faulty(Op::kDispatch, Fault::kOneTailWord), true, "any");
  Setup set_credits = faulty(Op::kDispatch, Fault::kSetCredits);
  set_credits.mapped = true;
  set_credits.num_ops = 2;
  Check("fault: credits are set", set_credits, false, "deadlock");
  Check("fault: slots freed early", faulty(Op::kDispatch, Fault::kFreeEarly), true, "any");
  Check("fault: credits not waited for", faulty(Op::kDispatch, Fault::kKeepStaging), true, "any");
  Setup in_turn = FourEach(Op::kCombine);
  in_turn.fault = Fault::kInTurn;
  Check("fault: stages to their end, in turn", in_turn, false, "deadlock");
}

/// Every choice of hosts of 4 tokens of one rank.
void CheckAllRoutings() {
  for (const Op op : {Op::kDispatch, Op::kCombine}) {
    for (const int rank : {0, 2}) {
      int64_t num_states = 0;
      for (uint32_t choice = 0; choice < 4096; ++choice) {
        Setup setup = ThreeRanks(op);
        SetTokens(setup, rank, {choice & 7, choice >> 3 & 7, choice >> 6 & 7, choice >> 9 & 7});
        const Result result = Explore(setup, true);
        num_states += result.num_states;
        if (!result.problem.empty()) {
          std::printf("FAILED %s, rank %d, routing %u: %s\n", Name(op), rank, choice,
                      result.problem.c_str());
          ++num_failed;
        }
      }
      std::printf("ok     %s, every routing of rank %d, %lld states\n", Name(op), rank,
                  static_cast<long long>(num_states));
    }
  }
}

}  // namespace
}  // namespace wideep::two_hop::model

int main(int argc, char** argv) {
  using namespace wideep::two_hop::model;
  CheckSound();
  CheckFaults();
  if (argc > 1 && std::strcmp(argv[1], "--all-routings") == 0) CheckAllRoutings();
  return num_failed == 0 ? 0 : 1;
}
