// The exchange kernels against the host's (csrc/ep/*_host), in every form, for one drawn shape.
// Used on the GPU and in the emulator.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/ep/combine.h"
#include "csrc/ep/combine_host.h"
#include "csrc/ep/dispatch.h"
#include "csrc/ep/dispatch_host.h"
#include "csrc/ep/two_hop.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"
#include "tests/kernels/ended_well.h"
#include "tests/kernels/plan_arrays.h"

namespace wideep {
namespace testing {

/// A group over nodes.
struct OverNodes {
  std::vector<std::shared_ptr<TwoHop>> ranks;
  /// Around what is launched until the machine is synchronized.
  std::function<void()> begin = [] {};
  std::function<void()> end = [] {};
};

struct ExchangeCase {
  int64_t num_tokens = 8;
  int64_t hidden = 64;
  int64_t capacity = 0;  // 0: the worst case
  DType dtype = DType::kBF16;
  Routing routing = Routing::kUniform;
  DispatchForm dispatch_form = DispatchForm::kPush;
  CombineForm combine_form = CombineForm::kPull;
  int num_chunks = 0;  // of CombineForm::kReduce
  bool zero_tail = true;
  int delay_us = 0;                // each rank is held up by as much at random before each op
  uint32_t masked = 0;             // bit r: rank r is masked
  bool masked_after_plan = false;  // the plan is older than the mask
  bool masked_run = true;          // masked ranks launch the ops too
  const OverNodes* over_nodes = nullptr;  // forms do not count; null: one node

