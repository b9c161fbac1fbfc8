// Combine and dispatch's gradient over virtual nodes against plain loops, bit for bit, with plans
// that the host makes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ep/two_hop_combine.cuh"
#include "tests/kernels/ended_well.h"
#include "tests/kernels/exchange_cases.h"
#include "tests/kernels/virtual_nodes.h"

namespace wideep {
namespace testing {

/// A token's kept selections by where their rows lie.
struct NodesOfTokens {
  const ExchangeCase& c;
  const HostExchange& host;
  const std::vector<int>& node_of_rank;
  int top_k;

  bool IsKept(int home, int64_t token, int k, int rank) const {
    return !c.IsMasked(home) && !c.IsMasked(rank) &&
           host.ranks[home].dest_rank[token * top_k + k] == rank;
  }
  int num_ranks() const { return static_cast<int>(node_of_rank.size()); }
};

/// One element of a token's sum: by node, rank and k, what comes from another node rounded on its
/// way. `weights`: null for sums of the rows themselves.
inline float SumByNode(const NodesOfTokens& tokens, int home, int64_t token, int64_t element,
                       std::vector<float> HostRank::* weights) {
  const ExchangeCase& c = tokens.c;
  // In double, of two float32, so that nothing is rounded but by the conversion to float.
  const auto add = [](float sum, double term) { return static_cast<float>(sum + term); };
  float sum = 0;
  for (int first = 0; first < tokens.num_ranks();) {
    const int node = tokens.node_of_rank[first];
    const bool crosses = node != tokens.node_of_rank[home];
    float partial = 0;
    bool any = false;
    int rank = first;
    for (; rank < tokens.num_ranks() && tokens.node_of_rank[rank] == node; ++rank) {
      const HostRank& expert = tokens.host.ranks[rank];
      for (int k = 0; k < tokens.top_k; ++k) {
        if (!tokens.IsKept(home, token, k, rank)) continue;
        const int64_t row = tokens.host.ranks[home].dest_row[token * tokens.top_k + k];
        const double value = ValueAt(c.dtype, expert.y.data(), row * c.hidden + element);
        const auto term =
            static_cast<float>(weights == nullptr ? value : (expert.*weights)[row] * value);
        (crosses ? partial : sum) = add(crosses ? partial : sum, term);
        any = true;
      }
    }
    if (crosses && any) {
      char rounded[4];
      SetValueAt(c.dtype, rounded, 0, partial);
      sum = add(sum, ValueAt(c.dtype, rounded, 0));
    }
    first = rank;
  }
  return sum;
}

inline void CheckSumsByNode(const char* name, const NodesOfTokens& tokens, int home,
                            std::vector<float> HostRank::* weights, const std::vector<char>& got) {
  const ExchangeCase& c = tokens.c;
  int64_t wrong = 0;
  for (int64_t i = 0; i < c.num_tokens * c.hidden; ++i) {
    char want[4];
    SetValueAt(c.dtype, want, 0, SumByNode(tokens, home, i / c.hidden, i % c.hidden, weights));
    wrong += !SameNumber(c.dtype, BitsAt(c.dtype, want, 0), BitsAt(c.dtype, got.data(), i));
  }
  if (wrong == 0) return;
  check::Fail(__FILE__, __LINE__,
              std::string(name) + " of rank " + std::to_string(home) + ": " +
                  std::to_string(wrong) + " sums are wrong");
}

/// Sums that a rank sends home for a call: one for each token of another node whose node mate of
/// the same index it is, if rows of the token lie on its node.
inline uint64_t SumsSentBy(const NodesOfTokens& tokens, const std::vector<int>& node_of_rank,
                           int sender) {
  const auto alive_of_node = [&](int node) {
    std::vector<int> alive;
    for (int r = 0; r < tokens.num_ranks(); ++r) {
      if (node_of_rank[r] == node && !tokens.c.IsMasked(r)) alive.push_back(r);
    }
    return alive;
  };
  const std::vector<int> mates = alive_of_node(node_of_rank[sender]);
  std::set<std::pair<int, int64_t>> sent;
  for (int home = 0; home < tokens.num_ranks(); ++home) {
    if (node_of_rank[home] == node_of_rank[sender] || tokens.c.IsMasked(home)) continue;
    const std::vector<int> others = alive_of_node(node_of_rank[home]);
    const auto index = std::find(others.begin(), others.end(), home) - others.begin();
    if (mates[index % mates.size()] != sender) continue;
    for (int64_t token = 0; token < tokens.c.num_tokens; ++token) {
      for (int k = 0; k < tokens.top_k; ++k) {
        for (const int mate : mates) {
          if (tokens.IsKept(home, token, k, mate)) sent.insert({home, token});
        }
      }
    }
  }
  return sent.size();
}

/// Combine of one rank with the host's plan.
template <typename Machine>
CombineParams TakeCombine(VirtualRanks<Machine>& ranks, const HostExchange& host,
                          const ExchangeCase& c, int rank) {
  const HostRank& h = host.ranks[rank];
  CombineParams p;
  p.peers = ranks.context(rank);
  p.plan = {ranks.TakeCopy(rank, h.dest_rank),    ranks.TakeCopy(rank, h.dest_row),
            ranks.TakeCopy(rank, h.num_rows),     ranks.TakeCopy(rank, h.row_source),
            ranks.TakeCopy(rank, h.arrival_rows), ranks.TakeCopy(rank, h.rows_per_source)};
  p.dtype = c.dtype;
  p.num_tokens = c.num_tokens;
  p.top_k = ranks.settings().top_k;
  p.hidden = c.hidden;
  p.y = ranks.TakeCopy(rank, h.y);
  p.row_scalars = ranks.TakeCopy(rank, h.row_weights);
  p.out = ranks.template Take<char>(rank, Bytes(c.dtype, c.num_tokens * c.hidden));
  return p;
}

/// Runs both ops `num_calls` times each and compares. False if an op gave up.
template <typename Machine>
bool RunTwoHopCombine(VirtualRanks<Machine>& ranks, VirtualNodes<Machine>& nodes,
                      const ExchangeCase& c, int num_calls, Random& random) {
  const GroupSettings& group = ranks.settings();
  const check::Context context(Describe(group, c));
  const HostExchange host(group, c, random);
  const NodesOfTokens tokens{c, host, nodes.shape().node_of_rank, group.top_k};
  const int64_t selections = c.num_tokens * group.top_k;
  const int64_t out_bytes = Bytes(c.dtype, c.num_tokens * c.hidden);
  ranks.ReleaseAll();
  if (ranks.masked() != c.masked) {
    ranks.Mask(c.masked);
    nodes.Reset(c.masked);
  }

  std::vector<two_hop::RankState> before;
  std::vector<CombineParams> combine;
  std::vector<CombineParams> grad;
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    const HostRank& h = host.ranks[rank];
    before.push_back(nodes.State(rank));
    combine.push_back(TakeCombine(ranks, host, c, rank));
    CombineParams& g = grad.emplace_back(combine.back());
    g.row_scalars = ranks.TakeCopy(rank, h.drow_weights_in);
    g.out = ranks.template Take<char>(rank, out_bytes);
    g.dweights = ranks.template Take<float>(rank, selections);
  }
  nodes.BeginOps();
  for (int call = 0; call < 2 * num_calls; ++call) {
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      if (!c.Runs(rank)) continue;
      if (c.delay_us > 0) {
        ranks.machine().Delay(rank, static_cast<int>(Uniform(random, 0, c.delay_us)));
      }
      const CombineParams& p = call % 2 == 0 ? combine[rank] : grad[rank];
      const Status status = LaunchTwoHopCombine(nodes.Params(rank, p), ranks.stream(rank));
      if (!status.ok()) check::Fail(__FILE__, __LINE__, status.message());
    }
  }
  nodes.EndOps();
  if (!EndedWell(ranks, ranks.machine().Synchronize(), [&](int rank) { return c.Runs(rank); }))
    return false;

  const int64_t slot_bytes = two_hop::SlotHeaderBytes(group.top_k) + Bytes(c.dtype, c.hidden);
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    if (!c.Runs(rank)) continue;
    CheckSumsByNode("out", tokens, rank, &HostRank::row_weights,
                    ranks.Read(combine[rank].out, out_bytes));
    CheckSumsByNode("dx", tokens, rank, nullptr, ranks.Read(grad[rank].out, out_bytes));
    CheckSame("dweights", rank, ranks.Read(grad[rank].dweights, selections),
              host.ranks[rank].dweights.data(), selections);
    const two_hop::RankState state = nodes.State(rank);
    constexpr int kBack = static_cast<int>(two_hop::Direction::kBack);
    const uint64_t sent =
        c.IsMasked(rank) ? 0 : 2 * num_calls * SumsSentBy(tokens, nodes.shape().node_of_rank, rank);
    CHECK_EQ(state.tokens_put[kBack] - before[rank].tokens_put[kBack], sent);
    CHECK_EQ(state.bytes_put[kBack] - before[rank].bytes_put[kBack], sent * slot_bytes);
    CHECK_EQ(state.tokens_put[0], before[rank].tokens_put[0]);
  }
  return true;
}

}  // namespace testing
}  // namespace wideep
