// The low-latency kernels against the host's (csrc/ep/low_latency_host), on the GPU and in the
// emulator.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/ep/low_latency.h"
#include "csrc/ep/low_latency_host.h"
#include "csrc/ep/low_latency_relayed.h"
#include "csrc/ep/quantize.h"
#include "csrc/ep/row_kernels.h"
#include "tests/cpp/check.h"
#include "tests/cpp/exchange_testing.h"
#include "tests/cpp/number_formats.h"
#include "tests/kernels/ended_well.h"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace testing {

struct LowLatencyCase {
  int64_t num_tokens = 4;
  int64_t hidden = 256;
  DType dtype = DType::kBF16;
  bool quantize = true;
  bool dequantize = true;
  bool zero_tail = true;
  Routing routing = Routing::kUniform;
  LowLatencyTuning tuning;
  int delay_us = 0;  // each rank is held up by as much at random before each launch
  bool gradient = true;
  uint32_t masked = 0;     // bit r: rank r is masked
  bool masked_run = true;  // masked ranks launch the ops too
  /// Of each rank, for peers that it has no address of; null: it has those of all.
  std::vector<Relay*> relays;

  Relay* RelayOf(int rank) const { return relays.empty() ? nullptr : relays[rank]; }
  bool IsMasked(int rank) const { return (masked >> rank & 1) != 0; }
  bool Runs(int rank) const { return masked_run || !IsMasked(rank); }
};

inline std::string Describe(const GroupSettings& group, const LowLatencyCase& c) {
  return std::to_string(group.num_ranks) + " ranks, " + std::to_string(c.num_tokens) +
         " tokens, top " + std::to_string(group.top_k) + ", " + std::to_string(group.num_experts) +
         " experts, chunk " + std::to_string(group.chunk) + ", hidden " + std::to_string(c.hidden) +
         " " + NameOf(c.dtype) + (c.quantize ? ", FP8" : "") +
         (c.quantize && c.dequantize ? " dequantised" : "") +
         (group.once_per_rank ? ", once per rank" : ", once per expert") + ", " +
         NameOf(c.routing) + (c.zero_tail ? "" : ", tail left") + ", " +
         (c.masked == 0 ? "" : "masked " + std::to_string(c.masked) + ", ") +
         std::to_string(c.tuning.pieces) + " pieces, " + std::to_string(c.tuning.num_blocks) +
         " blocks";
}

/// One rank's arrays on the host.
struct LowLatencyHostRank {
  std::vector<int32_t> topk_idx, counts, row_source;
  std::vector<float> weights, scales, row_scales, dweights;
  std::vector<char> x, payload, rows, y, out, dout, dy;
};