  bool IsMasked(int rank) const { return (masked >> rank & 1) != 0; }
  bool Runs(int rank) const { return masked_run || !IsMasked(rank); }
};

constexpr CombineForm kCombineForms[] = {CombineForm::kPull, CombineForm::kPush,
                                         CombineForm::kReduce};
inline const char* NameOf(CombineForm form) {
  return form == CombineForm::kPull ? "pull" : form == CombineForm::kPush ? "push" : "reduce";
}

inline std::string Describe(const GroupSettings& group, const ExchangeCase& c) {
  return std::to_string(group.num_ranks) + " ranks, " + std::to_string(c.num_tokens) +
         " tokens, top " + std::to_string(group.top_k) + ", " + std::to_string(group.num_experts) +
         " experts, hidden " + std::to_string(c.hidden) + " " + NameOf(c.dtype) + ", capacity " +
         std::to_string(c.capacity) + ", " + NameOf(c.routing) +
         (c.dispatch_form == DispatchForm::kPush ? ", dispatch push" : ", dispatch pull") +
         ", combine " + NameOf(c.combine_form) +
         (c.num_chunks == 0 ? "" : " in " + std::to_string(c.num_chunks)) +
         (group.zero_copy ? "" : ", rings") + (c.zero_tail ? "" : ", tail left") +
         (c.masked == 0 ? "" : ", masked " + std::to_string(c.masked)) +
         (c.masked_after_plan ? " after the plan" : "") + (c.masked_run ? "" : ", not running") +
         (c.over_nodes == nullptr ? "" : ", over nodes");
}

/// One rank's arrays on the host, as the host's ops fill them.
struct HostRank : HostPlan {
  std::vector<float> weights, row_weights, drow_weights_in, dweights, drow_weights;
  std::vector<char> x, rows, y, out, dx, dout, dy;
};

/// The host's results: what every form has to give.
class HostExchange {
 public:
  HostExchange(const GroupSettings& group, const ExchangeCase& c, Random& random)
      : ranks(group.num_ranks) {
    const int64_t selections = c.num_tokens * group.top_k;
    capacity = c.capacity > 0 ? c.capacity : group.num_ranks * selections;
    const int64_t row_bytes = Bytes(c.dtype, c.hidden);
    const auto rows_of = [&](int64_t count) {
      std::vector<char> rows(count * row_bytes);
      // Ordinary numbers: how denormals are treated is the processor's choice.
      std::normal_distribution<double> normal;
      for (int64_t i = 0; i < count * c.hidden; ++i) {
        SetValueAt(c.dtype, rows.data(), i, normal(random));
      }
      return rows;
    };
    std::vector<PlanBuffers> plan;
    std::vector<DispatchBuffers> dispatch;
    std::vector<CombineBuffers> combine;
    std::vector<DispatchGradBuffers> dispatch_grad;
    std::vector<CombineGradBuffers> combine_grad;
    for (HostRank& r : ranks) {
      r.Draw(random, group, c.routing, c.num_tokens, capacity);
      r.x = rows_of(c.num_tokens);
      r.dout = rows_of(c.num_tokens);
      r.y = rows_of(capacity);
      r.weights = RandomFloats(random, selections);
      r.drow_weights_in = RandomFloats(random, capacity);
      r.rows.resize(capacity * row_bytes);
      r.dy.resize(capacity * row_bytes);
      r.out.resize(c.num_tokens * row_bytes);
      r.dx.resize(c.num_tokens * row_bytes);
      r.row_weights.resize(capacity);
      r.drow_weights.resize(capacity);
      r.dweights.resize(selections);
      plan.push_back(r.Buffers());
      dispatch.push_back({r.x.data(), r.weights.data(), r.dest_rank.data(), r.dest_row.data(),
                          r.num_rows.data(), r.rows.data(), r.row_weights.data()});
      combine.push_back(
          {r.y.data(), r.row_weights.data(), r.dest_rank.data(), r.dest_row.data(), r.out.data()});
      dispatch_grad.push_back({r.y.data(), r.drow_weights_in.data(), r.dest_rank.data(),
                               r.dest_row.data(), r.dx.data(), r.dweights.data()});
      combine_grad.push_back({r.dout.data(), r.y.data(), r.row_weights.data(), r.dest_rank.data(),
                              r.dest_row.data(), r.num_rows.data(), r.dy.data(),
                              r.drow_weights.data()});
    }
    const PlanShape plan_shape{group.num_ranks,   c.num_tokens, group.top_k,
                               group.num_experts, capacity,     false};
    const DispatchShape shape{c.num_tokens, group.top_k, c.hidden, capacity, c.dtype, true};
    const CombineShape sum{c.num_tokens, group.top_k, c.hidden, c.dtype};
    for (int r = 0; r < group.num_ranks; ++r)
      plan[r].masked = c.IsMasked(r) && !c.masked_after_plan;
    CHECK(MakePlan(plan_shape, plan).ok());
    for (int r = 0; r < group.num_ranks; ++r) {
      if (!c.IsMasked(r)) continue;
      if (plan[r].masked) MakeEmptyPlan(plan_shape, plan[r]);
      dispatch[r].masked = combine[r].masked = true;
      dispatch_grad[r].masked = combine_grad[r].masked = true;
      EmptyDispatch(shape, dispatch[r]);
      EmptyCombine(sum, combine[r]);
      EmptyDispatchGrad(sum, dispatch_grad[r]);
      EmptyCombineGrad(shape, combine_grad[r]);
    }
    WorkerPool& pool = PoolOf(0);
    Finish([&](auto done) { Dispatch(shape, dispatch, pool, done); });
    Finish([&](auto done) { Combine(sum, combine, pool, done); });
    Finish([&](auto done) { DispatchGrad(sum, dispatch_grad, pool, done); });
    Finish([&](auto done) { CombineGrad(shape, combine_grad, pool, done); });
  }

