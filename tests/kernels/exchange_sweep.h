// Which shapes the exchange kernels are tested with.
#pragma once

#include <vector>

#include "tests/kernels/exchange_cases.h"

namespace wideep {
namespace testing {

/// `count` random cases, every form and path among them. `max_tokens` and `max_hidden` fit the
/// machine.
template <typename Machine>
void RunRandomExchanges(int count, uint64_t seed, int64_t max_tokens, int64_t max_hidden,
                        int max_sms, int delay_us) {
  for (int i = 0; i < count; ++i) {
    Random random(seed + i);
    GroupSettings group;
    group.num_ranks = static_cast<int>(Uniform(random, 1, 8));
    group.num_experts = group.num_ranks * static_cast<int>(Uniform(random, 1, 9));
    group.top_k = static_cast<int>(Uniform(random, 1, 10));
    group.num_sms = 2 * static_cast<int>(Uniform(random, 1, max_sms / 2));
    group.zero_copy = Uniform(random, 0, 2) != 0;
    ExchangeCase c;
    c.dtype = kFloatDTypes[Uniform(random, 0, 2)];
    c.hidden = 8 * Uniform(random, 1, max_hidden / 8);
    group.max_row_bytes = Bytes(DType::kF32, c.hidden);
    c.routing = kAllRoutings[Uniform(random, 0, 5)];
    c.dispatch_form = Uniform(random, 0, 1) ? DispatchForm::kPush : DispatchForm::kPull;
    c.combine_form = kCombineForms[Uniform(random, 0, 2)];
    c.num_chunks = static_cast<int>(Uniform(random, 0, kMaxSumChunks));
    c.zero_tail = Uniform(random, 0, 3) != 0;
    c.delay_us = delay_us;
    VirtualRanks<Machine> ranks(group, seed + i);
    // Several exchanges over one group: flags and rings go on from where they were.
    for (int repeat = 0; repeat < 3; ++repeat) {
      c.num_tokens =
          Uniform(random, 0, 2) == 0 ? Uniform(random, 0, 3) : Uniform(random, 0, max_tokens);
      const int64_t selections = group.num_ranks * c.num_tokens * group.top_k;
      c.capacity = Uniform(random, 0, 1) ? 0 : Uniform(random, 1, selections + 2) / 2;
      if (selections == 0) c.capacity = 0;
      const check::Context context(Labelled("seed", static_cast<int64_t>(seed) + i));
      if (!RunExchangeCase(ranks, c, random)) return;
    }
  }
}

/// Some ranks, not all, by bits.
inline uint32_t RandomMask(Random& random, int num_ranks) {
  const auto all = (uint32_t{1} << num_ranks) - 1;
  return static_cast<uint32_t>(Uniform(random, 0, all - 1));
}

/// `count` random groups whose ranks are masked and taken back, in every form and on every path.
template <typename Machine>
void RunMaskedExchanges(int count, uint64_t seed, int64_t max_tokens, int64_t max_hidden,
                        int max_sms, int delay_us) {
  for (int i = 0; i < count; ++i) {
    const check::Context context(Labelled("seed", static_cast<int64_t>(seed) + i));
    Random random(seed + i);
    GroupSettings group;
    group.num_ranks = static_cast<int>(Uniform(random, 2, 8));
    group.num_experts = group.num_ranks * static_cast<int>(Uniform(random, 1, 5));
    group.top_k = static_cast<int>(Uniform(random, 1, 8));
    group.num_sms = 2 * static_cast<int>(Uniform(random, 1, max_sms / 2));
    group.zero_copy = i % 3 != 0;
    group.max_row_bytes = Bytes(DType::kF32, max_hidden);
    VirtualRanks<Machine> ranks(group, seed + i);
    for (int repeat = 0; repeat < 4; ++repeat) {
      ExchangeCase c;
      c.dtype = kFloatDTypes[Uniform(random, 0, 2)];
      c.hidden = 8 * Uniform(random, 1, max_hidden / 8);
      c.num_tokens = Uniform(random, 0, max_tokens);
      c.routing = kAllRoutings[Uniform(random, 0, 5)];
      c.dispatch_form = Uniform(random, 0, 1) ? DispatchForm::kPush : DispatchForm::kPull;
      c.combine_form = kCombineForms[Uniform(random, 0, 2)];
      c.num_chunks = static_cast<int>(Uniform(random, 0, kMaxSumChunks));
      c.zero_tail = Uniform(random, 0, 3) != 0;
      c.delay_us = delay_us;
      const int64_t selections = group.num_ranks * c.num_tokens * group.top_k;
      c.capacity =
          selections == 0 || Uniform(random, 0, 1) ? 0 : Uniform(random, 2, selections) / 2;
      // The last one has all ranks again.
      c.masked = repeat == 3 ? 0 : RandomMask(random, group.num_ranks);
      c.masked_after_plan = Uniform(random, 0, 2) == 0;
      c.masked_run = Uniform(random, 0, 1) != 0;
      if (!RunExchangeCase(ranks, c, random)) return;
    }
  }
}

}  // namespace testing
}  // namespace wideep