/// Inputs, and the host's results.
class LowLatencyHostExchange {
 public:
  LowLatencyHostExchange(const GroupSettings& group, const LowLatencyCase& c, Random& random)
      : ranks(group.num_ranks) {
    const int64_t selections = c.num_tokens * group.top_k;
    const int64_t num_rows = int64_t{group.num_experts} * group.chunk;
    const int64_t blocks = c.hidden / kQuantBlock;
    const DType rows_dtype = c.quantize && !c.dequantize ? DType::kF8E4M3 : c.dtype;
    const auto rows_of = [&](int64_t count) {
      std::vector<char> rows(Bytes(c.dtype, count * c.hidden));
      std::normal_distribution<double> normal;
      for (int64_t i = 0; i < count * c.hidden; ++i) {
        SetValueAt(c.dtype, rows.data(), i, normal(random));
      }
      return rows;
    };
    std::vector<LowLatencyDispatchBuffers> dispatch;
    std::vector<LowLatencyCombineBuffers> combine;
    for (LowLatencyHostRank& r : ranks) {
      r.topk_idx = ChooseExperts(random, c.routing, c.num_tokens, group.top_k, group.num_experts,
                                 group.num_ranks);
      MaskDuplicates(r.topk_idx, group.top_k);
      r.x = rows_of(c.num_tokens);
      r.dout = rows_of(c.num_tokens);
      r.y = rows_of(num_rows);
      r.weights = RandomFloats(random, selections);
      r.counts.resize(group.num_experts / group.num_ranks);
      r.row_source.resize(num_rows);
      r.rows.resize(Bytes(rows_dtype, num_rows * c.hidden));
      r.payload = r.x;
      if (c.quantize) {
        r.payload.resize(c.num_tokens * c.hidden);
        r.scales.resize(c.num_tokens * blocks);
        r.row_scales.resize(num_rows * blocks);
        for (int64_t token = 0; token < c.num_tokens; ++token) {
          SelectRowKernels().quantize(
              c.dtype, reinterpret_cast<uint8_t*>(r.payload.data()) + token * c.hidden,
              r.scales.data() + token * blocks, r.x.data() + Bytes(c.dtype, token * c.hidden),
              c.hidden);
        }
      }
      r.out.resize(Bytes(c.dtype, c.num_tokens * c.hidden));
      r.dy.resize(r.y.size());
      r.dweights.resize(selections);
      dispatch.push_back({r.payload.data(), c.quantize ? r.scales.data() : nullptr,
                          r.topk_idx.data(), r.rows.data(),
                          rows_dtype == DType::kF8E4M3 ? r.row_scales.data() : nullptr,
                          r.counts.data(), r.row_source.data()});
      combine.push_back({r.y.data(), r.weights.data(), r.counts.data(), r.row_source.data(),
                         r.dout.data(), r.out.data(), r.dy.data(), r.dweights.data()});
    }
    for (int r = 0; r < group.num_ranks; ++r)
      dispatch[r].masked = combine[r].masked = c.IsMasked(r);
    LowLatencyShape shape{group.num_ranks,   c.num_tokens, group.top_k,
                          group.num_experts, group.chunk,  c.hidden,
                          rows_dtype,        c.quantize,   true};
    Run([&](StatusCallback done) { LowLatencyDispatch(shape, dispatch, PoolOf(0), done); });
    for (int r = 0; r < group.num_ranks; ++r) {
      if (c.IsMasked(r)) EmptyLowLatencyDispatch(shape, dispatch[r]);
    }
    shape.dtype = c.dtype;
    shape.quantized = false;
    for (int r = 0; r < group.num_ranks; ++r) {
      if (!c.IsMasked(r)) continue;
      EmptyLowLatencyCombine(shape, combine[r]);
      EmptyLowLatencyCombineGrad(shape, combine[r]);
    }
    Run([&](StatusCallback done) { LowLatencyCombine(shape, combine, PoolOf(0), done); });
    Run([&](StatusCallback done) { LowLatencyCombineGrad(shape, combine, PoolOf(0), done); });
  }

  std::vector<LowLatencyHostRank> ranks;

 private:
  static void Run(const std::function<void(StatusCallback)>& start) {
    Finish([&](auto done) {
      start([done](const Status& status) {
        CHECK_EQ(status.message(), "");
        done();
      });
    });
  }
};