  std::vector<HostRank> ranks;
  int64_t capacity;
};

/// Rows whose sums were rounded once more on the way.
inline void CheckNearRows(const char* name, int rank, DType dtype, const std::vector<char>& got,
                          const std::vector<char>& want, int top_k) {
  const double epsilon = std::ldexp(1.0, -FormatOf(dtype).mantissa_bits);
  const int64_t count = static_cast<int64_t>(want.size()) / static_cast<int64_t>(SizeOf(dtype));
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = ValueAt(dtype, want.data(), i);
    const double g = ValueAt(dtype, got.data(), i);
    // Terms are of ordinary size, at most top_k of them; each partial sum is off by half an ulp.
    if (!(std::fabs(g - w) <= epsilon * (std::fabs(w) + 8 * top_k))) ++wrong;
  }
  if (wrong > 0) {
    check::Fail(__FILE__, __LINE__,
                std::string(name) + " of rank " + std::to_string(rank) + ": " +
                    std::to_string(wrong) + " values are off");
  }
}

/// The sums of CombineForm::kReduce, bit for bit: those of two or more rows at another rank are
/// rounded on their way. `weights`: null for sums of the rows themselves.
inline void CheckReducedRows(const char* name, int rank, const ExchangeCase& c, int top_k,
                             const HostExchange& host, std::vector<float> HostRank::* weights,
                             const std::vector<char>& got) {
  const HostRank& home = host.ranks[rank];
  // In double, of two float32, so that nothing is rounded but by the conversion to float.
  const auto add = [](float sum, double term) { return static_cast<float>(sum + term); };
  int64_t wrong = 0;
  for (int64_t i = 0; i < c.num_tokens * c.hidden; ++i) {
    const int32_t* ranks = &home.dest_rank[i / c.hidden * top_k];
    float sum = 0;
    for (int dst = 0; dst < static_cast<int>(host.ranks.size()); ++dst) {
      if (c.IsMasked(rank) || c.IsMasked(dst)) continue;
      const HostRank& expert = host.ranks[dst];
      const bool rounds = dst != rank && std::count(ranks, ranks + top_k, dst) > 1;
      float partial = 0;
      for (int k = 0; k < top_k; ++k) {
        if (ranks[k] != dst) continue;
        const int64_t row = home.dest_row[i / c.hidden * top_k + k];
        const double value = ValueAt(c.dtype, expert.y.data(), row * c.hidden + i % c.hidden);
        const float term =
            static_cast<float>(weights == nullptr ? value : (expert.*weights)[row] * value);
        (rounds ? partial : sum) = add(rounds ? partial : sum, term);
      }
      if (!rounds) continue;
      char rounded[4];
      SetValueAt(c.dtype, rounded, 0, partial);
      sum = add(sum, ValueAt(c.dtype, rounded, 0));
    }
    char want[4];
    SetValueAt(c.dtype, want, 0, sum);
    const double wanted = ValueAt(c.dtype, want, 0);
    const double value = ValueAt(c.dtype, got.data(), i);
    if (value != wanted && !(std::isnan(value) && std::isnan(wanted))) ++wrong;
  }
  if (wrong == 0) return;
  check::Fail(__FILE__, __LINE__,
              std::string(name) + " of rank " + std::to_string(rank) + ": " +
                  std::to_string(wrong) + " sums are wrong");
}

template <typename Machine>
void MaskRanks(VirtualRanks<Machine>& ranks, const ExchangeCase& c, uint32_t masked) {
  ranks.Mask(masked);
  if (c.over_nodes == nullptr) return;
  for (const auto& rank : c.over_nodes->ranks) {
    if (const Status status = rank->Reset(masked); !status.ok()) {
      check::Fail(__FILE__, __LINE__, status.message());
    }
  }
}

/// Runs all five ops on all ranks and compares. Returns false if an op gave up.
template <typename Machine>
bool RunExchangeCase(VirtualRanks<Machine>& ranks, const ExchangeCase& c, Random& random) {
  const GroupSettings& group = ranks.settings();
  const check::Context context(Describe(group, c));
  const HostExchange host(group, c, random);
  const int64_t selections = c.num_tokens * group.top_k;
  const int64_t capacity = host.capacity;
  const int64_t row_bytes = Bytes(c.dtype, c.hidden);
  ranks.ReleaseAll();
  const uint32_t plan_mask = c.masked_after_plan ? 0 : c.masked;
  if (ranks.masked() != plan_mask) MaskRanks(ranks, c, plan_mask);

  struct Device {
    PlanParams plan;
    DispatchParams dispatch;
    CombineParams combine, dispatch_grad;
    CombineGradParams combine_grad;
  };
  std::vector<Device> device(group.num_ranks);
  const auto each_rank = [&](auto run) {
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      if (!c.Runs(rank) && ranks.masked() != 0) continue;
      if (c.delay_us > 0) {
        ranks.machine().Delay(rank, static_cast<int>(Uniform(random, 0, c.delay_us)));
      }
      const Status status = run(rank);
      if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
    }
  };

