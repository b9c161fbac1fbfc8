// The stages of a two-hop dispatch and combine over rows of float32, for two_hop_test.cc.
#pragma once

#include <algorithm>
#include <optional>

#include "tests/cpp/two_hop_world.h"

namespace wideep::two_hop {

/// One rank's side of an exchange. In mapped form the other ranks of the node use it too.
struct RankData {
  PlanInput input;
  RankPlan plan;
  std::vector<int32_t> first_arrival;  // [num_ranks]
  int hidden = 0;

  std::vector<float> x;        // [num_tokens, hidden]
  std::vector<float> weights;  // [num_tokens, top_k]

  std::vector<float> rows;  // [capacity, hidden]
  std::vector<float> row_weights;
  std::vector<int32_t> row_source;    // (source, token, k) as one number; -1
  std::vector<int32_t> arrival_rows;  // in order of source, token, k; -1
  std::vector<int32_t> times_written;
  std::vector<float> y;    // [capacity, hidden]
  std::vector<float> out;  // [num_tokens, hidden]
};

/// What numbers a source in row_source; above any token count of the tests.
constexpr int64_t kTokensInSource = 1024;

inline int32_t SourceNumber(int rank, int64_t token, int k, int top_k) {
  return static_cast<int32_t>((rank * kTokensInSource + token) * top_k + k);
}

using Ranks = std::vector<RankData>;

inline void WriteRow(RankData& host, int src, const SlotHeader& header,
                     const SlotHeader::Entry& entry, const float* row) {
  std::copy(row, row + host.hidden, &host.rows[int64_t{entry.row} * host.hidden]);
  std::memcpy(&host.row_weights[entry.row], &entry.word, 4);
  host.row_source[entry.row] = SourceNumber(src, header.token, entry.k, host.input.top_k);
  host.arrival_rows[entry.arrival] = entry.row;
  ++host.times_written[entry.row];
}

inline const float* RowOf(const SlotHeader* header, int top_k) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(header) +
                                        SlotHeaderBytes(top_k));
}

/// A source's tokens of a channel that go to `node`, one after the other, as slots.
class TokenList {
 public:
  TokenList(const Nodes& nodes, const RankData& data, int node, int channel, int num_channels)
      : nodes_(nodes), data_(data), node_(node), arrivals_(data.first_arrival) {
    const ChannelTokens tokens = TokensOf(data.input.num_tokens, channel, num_channels);
    for (token_ = 0; token_ < tokens.begin; ++token_) CountArrivals();
    end_ = tokens.end;
    Skip();
    // The end has to be told even if nothing goes there.
    has_ = true;
  }
  bool has() const { return has_; }
  void Fill(SlotHeader* header) {
    const int top_k = data_.input.top_k;
    header->num_entries = 0;
    header->token = static_cast<int32_t>(token_);
    if (token_ < end_) {
      for (int k = 0; k < top_k; ++k) {
        const int64_t s = token_ * top_k + k;
        const int32_t dst = data_.plan.dest_rank[s];
        if (dst < 0) continue;
        const int32_t arrival = arrivals_[dst]++;
        if (nodes_.NodeOf(dst) != node_) continue;
        SlotHeader::Entry& entry = header->entries()[header->num_entries++];
        entry.host = static_cast<int16_t>(nodes_.IndexOf(dst));
        entry.k = static_cast<int16_t>(k);
        entry.row = data_.plan.dest_row[s];
        entry.arrival = arrival;
        std::memcpy(&entry.word, &data_.weights[s], 4);
      }
      std::memcpy(const_cast<float*>(RowOf(header, top_k)), &data_.x[token_ * data_.hidden],
                  data_.hidden * 4);
      ++token_;
    }
    Skip();
    has_ = token_ < end_;
    header->last = !has_;
  }

 private:
  void CountArrivals() {
    for (int k = 0; k < data_.input.top_k; ++k) {
      const int32_t dst = data_.plan.dest_rank[token_ * data_.input.top_k + k];
      if (dst >= 0) ++arrivals_[dst];
    }
  }
  void Skip() {
    const int top_k = data_.input.top_k;
    for (; token_ < end_; ++token_) {
      if (HostsOn(nodes_, node_, &data_.plan.dest_rank[token_ * top_k], top_k) != 0) return;
      CountArrivals();
    }
  }

  const Nodes& nodes_;
  const RankData& data_;
  const int node_;
  std::vector<int32_t> arrivals_;
  int64_t token_ = 0;
  int64_t end_ = 0;
  bool has_ = true;
};