/// The three ops of all ranks with their inputs, to be launched and compared.
template <typename Machine>
class LowLatencyRun {
 public:
  LowLatencyRun(VirtualRanks<Machine>& ranks, const LowLatencyCase& c, Random& random)
      : ranks_(ranks), group_(ranks.settings()), c_(c), random_(random), host_(group_, c, random) {
    const int64_t selections = c.num_tokens * group_.top_k;
    const int64_t num_rows = int64_t{group_.num_experts} * group_.chunk;
    const bool fp8 = c.quantize && !c.dequantize;
    const int64_t y_bytes = Bytes(c.dtype, num_rows * c.hidden);
    device_.resize(group_.num_ranks);
    for (int rank = 0; rank < group_.num_ranks; ++rank) {
      const LowLatencyHostRank& h = host_.ranks[rank];
      LowLatencyDispatchParams& d = device_[rank].dispatch;
      d.peers = ranks.context(rank);
      d.tokens = {c.num_tokens, group_.top_k, group_.num_experts, c.hidden};
      d.tuning = c.tuning;
      d.dtype = c.dtype;
      d.quantize = c.quantize;
      d.dequantize = c.dequantize;
      d.zero_tail = c.zero_tail;
      d.x = reinterpret_cast<const char*>(ranks.TakeCopy(rank, h.x));
      d.topk_idx = ranks.TakeCopy(rank, h.topk_idx);
      d.rows = ranks.template Take<char>(rank, static_cast<int64_t>(h.rows.size()));
      if (fp8) d.row_scales = ranks.template Take<float>(rank, num_rows * c.hidden / kQuantBlock);
      d.counts = ranks.template Take<int32_t>(rank, group_.num_experts / group_.num_ranks);
      d.row_source = ranks.template Take<int32_t>(rank, num_rows);
      LowLatencyCombineParams& m = device_[rank].combine;
      m.peers = d.peers;
      m.tokens = d.tokens;
      m.tuning = c.tuning;
      m.dtype = c.dtype;
      m.y = reinterpret_cast<const char*>(ranks.TakeCopy(rank, h.y));
      m.counts = d.counts;
      m.row_source = d.row_source;
      m.topk_idx = d.topk_idx;
      m.topk_weights = ranks.TakeCopy(rank, h.weights);
      m.out = ranks.template Take<char>(rank, static_cast<int64_t>(h.out.size()));
      LowLatencyCombineGradParams& g = device_[rank].grad;
      g.peers = d.peers;
      g.tokens = d.tokens;
      g.tuning = c.tuning;
      g.dtype = c.dtype;
      g.zero_tail = c.zero_tail;
      g.dout = reinterpret_cast<const char*>(ranks.TakeCopy(rank, h.dout));
      g.y = m.y;
      g.topk_idx = d.topk_idx;
      g.topk_weights = m.topk_weights;
      g.counts = d.counts;
      g.dy = ranks.template Take<char>(rank, y_bytes);
      g.dtopk_weights = ranks.template Take<float>(rank, selections);
      device_[rank].dispatch_ticket = ranks.template Take<uint32_t>(rank, 1);
      device_[rank].combine_ticket = ranks.template Take<uint32_t>(rank, 1);
    }
  }

  void Dispatch(LowLatencyPart part = LowLatencyPart::kBoth) {
    EachRank([&](int rank) {
      LowLatencyDispatchParams p = device_[rank].dispatch;
      p.part = part;
      if (part != LowLatencyPart::kBoth) p.ticket = device_[rank].dispatch_ticket;
      return LaunchRelayedDispatch(c_.RelayOf(rank), p, ranks_.stream(rank));
    });
  }
  void Combine(LowLatencyPart part = LowLatencyPart::kBoth) {
    EachRank([&](int rank) {
      LowLatencyCombineParams p = device_[rank].combine;
      p.part = part;
      if (part != LowLatencyPart::kBoth) p.ticket = device_[rank].combine_ticket;
      return LaunchRelayedCombine(c_.RelayOf(rank), p, ranks_.stream(rank));
    });
  }
  void CombineGrad() {
    if (!c_.gradient) return;
    EachRank([&](int rank) {
      return LaunchRelayedCombineGrad(c_.RelayOf(rank), device_[rank].grad, ranks_.stream(rank));
    });
  }

  /// Compares everything; false if a rank gave up. After the machine has synchronised.
  bool Check() {
    const check::Context context(Describe(group_, c_));
    if (!EndedWell(ranks_, /*synchronized=*/true, [](int) { return true; })) return false;
    for (int rank = 0; rank < group_.num_ranks; ++rank) {
      if (c_.Runs(rank)) CheckRank(rank);
    }
    return true;
  }

 private:
  struct Device {
    LowLatencyDispatchParams dispatch;
    LowLatencyCombineParams combine;
    LowLatencyCombineGradParams grad;
    uint32_t* dispatch_ticket;
    uint32_t* combine_ticket;
  };

  template <typename Run>
  void EachRank(Run run) {
    for (int rank = 0; rank < group_.num_ranks; ++rank) {
      if (!c_.Runs(rank)) continue;
      if (c_.delay_us > 0) {
        ranks_.machine().Delay(rank, static_cast<int>(Uniform(random_, 0, c_.delay_us)));
      }
      const Status status = run(rank);
      if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
    }
  }

