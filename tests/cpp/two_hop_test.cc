// The two-hop exchange on CPU threads: plan, dispatch and combine of every rank over a network that
// delivers late and in any order, against loops over all ranks' tokens. Built a second time with
// ThreadSanitizer.
#include <array>
#include <map>
#include <set>

#include "csrc/ep/plan_host.h"
#include "tests/cpp/check.h"
#include "tests/cpp/two_hop_stages.h"

namespace wideep::two_hop {
namespace {

struct Case {
  std::vector<int> node_sizes;
  std::vector<int64_t> tokens;  // of each rank; empty: 13 each
  int local_experts = 2;
  int top_k = 4;
  int hidden = 12;
  int64_t capacity = 0;  // 0: nothing is dropped
  int channels = 2;
  int across_slots = 4;
  int across_batch = 2;
  int node_slots = 2;
  bool one_hot_expert = false;
  int rounds = 2;
};

/// A barrier of a node's ranks, as the kernels' Begin and Finish are.
class NodeBarrier {
 public:
  void Wait(int num_ranks) {
    std::unique_lock<std::mutex> lock(mutex_);
    const int generation = generation_;
    if (++arrived_ == num_ranks) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  int generation_ = 0;
};

/// Counts over World, for CountsExchange.
struct CountsEnv {
  World& world;
  int rank;
  uint64_t epoch;

  bool Came(int src) { return world.Load(rank, world.layout.CountsArrived(epoch, src)) == epoch; }
  void Send(int src, int peer) {
    World& w = world;
    const int from = rank;
    const uint64_t e = epoch;
    w.Send(from, peer, [&w, from, src, peer, e] {
      const int64_t counts = w.layout.Counts(e, src);
      std::memcpy(w.At(peer, counts), w.At(from, counts), w.layout.config().num_experts * 4);
      w.Store(peer, w.layout.CountsArrived(e, src), e);
    });
  }
};

class Exchange {
 public:
  Exchange(const Case& c, uint32_t seed) : c_(c), seed_(seed), random_(seed) {
    CHECK(MakeNodes(c.node_sizes, nodes_).ok());
    Config config;
    config.nodes = nodes_;
    config.num_experts = nodes_.num_ranks * c.local_experts;
    config.num_channels = c.channels;
    config.across_slots = c.across_slots;
    config.across_batch = c.across_batch;
    config.node_slots = c.node_slots;
    config.slot_bytes = SlotHeaderBytes(c.top_k) + c.hidden * 4;
    CHECK_EQ(CheckConfig(config).message(), "");
    world_ = std::make_unique<World>(config, /*delays=*/true, seed);
    barriers_.resize(nodes_.num_nodes);
    for (auto& barrier : barriers_) barrier = std::make_unique<NodeBarrier>();
    ranks_.resize(nodes_.num_ranks);
    epochs_.assign(nodes_.num_ranks, 0);
  }

  void Run() {
    for (int round = 0; round < c_.rounds; ++round) {
      const check::Context context("round " + std::to_string(round));
      Draw();
      std::vector<std::thread> threads;
      std::atomic<int> stuck{0};
      for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
        threads.emplace_back([&, rank] { stuck += !RunRank(rank); });
      }
      for (std::thread& thread : threads) thread.join();
      CHECK_EQ(stuck.load(), 0);
      if (stuck != 0) return;
      CheckPlan();
      CheckRows();
      CheckSums();
      CheckBytes();
    }
  }

 private:
  int num_experts() const { return nodes_.num_ranks * c_.local_experts; }

