// All ops of a group over virtual nodes one after the other, as handlers launch them, in the
// emulator.
#include "tests/kernels/two_hop_cases.h"
#include "tests/simt/simt_machine.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;

GroupSettings Small(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 3 * num_ranks;
  group.num_sms = 2;
  // Never: a deadlock is reported with where every thread waits.
  group.deadline_s = 1e9;
  return group;
}

using Group = TwoHopGroup<NetworkedMachine>;

const std::vector<int> kNodes[] = {{2, 2}, {1, 1, 1}, {2, 1}, {3}};

TEST(EveryOp) {
  uint64_t seed = 0;
  for (const std::vector<int>& sizes : kNodes) {
    Group group(Small(NumRanks(sizes)), sizes, ++seed);
    if (seed % 2 == 1) group.DeliverLate();
    for (const DType dtype : kFloatDTypes) {
      const Context context(Labelled("nodes", static_cast<int64_t>(sizes.size())));
      ExchangeCase c;
      c.dtype = dtype;
      c.num_tokens = dtype == DType::kF16 ? 0 : 33;
      c.capacity = dtype == DType::kF32 ? 60 : 0;
      c.delay_us = dtype == DType::kF32 ? 50 : 0;
      if (!group.RunAndCount(c)) return;
    }
  }
}

TEST(EightRanks) {
  uint64_t seed = 40;
  for (const std::vector<int>& sizes : {std::vector<int>{2, 2, 2, 2}, {5, 3}}) {
    GroupSettings settings = Small(8);
    settings.num_sms = 1;
    Group group(settings, sizes, ++seed);
    if (seed % 2 == 1) group.DeliverLate();
    ExchangeCase c;
    c.num_tokens = 20;
    if (!group.RunAndCount(c)) return;
  }
}

/// Plans that are older than the mask, too.
TEST(Masks) {
  uint64_t seed = 0;
  for (const bool masked_after_plan : {false, true}) {
    Group group(Small(4), {2, 2}, ++seed);
    if (masked_after_plan) group.DeliverLate();
    ExchangeCase c;
    c.num_tokens = 17;
    c.masked_after_plan = masked_after_plan;
    c.zero_tail = masked_after_plan;
    for (const uint32_t masked : {0b0100u, 0b0011u, 0b0110u, 0b0000u}) {
      c.masked = masked;
      c.masked_run = masked != 0b0100u;
      if (!group.Run(c)) return;
    }
  }
}

/// Ranks that are alone on their nodes need no memory that others can map.
TEST(NothingMapped) {
  GroupSettings settings = Small(3);
  settings.zero_copy = false;
  for (const bool late : {false, true}) {
    Group group(settings, {1, 1, 1}, late ? 71 : 70);
    if (late) group.DeliverLate();
    for (const DType dtype : kFloatDTypes) {
      ExchangeCase c;
      c.dtype = dtype;
      c.num_tokens = 21;
      c.capacity = late ? 50 : 0;
      if (!group.RunAndCount(c)) return;
    }
  }
}

/// Stores reach all ranks: slots are written where they are read.
TEST(InPlace) {
  using InPlaceGroup = TwoHopGroup<NetworkedMachine, MappedNet>;
  uint64_t seed = 60;
  for (const std::vector<int>& sizes : kNodes) {
    InPlaceGroup group(Small(NumRanks(sizes)), sizes, ++seed);
    for (const int64_t num_tokens : {33, 0, 50}) {
      ExchangeCase c;
      c.dtype = kFloatDTypes[seed % 3];
      c.num_tokens = num_tokens;
      c.capacity = seed % 2 == 0 ? 60 : 0;
      c.delay_us = num_tokens == 50 ? 50 : 0;
      if (!group.RunAndCount(c)) return;
    }
  }
  InPlaceGroup group(Small(4), {2, 2}, ++seed);
  ExchangeCase c;
  c.num_tokens = 17;
  for (const uint32_t masked : {0b0100u, 0b0011u, 0b0000u}) {
    c.masked = masked;
    c.masked_run = masked != 0b0100u;
    if (!group.Run(c)) return;
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