/// dispatch, source: its tokens for one other node.
class Sender : public StageRunner {
 public:
  Sender(World& world, Ranks& ranks, int rank, int node, int channel)
      : StageRunner(world, rank),
        list_(world.nodes(), ranks[rank], node, channel, world.layout.config().num_channels) {
    AddOutput(world.layout.Across(Direction::kOut, rank, node, channel));
  }
  bool Next(Bits<kTestInputs>&) override { return list_.has(); }
  void Outputs(Bits<kTestOutputs>& outputs) override { outputs.Set(0); }
  void Work() override {
    auto* header = reinterpret_cast<SlotHeader*>(OutputSlot(0));
    list_.Fill(header);
    if (header->num_entries > 0) ++world_.rows_crossed[static_cast<int>(Direction::kOut)];
  }

 private:
  TokenList list_;
};

/// dispatch, forwarder: the tokens of `src` for this node, to the hosts' rings or, mapped, to their
/// rows.
class ForwarderStage : public StageRunner {
 public:
  ForwarderStage(World& world, Ranks& ranks, int rank, int src, int channel)
      : StageRunner(world, rank),
        ranks_(ranks),
        src_(src),
        node_(world.nodes().NodeOf(rank)),
        own_(src == rank),
        seen_(world.hosts_seen[rank][world.nodes().Input(src, node_)]) {
    const Layout& layout = world.layout;
    const Nodes& nodes = world.nodes();
    if (own_) {
      list_.emplace(nodes, ranks[rank], node_, channel, layout.config().num_channels);
      buffer_.resize(layout.config().slot_bytes / 8);
    } else {
      AddInput(layout.Across(Direction::kOut, src, node_, channel));
    }
    if (layout.config().node_slots > 0) {
      for (int i = 0; i < nodes.SizeOf(node_); ++i) {
        AddOutput(layout.InNode(Direction::kOut, src, nodes.first_rank[node_] + i, channel));
      }
    }
  }
  bool Next(Bits<kTestInputs>& inputs) override {
    if (own_) return list_->has();
    if (!ended_) inputs.Set(0);
    return !ended_;
  }
  void Outputs(Bits<kTestOutputs>& outputs) override {
    if (own_) {
      header_ = reinterpret_cast<SlotHeader*>(buffer_.data());
      list_->Fill(header_);
    } else {
      header_ = reinterpret_cast<SlotHeader*>(InputSlot(0));
    }
    ended_ = header_->last != 0;
    if (world_.layout.config().node_slots == 0) return;
    for (int e = 0; e < header_->num_entries; ++e) outputs.Set(header_->entries()[e].host);
    for (int i = 0; ended_ && i < world_.nodes().SizeOf(node_); ++i) outputs.Set(i);
  }
  void Work() override {
    const int top_k = ranks_[rank_].input.top_k;
    const float* row = RowOf(header_, top_k);
    uint32_t hosts = 0;
    for (int e = 0; e < header_->num_entries; ++e) hosts |= 1u << header_->entries()[e].host;
    if (hosts != 0) seen_[header_->token] = hosts;
    const int first = world_.nodes().first_rank[node_];
    if (world_.layout.config().node_slots == 0) {
      for (int e = 0; e < header_->num_entries; ++e) {
        const SlotHeader::Entry& entry = header_->entries()[e];
        WriteRow(ranks_[first + entry.host], src_, *header_, entry, row);
      }
      return;
    }
    for (int host = 0; host < world_.nodes().SizeOf(node_); ++host) {
      if ((hosts >> host & 1) == 0 && !ended_) continue;
      auto* to = reinterpret_cast<SlotHeader*>(OutputSlot(host));
      to->token = header_->token;
      to->last = header_->last;
      to->num_entries = 0;
      for (int e = 0; e < header_->num_entries; ++e) {
        const SlotHeader::Entry& entry = header_->entries()[e];
        if (entry.host == host) to->entries()[to->num_entries++] = entry;
      }
      std::memcpy(const_cast<float*>(RowOf(to, top_k)), row, ranks_[rank_].hidden * 4);
    }
  }

 private:
  Ranks& ranks_;
  const int src_;
  const int node_;
  const bool own_;
  std::optional<TokenList> list_;
  std::vector<uint32_t>& seen_;
  std::vector<uint64_t> buffer_;
  SlotHeader* header_ = nullptr;
  bool ended_ = false;
};

/// dispatch, host: what its forwarder for `src` sends.
class Receiver : public StageRunner {
 public:
  Receiver(World& world, Ranks& ranks, int rank, int src, int channel)
      : StageRunner(world, rank), data_(ranks[rank]), src_(src) {
    AddInput(world.layout.InNode(Direction::kOut, src, rank, channel));
  }
  bool Next(Bits<kTestInputs>& inputs) override {
    if (!ended_) inputs.Set(0);
    return !ended_;
  }
  void Work() override {
    const auto* header = reinterpret_cast<const SlotHeader*>(InputSlot(0));
    for (int e = 0; e < header->num_entries; ++e) {
      WriteRow(data_, src_, *header, header->entries()[e], RowOf(header, data_.input.top_k));
    }
    ended_ = header->last != 0;
  }