  void Draw() {
    int64_t all_rows = 0;
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      all_rows += (c_.tokens.empty() ? 13 : c_.tokens[rank]) * c_.top_k;
    }
    topk_idx_.assign(nodes_.num_ranks, {});
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      RankData& data = ranks_[rank];
      data = RankData();
      const int64_t num_tokens = c_.tokens.empty() ? 13 : c_.tokens[rank];
      for (int64_t token = 0; token < num_tokens; ++token) {
        std::set<int32_t> chosen;
        for (int k = 0; k < c_.top_k; ++k) {
          int32_t expert = static_cast<int32_t>(random_() % (num_experts() + 1)) - 1;
          if (c_.one_hot_expert && k == 0) expert = num_experts() - 1;
          if (!chosen.insert(expert).second) expert = -1;
          topk_idx_[rank].push_back(expert);
        }
      }
      data.input.topk_idx = topk_idx_[rank].data();
      data.input.num_tokens = num_tokens;
      data.input.top_k = c_.top_k;
      data.input.num_experts = num_experts();
      data.input.capacity = c_.capacity > 0 ? c_.capacity : all_rows;
      data.hidden = c_.hidden;
      for (int64_t i = 0; i < num_tokens * c_.hidden; ++i) data.x.push_back(RandomFloat());
      for (int64_t i = 0; i < num_tokens * c_.top_k; ++i) data.weights.push_back(RandomFloat());
      const int64_t capacity = data.input.capacity;
      data.rows.assign(capacity * c_.hidden, 0);
      data.row_weights.assign(capacity, 0);
      data.row_source.assign(capacity, -1);
      data.arrival_rows.assign(capacity, -1);
      data.times_written.assign(capacity, 0);
      data.y.assign(capacity * c_.hidden, 0);
      data.out.assign(num_tokens * c_.hidden, -1);
    }
    world_->hosts_seen.assign(nodes_.num_ranks,
                              std::vector<std::vector<uint32_t>>(
                                  nodes_.num_inputs(), std::vector<uint32_t>(kTokensInSource, 0)));
    for (int d = 0; d < 2; ++d) world_->rows_crossed[d] = 0;
  }
  float RandomFloat() { return static_cast<float>(random_() % 2001) / 700.0f - 1.4f; }

  /// Everything that one rank does; on its own thread.
  bool RunRank(int rank) {
    RankData& data = ranks_[rank];
    std::vector<int32_t> counts;
    if (!ExchangeCounts(rank, CountSelections(data.input, nullptr), counts)) return false;
    const Capacity capacity = FillRanks(nodes_, data.input, rank, counts.data());
    if (capacity.is_short &&
        !ExchangeCounts(rank, CountSelections(data.input, &capacity), counts)) {
      return false;
    }
    data.plan = PlaceRows(nodes_, data.input, rank, counts.data(), capacity);
    data.first_arrival = capacity.first_arrival;

    const int node = nodes_.NodeOf(rank);
    const uint32_t seed = seed_ + rank;
    Meet(node);
    auto stages = DispatchStages(*world_, ranks_, rank);
    if (!RunStages(*world_, stages, 2, seed)) return false;
    Meet(node);
    // The experts' work: something that tells rows apart.
    for (size_t i = 0; i < data.y.size(); ++i) data.y[i] = 1.25f * data.rows[i] + (rank + 1);
    Meet(node);
    stages = CombineStages(*world_, ranks_, rank);
    const bool ok = RunStages(*world_, stages, 2, seed + 1000);
    Meet(node);
    return ok;
  }
  /// Where ranks use each other's buffers they meet before and after.
  void Meet(int node) {
    if (c_.node_slots == 0) barriers_[node]->Wait(nodes_.SizeOf(node));
  }