  template <typename T>
  void Same(const char* name, int rank, const T* got_device, const std::vector<T>& want) {
    const auto count = static_cast<int64_t>(want.size());
    SameSpan(name, rank, ranks_.Read(got_device, count), want, 0, count);
  }
  template <typename T>
  void SameSpan(const char* name, int rank, const std::vector<T>& got, const std::vector<T>& want,
                int64_t begin, int64_t end) {
    int64_t wrong = 0;
    int64_t first = -1;
    for (int64_t i = begin; i < end; ++i) {
      if (std::memcmp(&got[i], &want[i], sizeof(T)) == 0) continue;
      if (wrong++ == 0) first = i;
    }
    if (wrong == 0) return;
    check::Fail(__FILE__, __LINE__,
                std::string(name) + " of rank " + std::to_string(rank) + ": " +
                    std::to_string(wrong) + " of " + std::to_string(end - begin) +
                    " are wrong, the first at " + std::to_string(first));
  }
  /// Valid rows are as wanted; the others too under zero_tail, and otherwise untouched.
  template <typename T>
  void SameRows(const char* name, int rank, const T* got_device, const std::vector<T>& want) {
    const std::vector<T> got = ranks_.Read(got_device, static_cast<int64_t>(want.size()));
    const auto& counts = host_.ranks[rank].counts;
    const auto expert_elems =
        static_cast<int64_t>(want.size()) / static_cast<int64_t>(counts.size());
    const int64_t row_elems = expert_elems / (group_.num_ranks * group_.chunk);
    for (size_t e = 0; e < counts.size(); ++e) {
      const auto begin = static_cast<int64_t>(e) * expert_elems;
      const int64_t valid = begin + counts[e] * row_elems;
      const int64_t end = begin + expert_elems;
      SameSpan(name, rank, got, want, begin, c_.zero_tail ? end : valid);
      if (c_.zero_tail) continue;
      const auto* bytes = reinterpret_cast<const unsigned char*>(got.data() + valid);
      const bool untouched = std::all_of(bytes, bytes + (end - valid) * sizeof(T),
                                         [](unsigned char byte) { return byte == 0xa5; });
      if (!untouched) check::Fail(__FILE__, __LINE__, std::string(name) + ": the tail was written");
    }
  }

  void CheckRank(int rank) {
    const LowLatencyHostRank& h = host_.ranks[rank];
    const Device& d = device_[rank];
    Same("counts", rank, d.dispatch.counts, h.counts);
    Same("row_source", rank, d.dispatch.row_source, h.row_source);
    SameRows("rows", rank, d.dispatch.rows, h.rows);
    if (d.dispatch.row_scales != nullptr) {
      SameRows("row_scales", rank, d.dispatch.row_scales, h.row_scales);
    }
    Same("out", rank, d.combine.out, h.out);
    if (!c_.gradient) return;
    SameRows("dy", rank, d.grad.dy, h.dy);
    const std::vector<float> dots =
        ranks_.Read(d.grad.dtopk_weights, static_cast<int64_t>(h.dweights.size()));
    for (size_t s = 0; s < dots.size(); ++s) {
      CHECK_NEAR(dots[s], h.dweights[s], 1e-5 * static_cast<double>(c_.hidden));
      if (h.topk_idx[s] < 0) CHECK_EQ(dots[s], 0.0f);
    }
  }

  VirtualRanks<Machine>& ranks_;
  const GroupSettings group_;
  const LowLatencyCase c_;
  Random& random_;
  const LowLatencyHostExchange host_;
  std::vector<Device> device_;
};

/// Dispatch, combine and combine's gradient of one call.
template <typename Machine>
bool RunLowLatencyCase(VirtualRanks<Machine>& ranks, const LowLatencyCase& c, Random& random) {
  ranks.ReleaseAll();
  if (ranks.masked() != c.masked) ranks.Mask(c.masked);
  const bool poison = c.masked != 0 && !c.masked_run;
  if (poison) ranks.PoisonMaskedArenas();
  LowLatencyRun<Machine> run(ranks, c, random);
  run.Dispatch();
  run.Combine();
  run.CombineGrad();
  const check::Context context(Describe(ranks.settings(), c));
  if (!ranks.machine().Synchronize()) return false;
  if (poison) CHECK(ranks.ArenasUntouched());
  return run.Check();
}

