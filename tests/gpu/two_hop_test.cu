// The kernels of the exchange between nodes with virtual ranks on virtual nodes of one GPU, against
// the host's. Rows go by puts from staging memory that copy (RingNet), or are written in place
// (MappedNet).
#include <vector>

#include "tests/gpu/cuda_machine.h"
#include "tests/kernels/two_hop_cases.h"

namespace wideep {
namespace testing {
namespace {

template <typename Net>
using Group = TwoHopGroup<CudaMachine, Net>;

GroupSettings Ranks(int num_ranks) {
  GroupSettings group;
  group.num_ranks = num_ranks;
  group.num_experts = 8 * num_ranks;
  group.top_k = 8;
  group.num_sms = 128 / num_ranks > 16 ? 16 : 128 / num_ranks;
  group.max_row_bytes = 8192;
  group.pool_bytes = 160 << 20;
  return group;
}

const std::vector<int> kNodes[] = {{4, 4}, {2, 2, 2, 2}, {1, 1, 1}, {2, 1}, {5, 3}, {4}};

template <typename Net>
void RunEveryOp() {
  uint64_t seed = 0;
  for (const std::vector<int>& sizes : kNodes) {
    Group<Net> group(Ranks(NumRanks(sizes)), sizes, ++seed);
    for (const DType dtype : kFloatDTypes) {
      for (const int64_t capacity : {0, 160}) {
        ExchangeCase c;
        c.dtype = dtype;
        c.num_tokens = 60;
        c.hidden = 256;
        c.capacity = capacity;
        c.delay_us = 100;
        if (!group.RunAndCount(c)) return;
      }
    }
  }
}

TEST(EveryOp) { RunEveryOp<RingNet>(); }
TEST(EveryOpInPlace) { RunEveryOp<MappedNet>(); }

TEST(EveryRouting) {
  Group<MappedNet> group(Ranks(8), {4, 4}, 11);
  for (const Routing routing : kAllRoutings) {
    ExchangeCase c;
    c.routing = routing;
    c.num_tokens = 100;
    c.hidden = 64;
    if (!group.Run(c)) return;
  }
}

template <typename Net>
void RunManyTimes() {
  Group<Net> group(Ranks(8), {4, 4}, 12);
  for (int repeat = 0; repeat < 50; ++repeat) {
    ExchangeCase c;
    c.num_tokens = repeat % 5 == 0 ? 1 : 40 + repeat;
    c.hidden = 64;
    c.delay_us = 300;
    if (!group.Run(c)) return;
  }
}

TEST(ManyTimesWithDelays) { RunManyTimes<RingNet>(); }
TEST(ManyTimesWithDelaysInPlace) { RunManyTimes<MappedNet>(); }

template <typename Net>
void RunMasks() {
  Group<Net> group(Ranks(8), {4, 4}, 13);
  ExchangeCase c;
  c.num_tokens = 100;
  c.hidden = 128;
  for (const uint32_t masked : {0x02u, 0xf0u, 0x7eu, 0x00u}) {
    c.masked = masked;
    c.masked_run = masked != 0x02u;
    if (!group.Run(c)) return;
  }
}

TEST(Masks) { RunMasks<RingNet>(); }
TEST(MasksInPlace) { RunMasks<MappedNet>(); }

}  // namespace
}  // namespace testing
}  // namespace wideep