  bool ExchangeCounts(int rank, const std::vector<int32_t>& own, std::vector<int32_t>& all) {
    const uint64_t epoch = ++epochs_[rank];
    CountsEnv env{*world_, rank, epoch};
    const Layout& layout = world_->layout;
    std::memcpy(world_->At(rank, layout.Counts(epoch, rank)), own.data(), own.size() * 4);
    CountsExchange exchange;
    const auto begin = std::chrono::steady_clock::now();
    for (Progress p = Progress::kMoved; p != Progress::kDone;) {
      p = exchange.Step(nodes_, rank, env);
      if (p == Progress::kWaits) std::this_thread::yield();
      if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(60)) return false;
    }
    all.clear();
    for (int src = 0; src < nodes_.num_ranks; ++src) {
      const auto* block =
          reinterpret_cast<const int32_t*>(world_->At(rank, layout.Counts(epoch, src)));
      all.insert(all.end(), block, block + num_experts());
    }
    return true;
  }

  /// Places and sizes are those of the one-process plan, where all ranks have as many tokens.
  void CheckPlan() {
    if (!c_.tokens.empty()) return;
    const PlanShape shape{nodes_.num_ranks,           13, c_.top_k, num_experts(),
                          ranks_[0].input.capacity,
                          /*overflow_is_error=*/false};
    struct Out {
      std::vector<int32_t> group_sizes, tokens_per_expert, dest_rank, dest_row, row_source,
          arrival_rows, rows_per_source;
      int32_t num_rows, overflow;
    };
    std::vector<Out> outs(nodes_.num_ranks);
    std::vector<PlanBuffers> buffers;
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      Out& o = outs[rank];
      o.group_sizes.resize(c_.local_experts);
      o.tokens_per_expert.resize(num_experts());
      o.dest_rank.resize(13 * c_.top_k);
      o.dest_row.resize(13 * c_.top_k);
      o.row_source.resize(shape.capacity);
      o.arrival_rows.resize(shape.capacity);
      o.rows_per_source.resize(nodes_.num_ranks);
      buffers.push_back({topk_idx_[rank].data(), o.group_sizes.data(), &o.num_rows, &o.overflow,
                         o.tokens_per_expert.data(), o.dest_rank.data(), o.dest_row.data(),
                         o.row_source.data(), o.arrival_rows.data(), o.rows_per_source.data()});
    }
    CHECK(MakePlan(shape, buffers).ok());
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      CHECK(ranks_[rank].plan.dest_rank == outs[rank].dest_rank);
      CHECK(ranks_[rank].plan.dest_row == outs[rank].dest_row);
      CHECK(ranks_[rank].plan.group_sizes == outs[rank].group_sizes);
      CHECK(ranks_[rank].arrival_rows == outs[rank].arrival_rows);
    }
  }

  /// Selections of every rank that are kept, by sorting: [rank] -> (expert, source, token, k).
  std::vector<std::vector<std::array<int64_t, 4>>> KeptRows() const {
    std::vector<std::vector<std::array<int64_t, 4>>> kept(nodes_.num_ranks);
    for (int src = 0; src < nodes_.num_ranks; ++src) {
      for (size_t s = 0; s < topk_idx_[src].size(); ++s) {
        const int32_t expert = topk_idx_[src][s];
        if (expert < 0) continue;
        auto& rows = kept[expert / c_.local_experts];
        if (static_cast<int64_t>(rows.size()) < ranks_[0].input.capacity) {
          rows.push_back({expert, src, static_cast<int64_t>(s) / c_.top_k,
                          static_cast<int64_t>(s) % c_.top_k});
        }
      }
    }
    for (auto& rows : kept) std::sort(rows.begin(), rows.end());
    return kept;
  }

  /// Every kept selection has its row once, in expert order, with its weight; nothing else is
  /// there.
  void CheckRows() {
    const auto kept = KeptRows();
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      const RankData& data = ranks_[rank];
      for (int64_t row = 0; row < data.input.capacity; ++row) {
        const bool is_row = row < static_cast<int64_t>(kept[rank].size());
        CHECK_EQ(data.times_written[row], is_row ? 1 : 0);
        if (!is_row) continue;
        const auto [expert, src, token, k] = kept[rank][row];
        const RankData& source = ranks_[src];
        CHECK_EQ(data.row_source[row],
                 SourceNumber(static_cast<int>(src), token, static_cast<int>(k), c_.top_k));
        CHECK_EQ(data.row_weights[row], source.weights[token * c_.top_k + k]);
        for (int i = 0; i < c_.hidden; ++i) {
          CHECK_EQ(data.rows[row * c_.hidden + i], source.x[token * c_.hidden + i]);
        }
      }
    }
  }

  /// Sums by (node, host, k), from the rows' own formula; the same bits.
  void CheckSums() {
    const auto kept = KeptRows();
    std::vector<std::map<int64_t, std::map<std::pair<int, int>, std::vector<int64_t>>>> terms(
        nodes_.num_ranks);  // [home][token][(node, host)] -> k in order
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      for (const auto& [expert, src, token, k] : kept[rank]) {
        terms[src][token][{nodes_.NodeOf(rank), rank}].push_back(k);
      }
    }
    for (int home = 0; home < nodes_.num_ranks; ++home) {
      const RankData& data = ranks_[home];
      for (int64_t token = 0; token < data.input.num_tokens; ++token) {
        for (int i = 0; i < c_.hidden; ++i) {
          std::map<int, float> node_sums;
          for (auto& [place, ks] : terms[home][token]) {
            std::sort(ks.begin(), ks.end());
            float host_sum = 0.0f;
            for (const int64_t k : ks) {
              const float y = 1.25f * data.x[token * c_.hidden + i] + (place.second + 1);
              const float product = data.weights[token * c_.top_k + k] * y;
              host_sum = host_sum + product;
            }
            node_sums[place.first] = node_sums[place.first] + host_sum;
          }
          float sum = 0.0f;
          for (const auto& [node, node_sum] : node_sums) sum = sum + node_sum;
          CHECK_EQ(data.out[token * c_.hidden + i], sum);
        }
      }
    }
  }

  /// Each (token, other node) crossed once each way, as the plans say.
  void CheckBytes() {
    const auto kept = KeptRows();
    std::set<std::array<int64_t, 3>> pairs;
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      for (const auto& [expert, src, token, k] : kept[rank]) {
        const int node = nodes_.NodeOf(rank);
        if (node != nodes_.NodeOf(static_cast<int>(src))) pairs.insert({src, token, node});
      }
    }
    int64_t planned = 0;
    for (int rank = 0; rank < nodes_.num_ranks; ++rank) {
      for (int node = 0; node < nodes_.num_nodes; ++node) {
        if (node != nodes_.NodeOf(rank)) planned += ranks_[rank].plan.tokens_to_node[node];
      }
    }
    const auto expected = static_cast<int64_t>(pairs.size());
    CHECK_EQ(planned, expected);
    CHECK_EQ(world_->rows_crossed[0].load(), expected);
    CHECK_EQ(world_->rows_crossed[1].load(), expected);
  }

  const Case c_;
  const uint32_t seed_;
  std::mt19937 random_;
  Nodes nodes_;
  std::vector<std::unique_ptr<NodeBarrier>> barriers_;
  std::vector<uint64_t> epochs_;
  std::vector<std::vector<int32_t>> topk_idx_;
  Ranks ranks_;
  std::unique_ptr<World> world_;
};