/// Two microbatches whose halves overlap, received in either order, `repeats` times without a
/// synchronisation of the host in between.
template <typename Machine>
bool RunOverlappedHalves(VirtualRanks<Machine>& ranks, const LowLatencyCase& c, int repeats,
                         Random& random) {
  constexpr auto kSend = LowLatencyPart::kSend;
  constexpr auto kReceive = LowLatencyPart::kReceive;
  ranks.ReleaseAll();
  LowLatencyCase no_gradient = c;
  no_gradient.gradient = false;
  LowLatencyRun<Machine> a(ranks, no_gradient, random);
  LowLatencyRun<Machine> b(ranks, no_gradient, random);
  for (int i = 0; i < repeats; ++i) {
    const bool swap = Uniform(random, 0, 1) != 0;
    LowLatencyRun<Machine>& first = swap ? b : a;
    LowLatencyRun<Machine>& second = swap ? a : b;
    a.Dispatch(kSend);
    b.Dispatch(kSend);
    first.Dispatch(kReceive);
    first.Combine(kSend);
    second.Dispatch(kReceive);
    second.Combine(kSend);
    second.Combine(kReceive);
    first.Combine(kReceive);
  }
  const check::Context context("overlapped halves");
  if (!ranks.machine().Synchronize()) return false;
  return a.Check() && b.Check();
}

/// The same without combines in between, which would tell every rank that the others have received:
/// only `done` keeps a sender from a buffer that is still read.
template <typename Machine>
bool RunDispatchHalvesAlone(VirtualRanks<Machine>& ranks, const LowLatencyCase& c, int repeats,
                            Random& random) {
  ranks.ReleaseAll();
  LowLatencyCase no_gradient = c;
  no_gradient.gradient = false;
  LowLatencyRun<Machine> a(ranks, no_gradient, random);
  LowLatencyRun<Machine> b(ranks, no_gradient, random);
  for (int i = 0; i < repeats; ++i) {
    for (const auto part : {LowLatencyPart::kSend, LowLatencyPart::kReceive}) {
      a.Dispatch(part);
      b.Dispatch(part);
    }
  }
  a.Combine();
  b.Combine();
  const check::Context context("dispatches alone");
  if (!ranks.machine().Synchronize()) return false;
  return a.Check() && b.Check();
}

/// `count` random shapes; several calls over each group.
template <typename Machine>
void RunRandomLowLatency(int count, uint64_t seed, int64_t max_tokens, int64_t max_hidden,
                         int max_sms, int delay_us) {
  for (int i = 0; i < count; ++i) {
    Random random(seed + i);
    const check::Context context(Labelled("seed", static_cast<int64_t>(seed) + i));
    GroupSettings group;
    group.num_ranks = static_cast<int>(Uniform(random, 1, 8));
    group.num_experts = group.num_ranks * static_cast<int>(Uniform(random, 1, 5));
    group.top_k = static_cast<int>(Uniform(random, 1, 10));
    group.num_sms = static_cast<int>(Uniform(random, 1, max_sms));
    group.chunk = Uniform(random, 1, max_tokens);
    group.once_per_rank = Uniform(random, 0, 2) != 0;
    group.max_row_bytes = Bytes(DType::kF32, max_hidden);
    group.deadline_s = 1e9;
    VirtualRanks<Machine> ranks(group, seed + i);
    for (int repeat = 0; repeat < 3; ++repeat) {
      LowLatencyCase c;
      c.dtype = kFloatDTypes[Uniform(random, 0, 2)];
      c.quantize = Uniform(random, 0, 2) != 0;
      c.dequantize = Uniform(random, 0, 1) != 0;
      c.hidden = c.quantize ? kQuantBlock * Uniform(random, 1, max_hidden / kQuantBlock)
                            : 8 * Uniform(random, 1, max_hidden / 8);
      c.zero_tail = Uniform(random, 0, 1) != 0;
      c.routing = kAllRoutings[Uniform(random, 0, 4)];
      c.num_tokens = Uniform(random, 0, group.chunk);
      c.tuning.pieces = static_cast<int32_t>(Uniform(random, 0, kMaxPieces));
      c.tuning.num_blocks = static_cast<int32_t>(Uniform(random, 0, group.num_sms));
      c.delay_us = delay_us;
      if (!RunLowLatencyCase(ranks, c, random)) return;
      if (repeat == 1 && !RunOverlappedHalves(ranks, c, 3, random)) return;
    }
  }
}