 private:
  RankData& data_;
  const int src_;
  bool ended_ = false;
};

/// A token's rows at one host, summed in order of k. `at`: first place in the order of arrival at
/// or after `from` whose source is not before the token; moved behind its rows.
inline std::vector<float> HostSum(const RankData& host, int home, int64_t token) {
  const int top_k = host.input.top_k;
  std::vector<float> sum(host.hidden, 0.0f);
  for (const int32_t row : host.arrival_rows) {
    if (row < 0 || host.row_source[row] / top_k != home * kTokensInSource + token) continue;
    for (int i = 0; i < host.hidden; ++i) {
      const float product = host.row_weights[row] * host.y[int64_t{row} * host.hidden + i];
      sum[i] = sum[i] + product;
    }
  }
  return sum;
}

inline void AddTo(std::vector<float>& sum, const float* term) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = sum[i] + term[i];
}

/// combine, host: sums of its rows of each token of `home`.
class HostStage : public StageRunner {
 public:
  HostStage(World& world, Ranks& ranks, int rank, int home, int channel)
      : StageRunner(world, rank), data_(ranks[rank]), home_(home) {
    const ChannelTokens tokens =
        TokensOf(ranks[home].input.num_tokens, channel, world.layout.config().num_channels);
    for (const int32_t row : data_.arrival_rows) {
      if (row < 0) continue;
      const int64_t source = data_.row_source[row] / data_.input.top_k;
      const int64_t token = source - home * kTokensInSource;
      if (token >= tokens.begin && token < tokens.end &&
          (tokens_.empty() || tokens_.back() != token)) {
        tokens_.push_back(token);
      }
    }
    AddOutput(world.layout.InNode(Direction::kBack, home, rank, channel));
  }
  bool Next(Bits<kTestInputs>&) override { return next_ < tokens_.size(); }
  void Outputs(Bits<kTestOutputs>& outputs) override { outputs.Set(0); }
  void Work() override {
    const std::vector<float> sum = HostSum(data_, home_, tokens_[next_]);
    auto* header = reinterpret_cast<SlotHeader*>(OutputSlot(0));
    header->token = static_cast<int32_t>(tokens_[next_++]);
    std::memcpy(const_cast<float*>(RowOf(header, data_.input.top_k)), sum.data(), sum.size() * 4);
  }

 private:
  const RankData& data_;
  const int home_;
  std::vector<int64_t> tokens_;
  size_t next_ = 0;
};

/// What reducer and home have in common: the tokens of a channel, and the sum of a node's hosts.
class SumStage : public StageRunner {
 public:
  SumStage(World& world, Ranks& ranks, int rank, int home, int channel)
      : StageRunner(world, rank),
        ranks_(ranks),
        home_(home),
        node_(world.nodes().NodeOf(rank)),
        seen_(world.hosts_seen[rank][world.nodes().Input(home, node_)]) {
    direction_ = Direction::kBack;
    const ChannelTokens tokens =
        TokensOf(ranks[home].input.num_tokens, channel, world.layout.config().num_channels);
    token_ = tokens.begin - 1;
    end_ = tokens.end;
    if (mapped()) return;
    for (int i = 0; i < world.nodes().SizeOf(node_); ++i) {
      AddInput(world.layout.InNode(Direction::kBack, home, world.nodes().first_rank[node_] + i,
                                   channel));
    }
  }

 protected:
  bool mapped() const { return world_.layout.config().node_slots == 0; }
  std::vector<float> NodeSum() {
    std::vector<float> sum(ranks_[rank_].hidden, 0.0f);
    const uint32_t hosts = seen_[token_];
    for (int i = 0; i < world_.nodes().SizeOf(node_); ++i) {
      if ((hosts >> i & 1) == 0) continue;
      if (mapped()) {
        AddTo(sum, HostSum(ranks_[world_.nodes().first_rank[node_] + i], home_, token_).data());
      } else {
        AddTo(sum, Row(i));
      }
    }
    return sum;
  }
  /// The row of this token in an input; one of another token spoils the sum.
  const float* Row(int input) {
    const auto* header = reinterpret_cast<const SlotHeader*>(InputSlot(input));
    static const std::vector<float> kWrong(4096, 1e30f);
    return header->token == token_ ? RowOf(header, ranks_[rank_].input.top_k) : kWrong.data();
  }

  Ranks& ranks_;
  const int home_;
  const int node_;
  std::vector<uint32_t>& seen_;
  int64_t token_ = 0;
  int64_t end_ = 0;
};

