// Dispatch and combine's gradient over virtual nodes against the host's, for one drawn shape.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/ep/two_hop_combine_grad.cuh"
#include "csrc/ep/two_hop_dispatch.cuh"
#include "tests/kernels/ended_well.h"
#include "tests/kernels/exchange_cases.h"
#include "tests/kernels/virtual_nodes.h"

namespace wideep {
namespace testing {

/// One rank's plan as the host made it, in device memory.
template <typename Machine>
PlanArrays TakePlanOf(VirtualRanks<Machine>& ranks, int rank, const HostRank& host) {
  return {ranks.TakeCopy(rank, host.dest_rank),    ranks.TakeCopy(rank, host.dest_row),
          ranks.TakeCopy(rank, host.num_rows),     ranks.TakeCopy(rank, host.row_source),
          ranks.TakeCopy(rank, host.arrival_rows), ranks.TakeCopy(rank, host.rows_per_source)};
}

/// What one dispatch puts between nodes: by the formula, each token once to each other node with
/// hosts of it.
struct Crossing {
  uint64_t tokens = 0;
  uint64_t empty_channels = 0;  // that only tell their end
};
template <typename Machine>
Crossing CrossingOf(const VirtualNodes<Machine>& nodes, int rank,
                    const std::vector<int32_t>& dest_rank, int top_k) {
  const two_hop::Context& context = nodes.context(rank);
  const int channels = context.layout.config().num_channels;
  const auto num_tokens = static_cast<int64_t>(dest_rank.size()) / top_k;
  Crossing crossing;
  for (int node = 0; node < nodes.nodes().num_nodes; ++node) {
    if (node == nodes.nodes().NodeOf(context.number)) continue;
    for (int channel = 0; channel < channels; ++channel) {
      const auto [begin, end] = two_hop::TokensOf(num_tokens, channel, channels);
      uint64_t tokens = 0;
      for (int64_t token = begin; token < end; ++token) {
        tokens += std::any_of(&dest_rank[token * top_k], &dest_rank[token * top_k] + top_k,
                              [&](int32_t dst) {
                                const int number = dst < 0 ? -1 : context.number_of[dst];
                                return number >= 0 && nodes.nodes().NodeOf(number) == node;
                              });
      }
      crossing.tokens += tokens;
      crossing.empty_channels += tokens == 0;
    }
  }
  return crossing;
}

/// One rank's dispatch over fresh memory, ready to launch.
template <typename Machine>
DispatchParams TakeDispatch(VirtualRanks<Machine>& ranks, int rank, const HostExchange& host,
                            const ExchangeCase& c) {
  const HostRank& h = host.ranks[rank];
  DispatchParams d;
  d.peers = ranks.context(rank);
  d.plan = TakePlanOf(ranks, rank, h);
  d.num_tokens = c.num_tokens;
  d.top_k = ranks.settings().top_k;
  d.row_bytes = Bytes(c.dtype, c.hidden);
  d.capacity = host.capacity;
  d.zero_tail = c.zero_tail;
  d.x = ranks.TakeCopy(rank, h.x);
  d.weights = ranks.TakeCopy(rank, h.weights);
  d.rows = ranks.template Take<char>(rank, d.capacity * d.row_bytes);
  d.row_weights = ranks.template Take<float>(rank, d.capacity);
  return d;
}

/// Runs both ops on all ranks, with a plan of the host's, and compares; between them a dispatch of
/// shorter rows, if they can be halved. False if an op gave up.
template <typename Machine>
bool RunTwoHopDispatch(VirtualRanks<Machine>& ranks, VirtualNodes<Machine>& nodes,
                       const ExchangeCase& c, Random& random) {
  const GroupSettings& group = ranks.settings();
  const check::Context context(Describe(group, c));
  const HostExchange host(group, c, random);
  const int64_t capacity = host.capacity;
  const int64_t row_bytes = Bytes(c.dtype, c.hidden);
  ranks.ReleaseAll();
  if (ranks.masked() != c.masked) {
    ranks.Mask(c.masked);
    nodes.Reset(c.masked);
  }
  const int64_t short_bytes = row_bytes % 32 == 0 ? row_bytes / 2 : 0;
  std::vector<DispatchParams> dispatch(group.num_ranks);
  std::vector<DispatchParams> short_dispatch(group.num_ranks);
  std::vector<CombineGradParams> grad(group.num_ranks);
  std::vector<two_hop::RankState> before;
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    const HostRank& h = host.ranks[rank];
    before.push_back(nodes.State(rank));
    const DispatchParams& d = dispatch[rank] = TakeDispatch(ranks, rank, host, c);
    short_dispatch[rank] = d;
    short_dispatch[rank].row_bytes = short_bytes;
    short_dispatch[rank].zero_tail = true;
    short_dispatch[rank].rows = ranks.template Take<char>(rank, capacity * short_bytes);
    short_dispatch[rank].row_weights = ranks.template Take<float>(rank, capacity);
    CombineGradParams& g = grad[rank];
    g.peers = d.peers;
    g.plan = d.plan;
    g.dtype = c.dtype;
    g.num_tokens = c.num_tokens;
    g.top_k = group.top_k;
    g.hidden = c.hidden;
    g.capacity = capacity;
    g.zero_tail = c.zero_tail;
    g.dout = ranks.TakeCopy(rank, h.dout);
    g.y = ranks.TakeCopy(rank, h.y);
    g.row_weights = ranks.TakeCopy(rank, h.row_weights);
    g.dy = ranks.template Take<char>(rank, capacity * row_bytes);
    g.drow_weights = ranks.template Take<float>(rank, capacity);
  }
  const auto each_rank = [&](auto run) {
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      if (!c.Runs(rank)) continue;
      if (c.delay_us > 0) {
        ranks.machine().Delay(rank, static_cast<int>(Uniform(random, 0, c.delay_us)));
      }
      const Status status = run(rank);
      if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
    }
  };
  nodes.BeginOps();
  each_rank(
      [&](int r) { return LaunchTwoHopDispatch(nodes.Params(r, dispatch[r]), ranks.stream(r)); });
  if (short_bytes > 0) {
    each_rank([&](int r) {
      return LaunchTwoHopDispatch(nodes.Params(r, short_dispatch[r]), ranks.stream(r));
    });
  }
  each_rank(
      [&](int r) { return LaunchTwoHopCombineGrad(nodes.Params(r, grad[r]), ranks.stream(r)); });
  nodes.EndOps();
  if (!EndedWell(ranks, ranks.machine().Synchronize(), [&](int rank) { return c.Runs(rank); }))
    return false;