void Run(const Case& c) {
  for (uint32_t seed = 1; seed <= 5; ++seed) {
    const check::Context context("seed " + std::to_string(seed));
    Exchange(c, seed).Run();
  }
}

TEST(TwoNodesOfTwo) {
  Case c;
  c.node_sizes = {2, 2};
  Run(c);
}

TEST(TwoNodesOfTwoMapped) {
  Case c;
  c.node_sizes = {2, 2};
  c.node_slots = 0;
  Run(c);
}

TEST(NodesOfThree) {
  Case c;
  c.node_sizes = {3, 3};
  Run(c);
  c.node_slots = 0;
  Run(c);
}

TEST(UnevenNodes) {
  for (const int node_slots : {0, 2}) {
    Case c;
    c.node_sizes = {1, 3, 2};
    c.node_slots = node_slots;
    Run(c);
    c.node_sizes = {2, 1};
    Run(c);
  }
}

TEST(OneRankANode) {
  Case c;
  c.node_sizes = {1, 1, 1};
  Run(c);
}

TEST(OneNode) {
  Case c;
  c.node_sizes = {3};
  Run(c);
}

TEST(UnevenTokens) {
  Case c;
  c.node_sizes = {2, 2};
  c.tokens = {0, 31, 1, 8};
  Run(c);
  c.tokens = {0, 0, 0, 0};
  Run(c);
}