/// combine, forwarder: one sum for each token of `home`, who is on another node.
class Reducer : public SumStage {
 public:
  Reducer(World& world, Ranks& ranks, int rank, int home, int channel)
      : SumStage(world, ranks, rank, home, channel) {
    AddOutput(world.layout.Across(Direction::kBack, home, node_, channel));
  }
  bool Next(Bits<kTestInputs>& inputs) override {
    for (++token_; token_ < end_; ++token_) {
      const uint32_t hosts = seen_[token_];
      if (hosts == 0) continue;
      for (int i = 0; !mapped() && i < world_.nodes().SizeOf(node_); ++i) {
        if (hosts >> i & 1) inputs.Set(i);
      }
      return true;
    }
    return false;
  }
  void Outputs(Bits<kTestOutputs>& outputs) override { outputs.Set(0); }
  void Work() override {
    const std::vector<float> sum = NodeSum();
    auto* header = reinterpret_cast<SlotHeader*>(OutputSlot(0));
    header->token = static_cast<int32_t>(token_);
    std::memcpy(const_cast<float*>(RowOf(header, ranks_[rank_].input.top_k)), sum.data(),
                sum.size() * 4);
    ++world_.rows_crossed[static_cast<int>(Direction::kBack)];
  }
};

/// combine, home: the sum over nodes, in order.
class Home : public SumStage {
 public:
  Home(World& world, Ranks& ranks, int rank, int channel)
      : SumStage(world, ranks, rank, rank, channel), data_(ranks[rank]) {
    for (int node = 0; node < world.nodes().num_nodes; ++node) {
      across_.push_back(node == node_
                            ? -1
                            : AddInput(world.layout.Across(Direction::kBack, rank, node, channel)));
    }
  }
  bool Next(Bits<kTestInputs>& inputs) override {
    if (++token_ >= end_) return false;
    for (int node = 0; node < world_.nodes().num_nodes; ++node) {
      const uint32_t hosts = Hosts(node);
      if (hosts == 0) continue;
      if (node != node_) inputs.Set(across_[node]);
      for (int i = 0; node == node_ && !mapped() && i < world_.nodes().SizeOf(node); ++i) {
        if (hosts >> i & 1) inputs.Set(i);
      }
    }
    return true;
  }
  void Work() override {
    std::vector<float> sum(data_.hidden, 0.0f);
    for (int node = 0; node < world_.nodes().num_nodes; ++node) {
      if (Hosts(node) == 0) continue;
      AddTo(sum, node == node_ ? NodeSum().data() : Row(across_[node]));
    }
    std::copy(sum.begin(), sum.end(), &data_.out[token_ * data_.hidden]);
  }

 private:
  uint32_t Hosts(int node) const {
    const int top_k = data_.input.top_k;
    return HostsOn(world_.nodes(), node, &data_.plan.dest_rank[token_ * top_k], top_k);
  }

  RankData& data_;
  std::vector<int> across_;
};

/// All stages of `rank` in one op.
inline std::vector<std::unique_ptr<StageRunner>> DispatchStages(World& world, Ranks& ranks,
                                                                int rank) {
  std::vector<std::unique_ptr<StageRunner>> stages;
  const Nodes& nodes = world.nodes();
  const int node = nodes.NodeOf(rank);
  for (int channel = 0; channel < world.layout.config().num_channels; ++channel) {
    for (int n = 0; n < nodes.num_nodes; ++n) {
      if (n != node) stages.push_back(std::make_unique<Sender>(world, ranks, rank, n, channel));
    }
    for (int src = 0; src < nodes.num_ranks; ++src) {
      if (nodes.Forwarder(src, node) == rank) {
        stages.push_back(std::make_unique<ForwarderStage>(world, ranks, rank, src, channel));
      }
      if (world.layout.config().node_slots > 0) {
        stages.push_back(std::make_unique<Receiver>(world, ranks, rank, src, channel));
      }
    }
  }
  return stages;
}

inline std::vector<std::unique_ptr<StageRunner>> CombineStages(World& world, Ranks& ranks,
                                                               int rank) {
  std::vector<std::unique_ptr<StageRunner>> stages;
  const Nodes& nodes = world.nodes();
  const int node = nodes.NodeOf(rank);
  for (int channel = 0; channel < world.layout.config().num_channels; ++channel) {
    stages.push_back(std::make_unique<Home>(world, ranks, rank, channel));
    for (int home = 0; home < nodes.num_ranks; ++home) {
      if (home != rank && nodes.Forwarder(home, node) == rank) {
        stages.push_back(std::make_unique<Reducer>(world, ranks, rank, home, channel));
      }
      if (world.layout.config().node_slots > 0) {
        stages.push_back(std::make_unique<HostStage>(world, ranks, rank, home, channel));
      }
    }
  }
  return stages;
}

}  // namespace wideep::two_hop