  for (int rank = 0; rank < group.num_ranks; ++rank) {
    const HostRank& h = host.ranks[rank];
    PlanParams& p = device[rank].plan;
    p = TakePlan(ranks, rank, h.topk_idx, capacity);
    const PlanArrays plan{p.dest_rank,  p.dest_row,     p.num_rows,
                          p.row_source, p.arrival_rows, p.rows_per_source};

    DispatchParams& d = device[rank].dispatch;
    d.peers = p.peers;
    d.plan = plan;
    d.form = c.dispatch_form;
    d.num_tokens = c.num_tokens;
    d.top_k = group.top_k;
    d.row_bytes = row_bytes;
    d.capacity = capacity;
    d.zero_tail = c.zero_tail;
    d.x = reinterpret_cast<const char*>(ranks.TakeCopy(rank, h.x));
    d.weights = ranks.TakeCopy(rank, h.weights);
    d.rows = ranks.template Take<char>(rank, capacity * row_bytes);
    d.row_weights = ranks.template Take<float>(rank, capacity);

    CombineParams& m = device[rank].combine;
    m.peers = p.peers;
    m.plan = plan;
    m.form = c.combine_form;
    m.dtype = c.dtype;
    m.num_tokens = c.num_tokens;
    m.top_k = group.top_k;
    m.hidden = c.hidden;
    m.y = ranks.TakeCopy(rank, h.y);
    m.row_scalars = ranks.TakeCopy(rank, h.row_weights);
    m.out = ranks.template Take<char>(rank, c.num_tokens * row_bytes);
    m.num_chunks = c.num_chunks;
    if (c.combine_form == CombineForm::kReduce) {
      m.sums = ranks.template Take<char>(rank, capacity * row_bytes);
    }

    CombineParams& g = device[rank].dispatch_grad;
    g = m;
    g.row_scalars = ranks.TakeCopy(rank, h.drow_weights_in);
    g.out = ranks.template Take<char>(rank, c.num_tokens * row_bytes);
    g.dweights = ranks.template Take<float>(rank, selections);

    CombineGradParams& b = device[rank].combine_grad;
    b.peers = p.peers;
    b.plan = plan;
    b.dtype = c.dtype;
    b.num_tokens = c.num_tokens;
    b.top_k = group.top_k;
    b.hidden = c.hidden;
    b.capacity = capacity;
    b.zero_tail = c.zero_tail;
    b.dout = ranks.TakeCopy(rank, h.dout);
    b.y = m.y;
    b.row_weights = m.row_scalars;
    b.dy = ranks.template Take<char>(rank, capacity * row_bytes);
    b.drow_weights = ranks.template Take<float>(rank, capacity);
  }
  const bool poison = c.masked != 0 && !c.masked_run;
  if (poison && !c.masked_after_plan) ranks.PoisonMaskedArenas();
  const OverNodes* const nodes = c.over_nodes;
  const auto synchronize = [&] {
    if (nodes != nullptr) nodes->end();
    return ranks.machine().Synchronize();
  };
  if (nodes != nullptr) nodes->begin();
  each_rank([&](int r) {
    return nodes != nullptr ? nodes->ranks[r]->Plan(device[r].plan, ranks.stream(r))
                            : LaunchPlan(device[r].plan, ranks.stream(r));
  });
  if (c.masked_after_plan) {
    if (!synchronize()) return false;
    MaskRanks(ranks, c, c.masked);
    if (poison) ranks.PoisonMaskedArenas();
    if (nodes != nullptr) nodes->begin();
  }
  each_rank([&](int r) {
    return nodes != nullptr ? nodes->ranks[r]->Dispatch(device[r].dispatch, ranks.stream(r))
                            : LaunchDispatch(device[r].dispatch, ranks.stream(r));
  });
  for (CombineParams Device::* sum : {&Device::combine, &Device::dispatch_grad}) {
    each_rank([&](int r) {
      return nodes != nullptr ? nodes->ranks[r]->Combine(device[r].*sum, ranks.stream(r))
                              : LaunchCombine(device[r].*sum, ranks.stream(r));
    });
  }
  each_rank([&](int r) {
    return nodes != nullptr ? nodes->ranks[r]->CombineGrad(device[r].combine_grad, ranks.stream(r))
                            : LaunchCombineGrad(device[r].combine_grad, ranks.stream(r));
  });
  if (!EndedWell(ranks, synchronize(), [&](int rank) { return c.Runs(rank); })) return false;