TEST(SmallestRings) {
  Case c;
  c.node_sizes = {2, 1};
  c.across_slots = c.across_batch = c.node_slots = 1;
  Run(c);
  c.across_slots = c.across_batch = 3;  // batches that end with the ring
  c.channels = 3;
  Run(c);
}

TEST(OneHotExpert) {
  Case c;
  c.node_sizes = {2, 2};
  c.one_hot_expert = true;
  Run(c);
}

TEST(RowsAboveTheCapacity) {
  for (const int node_slots : {0, 2}) {
    Case c;
    c.node_sizes = {2, 2};
    c.node_slots = node_slots;
    c.one_hot_expert = true;
    c.capacity = 25;
    Run(c);
    c.capacity = 1;
    Run(c);
  }
}

TEST(ForwardersAndInputsAgree) {
  for (const std::vector<int>& sizes :
       std::vector<std::vector<int>>{{2, 2}, {3, 1, 2}, {1, 4}, {5, 2, 2}, {8, 8, 8, 8}}) {
    Nodes nodes;
    CHECK(MakeNodes(sizes, nodes).ok());
    for (int node = 0; node < nodes.num_nodes; ++node) {
      std::set<std::pair<int, int>> inputs;
      for (int rank = 0; rank < nodes.num_ranks; ++rank) {
        const int forwarder = nodes.Forwarder(rank, node);
        CHECK_EQ(nodes.NodeOf(forwarder), node);
        if (nodes.NodeOf(rank) == node) CHECK_EQ(forwarder, rank);
        const int input = nodes.Input(rank, node);
        CHECK(input >= 0 && input < nodes.num_inputs());
        CHECK(inputs.insert({forwarder, input}).second);
        CHECK_EQ(nodes.SourceOf(forwarder, input), rank);
      }
      // Shares differ by at most one.
      for (int i = 0; i < nodes.SizeOf(node); ++i) {
        int64_t served = 0;
        for (int input = 0; input < nodes.num_inputs(); ++input) {
          const int src = nodes.SourceOf(nodes.first_rank[node] + i, input);
          served += src >= 0 && nodes.NodeOf(src) != node;
        }
        int64_t fewest = 0;
        int64_t most = 0;
        for (int other = 0; other < nodes.num_nodes; ++other) {
          if (other == node) continue;
          fewest += nodes.SizeOf(other) / nodes.SizeOf(node);
          most += (nodes.SizeOf(other) + nodes.SizeOf(node) - 1) / nodes.SizeOf(node);
        }
        CHECK(served >= fewest && served <= most);
      }
    }
  }
}

/// No byte of an arena belongs to two rings, or to a ring and to counts.
TEST(RegionsAreDisjoint) {
  for (const int node_slots : {0, 3}) {
    Config config;
    CHECK(MakeNodes({2, 3, 1}, config.nodes).ok());
    config.num_experts = 18;
    config.num_channels = 2;
    config.across_slots = 5;
    config.across_batch = 2;
    config.node_slots = node_slots;
    config.slot_bytes = 208;
    const Layout layout(config);
    const Nodes& nodes = config.nodes;
    std::vector<std::map<int64_t, int64_t>> regions(nodes.num_ranks);  // begin -> end
    const auto add = [&](int rank, int64_t begin, int64_t num_bytes) {
      CHECK(begin >= 0 && begin + num_bytes <= layout.num_bytes());
      CHECK_EQ(begin % 8, 0);
      CHECK(regions[rank].emplace(begin, begin + num_bytes).second);
    };
    const auto add_ring = [&](const RingPlace& ring) {
      add(ring.receiver, ring.slots, ring.num_slots * config.slot_bytes);
      add(ring.receiver, ring.arrived, ring.num_slots * 8);
      add(ring.receiver, ring.taken, 8);
      if (ring.staging >= 0) add(ring.sender, ring.staging, ring.num_slots * config.slot_bytes);
      add(ring.sender, ring.credits, 8);
      add(ring.sender, ring.sent, 8);
    };
    for (const Direction direction : {Direction::kOut, Direction::kBack}) {
      for (int rank = 0; rank < nodes.num_ranks; ++rank) {
        for (int channel = 0; channel < config.num_channels; ++channel) {
          for (int node = 0; node < nodes.num_nodes; ++node) {
            if (node != nodes.NodeOf(rank)) add_ring(layout.Across(direction, rank, node, channel));
          }
          for (int host = 0; host < nodes.num_ranks && node_slots > 0; ++host) {
            add_ring(layout.InNode(direction, rank, host, channel));
          }
        }
      }
    }
    for (int rank = 0; rank < nodes.num_ranks; ++rank) {
      for (int src = 0; src < nodes.num_ranks; ++src) {
        for (const uint64_t epoch : {1u, 2u}) {
          add(rank, layout.Counts(epoch, src), layout.counts_bytes());
          CHECK_EQ(layout.Counts(epoch, src) % 16, 0);
          add(rank, layout.CountsArrived(epoch, src), 8);
        }
      }
      int64_t end = 0;
      for (const auto& [begin, region_end] : regions[rank]) {
        CHECK(begin >= end);
        end = region_end;
      }
    }
  }
}