/// `count` random groups whose ranks are masked and taken back; several calls under each mask.
template <typename Machine>
void RunMaskedLowLatency(int count, uint64_t seed, int64_t max_tokens, int64_t max_hidden,
                         int max_sms, int delay_us) {
  for (int i = 0; i < count; ++i) {
    Random random(seed + i);
    const check::Context context(Labelled("seed", static_cast<int64_t>(seed) + i));
    GroupSettings group;
    group.num_ranks = static_cast<int>(Uniform(random, 2, 8));
    group.num_experts = group.num_ranks * static_cast<int>(Uniform(random, 1, 4));
    group.top_k = static_cast<int>(Uniform(random, 1, 8));
    group.num_sms = static_cast<int>(Uniform(random, 1, max_sms));
    group.chunk = Uniform(random, 1, max_tokens);
    group.once_per_rank = Uniform(random, 0, 2) != 0;
    group.max_row_bytes = Bytes(DType::kF32, max_hidden);
    group.deadline_s = 1e9;
    VirtualRanks<Machine> ranks(group, seed + i);
    LowLatencyCase c;
    c.dtype = kFloatDTypes[Uniform(random, 0, 2)];
    c.quantize = Uniform(random, 0, 1) != 0;
    c.dequantize = Uniform(random, 0, 1) != 0;
    c.hidden = kQuantBlock * Uniform(random, 1, max_hidden / kQuantBlock);
    c.delay_us = delay_us;
    for (int repeat = 0; repeat < 4; ++repeat) {
      c.zero_tail = Uniform(random, 0, 1) != 0;
      c.routing = kAllRoutings[Uniform(random, 0, 4)];
      c.num_tokens = Uniform(random, 0, group.chunk);
      c.masked_run = Uniform(random, 0, 1) != 0;
      // The last one has all ranks again.
      const auto all = (uint32_t{1} << group.num_ranks) - 1;
      c.masked = repeat == 3 ? 0 : static_cast<uint32_t>(Uniform(random, 0, all - 1));
      for (int call = 0; call < 2; ++call) {
        if (!RunLowLatencyCase(ranks, c, random)) return;
      }
      if (!RunOverlappedHalves(ranks, c, 2, random)) return;
    }
  }
}

/// A rank that sends nothing, ever, and one that gets everything.
template <typename Machine>
void RunLopsidedLowLatency(int num_ranks) {
  for (const bool once : {true, false}) {
    for (const Routing routing :
         {Routing::kOneHotRank, Routing::kOneHotExpert, Routing::kAllMasked, Routing::kMasked}) {
      GroupSettings group;
      group.num_ranks = num_ranks;
      group.num_experts = 4 * num_ranks;
      group.top_k = 4;
      group.chunk = 5;
      group.num_sms = 2;
      group.once_per_rank = once;
      group.deadline_s = 1e9;
      VirtualRanks<Machine> ranks(group, 7);
      Random random(7);
      LowLatencyCase c;
      c.num_tokens = 5;
      c.routing = routing;
      for (int repeat = 0; repeat < 3; ++repeat) {
        if (!RunLowLatencyCase(ranks, c, random)) return;
      }
    }
  }
}