  if (poison) CHECK(ranks.ArenasUntouched());

  // Sums are rounded on their way.
  const bool through_rings = (!group.zero_copy && group.num_ranks > 1) || c.over_nodes != nullptr;
  const bool reduces = c.combine_form == CombineForm::kReduce && !through_rings;
  const bool exact_sums = c.combine_form == CombineForm::kPull && !through_rings;
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    const HostRank& h = host.ranks[rank];
    const Device& d = device[rank];
    if (!c.Runs(rank)) {
      const std::vector<char> rows = ranks.Read(d.dispatch.rows, capacity * row_bytes);
      CHECK(std::all_of(rows.begin(), rows.end(), [](char byte) { return byte == '\xa5'; }));
      continue;
    }
    CheckPlan(ranks, rank, d.plan, h);

    // Rows past the last one are zero, or untouched.
    const int64_t filled = h.num_rows[0];
    const auto check_rows = [&](const char* name, const char* got_device,
                                const std::vector<char>& want) {
      const std::vector<char> got = ranks.Read(got_device, capacity * row_bytes);
      CheckSame(name, rank, got, want.data(),
                c.zero_tail ? capacity * row_bytes : filled * row_bytes);
      if (c.zero_tail) return;
      const bool untouched = std::all_of(got.begin() + filled * row_bytes, got.end(),
                                         [](char byte) { return byte == '\xa5'; });
      if (!untouched) check::Fail(__FILE__, __LINE__, std::string(name) + ": the tail was written");
    };
    check_rows("rows", d.dispatch.rows, h.rows);
    check_rows("dy", d.combine_grad.dy, h.dy);
    CheckSame("row_weights", rank, ranks.Read(d.dispatch.row_weights, capacity),
              h.row_weights.data(), c.zero_tail ? capacity : filled);
    const std::vector<float> dots = ranks.Read(d.combine_grad.drow_weights, capacity);
    for (int64_t row = 0; row < filled; ++row) {
      CHECK_NEAR(dots[row], h.drow_weights[row], 1e-4 * c.hidden);
    }

    const int64_t out_bytes = c.num_tokens * row_bytes;
    const std::vector<char> out = ranks.Read(d.combine.out, out_bytes);
    const std::vector<char> dx = ranks.Read(d.dispatch_grad.out, out_bytes);
    if (exact_sums) {
      CheckSame("out", rank, out, h.out.data(), out_bytes);
      CheckSame("dx", rank, dx, h.dx.data(), out_bytes);
    } else if (reduces) {
      CheckReducedRows("out", rank, c, group.top_k, host, &HostRank::row_weights, out);
      CheckReducedRows("dx", rank, c, group.top_k, host, nullptr, dx);
    } else {
      CheckNearRows("out", rank, c.dtype, out, h.out, group.top_k);
      CheckNearRows("dx", rank, c.dtype, dx, h.dx, group.top_k);
    }
    CheckSame("dweights", rank, ranks.Read(d.dispatch_grad.dweights, selections), h.dweights.data(),
              selections);
  }
  return true;
}

}  // namespace testing
}  // namespace wideep