/// The same number stands in tests/test_scaling.py, for the model's arithmetic.
TEST(BytesOfAnArena) {
  Config config;
  CHECK(MakeNodes({3, 3}, config.nodes).ok());
  config.num_experts = 12;
  config.num_channels = 2;
  config.across_slots = 5;
  config.across_batch = 2;
  config.node_slots = 3;
  config.slot_bytes = SlotHeaderBytes(4) + 128;
  CHECK_EQ(Layout(config).num_bytes(), 42496);
}

TEST(WhatIsRefused) {
  Nodes nodes;
  CHECK_CONTAINS(MakeNodes({}, nodes).message(), "expected 1 to 128 of them, got 0");
  CHECK_CONTAINS(MakeNodes(std::vector<int>(129, 1), nodes).message(), "got 129");
  CHECK_CONTAINS(MakeNodes({4, 0}, nodes).message(), "got 0 in node 1");
  CHECK_CONTAINS(MakeNodes({17}, nodes).message(), "expected 1 to 16 ranks in each node, got 17");
  CHECK_CONTAINS(SplitIntoNodes(8, 0, nodes).message(), "got 0 for 8 ranks");
  CHECK(SplitIntoNodes(7, 3, nodes).ok());
  CHECK_EQ(nodes.num_nodes, 3);
  CHECK_EQ(nodes.SizeOf(2), 1);
  CHECK_EQ(nodes.fan, 3);

  Config config;
  CHECK_CONTAINS(CheckConfig(config).message(), "at least one rank");
  config.nodes = nodes;
  config.num_experts = 8;
  CHECK_CONTAINS(CheckConfig(config).message(), "num_experts: expected a multiple of the 7 ranks");
  config.num_experts = 14;
  config.slot_bytes = 100;
  CHECK_CONTAINS(CheckConfig(config).message(), "slot_bytes: expected a multiple of 16, got 100");
  config.slot_bytes = 112;
  CHECK(CheckConfig(config).ok());
  config.across_batch = 9;
  CHECK_CONTAINS(CheckConfig(config).message(), "across_batch: expected 1 to the 8 slots");
  config.across_batch = config.across_slots = 0;
  CHECK_CONTAINS(CheckConfig(config).message(), "across_slots: expected at least 1, got 0");
  config.across_slots = 1;
  CHECK_CONTAINS(CheckConfig(config).message(), "across_batch: expected 1 to the 1 slots");
  config.across_batch = 1;
  config.num_channels = 0;
  CHECK_CONTAINS(CheckConfig(config).message(), "num_channels: expected at least 1, got 0");
  config.num_channels = 1;
  config.node_slots = -1;
  CHECK_CONTAINS(CheckConfig(config).message(), "node_slots: expected 0 or more, got -1");
}

}  // namespace
}  // namespace wideep::two_hop
