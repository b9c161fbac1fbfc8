// Low-latency calls over virtual nodes in the emulator: mirrors and the relay.
#include "tests/kernels/relayed_low_latency.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 3 * num_ranks;
  group.num_sms = 2;
  group.chunk = 5;
  group.deadline_s = 1e9;  // never: a deadlock is reported with where every thread waits
  return group;
}

TEST(TwoNodesOfTwo) { RunVirtualNodes<SimtMachine>(Small(4), 2, 1); }

TEST(EveryRankANode) { RunVirtualNodes<SimtMachine>(Small(3), 1, 2); }

TEST(UnevenNodes) { RunVirtualNodes<SimtMachine>(Small(3), 2, 3); }

}  // namespace
}  // namespace testing
}  // namespace wideep