/// The quantisation kernel against the host's: same bits for finite values, NaN throughout a block
/// that holds an infinity or a NaN.
template <typename Machine>
void RunQuantize(uint64_t seed, int64_t num_tokens, int64_t hidden) {
  Random random(seed);
  GroupSettings group;
  group.num_ranks = 1;
  VirtualRanks<Machine> ranks(group, seed);
  const int64_t blocks = hidden / kQuantBlock;
  const int64_t stride = WireRowBytes(hidden) + 16;
  for (const DType dtype : kFloatDTypes) {
    const check::Context context(NameOf(dtype));
    ranks.ReleaseAll();
    std::vector<char> x(Bytes(dtype, num_tokens * hidden));
    const NumberFormat format = FormatOf(dtype);
    std::normal_distribution<double> normal;
    for (int64_t block = 0; block < num_tokens * blocks; ++block) {
      // From denormal to the top, ties, zeros, any bits.
      const int64_t kind = Uniform(random, 0, 4);
      const int exponent = static_cast<int>(Uniform(random, -150, 127));
      for (int64_t i = block * kQuantBlock; i < (block + 1) * kQuantBlock; ++i) {
        if (kind == 0) {
          SetBitsAt(dtype, x.data(), i, static_cast<uint32_t>(Uniform(random, 0, 0xffffffff)));
        } else if (kind == 1) {
          SetValueAt(dtype, x.data(), i, std::ldexp(normal(random), exponent));
        } else if (kind == 2) {
          SetValueAt(dtype, x.data(), i, static_cast<double>(Uniform(random, -64, 64)) / 8);
        } else if (kind == 3) {
          SetBitsAt(dtype, x.data(), i,
                    static_cast<uint32_t>(Uniform(random, 0, format.mantissa_mask())) |
                        (Uniform(random, 0, 1) ? format.sign_bit() : 0));
        } else {
          SetBitsAt(dtype, x.data(), i, 0);
        }
      }
    }
    std::vector<uint8_t> want_q(num_tokens * hidden);
    std::vector<float> want_scales(num_tokens * blocks);
    for (int64_t token = 0; token < num_tokens; ++token) {
      SelectRowKernels().quantize(dtype, want_q.data() + token * hidden,
                                  want_scales.data() + token * blocks,
                                  x.data() + Bytes(dtype, token * hidden), hidden);
    }
    const auto* x_device = ranks.TakeCopy(0, x);
    auto* wire = ranks.template Take<char>(0, num_tokens * stride);
    auto* q = ranks.template Take<uint8_t>(0, num_tokens * hidden);
    auto* scales = ranks.template Take<float>(0, num_tokens * blocks);
    CHECK(LaunchQuantize(QuantizeToWire(dtype, x_device, num_tokens, hidden, wire, stride),
                         ranks.stream(0))
              .ok());
    CHECK(LaunchQuantize(QuantizeApart(dtype, x_device, num_tokens, hidden, q, scales),
                         ranks.stream(0))
              .ok());
    if (!ranks.machine().Synchronize()) return;
    const auto got_wire = ranks.Read(wire, num_tokens * stride);
    const auto got_q = ranks.Read(q, num_tokens * hidden);
    const auto got_scales = ranks.Read(scales, num_tokens * blocks);
    for (int64_t block = 0; block < num_tokens * blocks; ++block) {
      const int64_t token = block / blocks;
      const int64_t of_token = block % blocks;
      const char* row = got_wire.data() + token * stride;
      CHECK(std::memcmp(row + of_token * kQuantBlock, &got_q[block * kQuantBlock], kQuantBlock) ==
            0);
      CHECK(std::memcmp(row + hidden + 4 * of_token, &got_scales[block], 4) == 0);
      if (!std::isfinite(want_scales[block])) {
        for (int64_t i = 0; i < kQuantBlock; ++i) {
          const double value =
              ValueAt(DType::kF8E4M3, got_q.data(), block * kQuantBlock + i) * got_scales[block];
          CHECK(std::isnan(value));
        }
        continue;
      }
      CHECK(std::memcmp(&got_scales[block], &want_scales[block], 4) == 0);
      CHECK(std::memcmp(&got_q[block * kQuantBlock], &want_q[block * kQuantBlock], kQuantBlock) ==
            0);
    }
    for (int64_t token = 0; token < num_tokens; ++token) {
      const char* row = got_wire.data() + token * stride;
      CHECK(std::all_of(row + hidden + 4 * blocks, row + stride, [](char b) { return b == 0; }));
    }
  }
}

}  // namespace testing
}  // namespace wideep