  for (int rank = 0; rank < group.num_ranks; ++rank) {
    if (!c.Runs(rank)) continue;
    const HostRank& h = host.ranks[rank];
    const int64_t filled = h.num_rows[0];
    const auto check_rows = [&](const char* name, const char* got_device,
                                const std::vector<char>& want) {
      const std::vector<char> got = ranks.Read(got_device, capacity * row_bytes);
      CheckSame(name, rank, got, want.data(), (c.zero_tail ? capacity : filled) * row_bytes);
      if (c.zero_tail) return;
      CHECK(std::all_of(got.begin() + filled * row_bytes, got.end(),
                        [](char byte) { return byte == '\xa5'; }));
    };
    check_rows("rows", dispatch[rank].rows, h.rows);
    if (short_bytes > 0) {
      std::vector<char> want(capacity * short_bytes);
      for (int64_t row = 0; row < filled && !c.IsMasked(rank); ++row) {
        const int64_t token = h.row_source[row] / group.top_k;
        const char* x = host.ranks[token / c.num_tokens].x.data();
        std::copy_n(x + token % c.num_tokens * short_bytes, short_bytes, &want[row * short_bytes]);
      }
      CheckSame("short rows", rank, ranks.Read(short_dispatch[rank].rows, capacity * short_bytes),
                want.data(), capacity * short_bytes);
    }
    check_rows("dy", grad[rank].dy, h.dy);
    CheckSame("row_weights", rank, ranks.Read(dispatch[rank].row_weights, capacity),
              h.row_weights.data(), c.zero_tail ? capacity : filled);
    const std::vector<float> dots = ranks.Read(grad[rank].drow_weights, capacity);
    for (int64_t row = 0; row < (c.zero_tail ? capacity : filled); ++row) {
      CHECK_NEAR(dots[row], h.drow_weights[row], 1e-4 * static_cast<double>(c.hidden));
    }

    if (c.IsMasked(rank)) continue;
    const two_hop::RankState after = nodes.State(rank);
    const Crossing crossing = CrossingOf(nodes, rank, h.dest_rank, group.top_k);
    const uint64_t num_ops = short_bytes > 0 ? 3 : 2;
    const auto header_bytes = static_cast<uint64_t>(two_hop::SlotHeaderBytes(group.top_k));
    CHECK_EQ(after.tokens_put[0] - before[rank].tokens_put[0], num_ops * crossing.tokens);
    CHECK_EQ(after.bytes_put[0] - before[rank].bytes_put[0],
             num_ops * (crossing.tokens + crossing.empty_channels) * header_bytes +
                 crossing.tokens * static_cast<uint64_t>(2 * row_bytes + short_bytes));
  }
  return true;
}

}  // namespace testing
}  // namespace wideep
