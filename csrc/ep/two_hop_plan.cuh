// TwoHopPlanKernel: the plan of a group over nodes, by PlanKernel's steps (plan.cuh).
//
//   1. Blocks count as there. Block 0 puts the counts into registered memory, and its warps run
//      CountsExchange, each for some of the peers: own counts go to this rank's forwarder on every
//      other node and to the ranks of the node, and what comes from other nodes to the latter.
//   2. Every block waits for the counts of all ranks and goes on as there. Accepted counts, if some
//      rank is short, are an exchange of the next epoch.
//   3. Begin, with the ranks of the node. Places are written here, and at destinations in the node.
//   4. After a barrier of the blocks, places on other nodes travel as a token's row does in
//      dispatch, but packed: a slot has as many entries as fit, of any tokens. A forwarder writes
//      them at their hosts.
//
// A rank that has given up sends no places, for which some rank of every other node waits, and for
// that one its node: nobody ends a plan without having heard of it.
#pragma once

#include "csrc/ep/plan_block.cuh"
#include "csrc/ep/two_hop_rank.cuh"

namespace wideep {
namespace two_hop {

/// All ranks' counts in each rank's registered memory.
template <typename Net>
class NodeCounts {
 public:
  __device__ NodeCounts(const Rank<Net>& rank, int num_experts)
      : rank_(rank),
        num_experts_(num_experts),
        begun_(rank.state()->counts_epoch),
        lane_(threadIdx.x % 32) {}

  __device__ void Send(bool accepted, const int32_t* totals) {
    const uint64_t epoch = Epoch(accepted);
    auto* own = reinterpret_cast<int32_t*>(rank_.At(rank_.layout().Counts(epoch, rank_.number())));
    for (int expert = threadIdx.x; expert < num_experts_; expert += blockDim.x) {
      own[expert] = totals[expert];
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp >= rank_.nodes().num_ranks) return;
    Passing passing{*this, accepted, warp};
    CountsExchange exchange;
    while (exchange.Step(rank_.nodes(), rank_.number(), passing) == Progress::kMoved) {
    }
  }

  __device__ bool Await(bool accepted, uint32_t* flags) const {
    if (threadIdx.x < 32) {
      bool all = true;
      const bool has_rank = lane_ < rank_.nodes().num_ranks && lane_ != rank_.number();
      const uint64_t epoch = Epoch(accepted);
      const auto* word = reinterpret_cast<const uint64_t*>(
          rank_.At(rank_.layout().CountsArrived(epoch, has_rank ? lane_ : 0)));
      // A lane looks for each rank; the first that is missing is waited for, as forwarders do.
      const auto missing = [&] {
        return __ballot_sync(~0u, has_rank && ptx::ld_acquire_sys_u64(word) != epoch);
      };
      for (uint32_t ranks = missing(); ranks != 0 && all; ranks = missing()) {
        all = WaitFor(accepted, __ffs(static_cast<int>(ranks)) - 1);
      }
      if (lane_ == 0) flags[1] = all;
    }
    __syncthreads();
    return flags[1] != 0;
  }
  __device__ uint64_t Look(bool accepted, int src, int expert) const {
    const int number = rank_.NumberOf(src);
    // Own ones are not awaited, nor used.
    if (number < 0 || number == rank_.number()) return 0;
    const auto* counts =
        reinterpret_cast<const int32_t*>(rank_.At(rank_.layout().Counts(Epoch(accepted), number)));
    return static_cast<uint32_t>(counts[expert]);
  }
  __device__ bool Wait(bool, int, int, uint64_t&) const { return true; }

  /// The plan has ended; one thread, when no thread will look any more.
  __device__ void End(bool accepted) { rank_.state()->counts_epoch = Epoch(accepted); }

 private:
  /// A warp's part of CountsExchange: what goes to its peers.
  struct Passing {
    NodeCounts& counts;
    bool accepted;
    int warp;

    __device__ bool Came(int src) { return counts.WaitFor(accepted, src); }
    __device__ void Send(int src, int peer) {
      if (peer % kWarpsPerBlock == warp) counts.Put(accepted, src, peer);
    }
  };

  __device__ uint64_t Epoch(bool accepted) const { return begun_ + 1 + accepted; }

  __device__ void Put(bool accepted, int src, int peer) const {
    const uint64_t epoch = Epoch(accepted);
    const int64_t counts = rank_.layout().Counts(epoch, src);
    rank_.Put(peer, counts, counts, rank_.layout().counts_bytes(),
              rank_.layout().CountsArrived(epoch, src), epoch);
  }

  /// For the counts of a rank; first for those of the rank that passes them on, so that the one
  /// that is missing is named. All lanes; false if a rank gave up.
  __device__ bool WaitFor(bool accepted, int src) const {
    const Nodes& nodes = rank_.nodes();
    const int via = nodes.NodeOf(src) == rank_.node() ? src : nodes.Forwarder(src, rank_.node());
    if (via != src && via != rank_.number() && !WaitForWord(accepted, via)) return false;
    return WaitForWord(accepted, src);
  }
  __device__ bool WaitForWord(bool accepted, int src) const {
    const uint64_t epoch = Epoch(accepted);
    return rank_.WaitFor(rank_.layout().CountsArrived(epoch, src), epoch,
                         accepted ? Phase::kAccepted : Phase::kCounts, src);
  }

  const Rank<Net>& rank_;
  const int num_experts_;
  const uint64_t begun_;  // counts_epoch before this plan
  const int lane_;
};

WIDEEP_HOST_DEVICE constexpr int64_t EntryBytes(int64_t num_entries) {
  return static_cast<int64_t>(sizeof(SlotHeader)) +
         num_entries * static_cast<int64_t>(sizeof(SlotHeader::Entry));
}

/// Places of this rank's selections on another node, in order: those of a channel's blocks.
template <typename Net>
class PlaceSender : public WarpStage<PlaceSender<Net>, Net, 0, 1> {
 public:
  /// `running` [num_ranks] in shared memory, of this warp.
  __device__ PlaceSender(Rank<Net>& rank, const PlanParams& p,
                         const PlanBlock<NodeCounts<Net>>& block, const int32_t* first_arrival,
                         int32_t* running, int node, int channel, int num_channels)
      : WarpStage<PlaceSender, Net, 0, 1>(rank, Direction::kOut),
        p_(p),
        ring_(rank.layout().Across(Direction::kOut, rank.number(), node, channel)),
        first_rank_(rank.nodes().first_rank[node]),
        num_hosts_(rank.nodes().SizeOf(node)),
        most_entries_(static_cast<int32_t>((rank.config().slot_bytes - EntryBytes(0)) /
                                           static_cast<int64_t>(sizeof(SlotHeader::Entry)))),
        arrivals_(running) {
    const auto blocks = static_cast<int>(gridDim.x);
    const int first_block = blocks * channel / num_channels;
    next_ = block.FirstSelection(first_block);
    end_ = block.FirstSelection(blocks * (channel + 1) / num_channels);
    // Of selections that are kept, so that none was dropped before.
    if (this->lane_ < num_hosts_) {
      const int host = rank.RankOf(first_rank_ + this->lane_);
      arrivals_[this->lane_] = first_arrival[host] + block.CountBefore(first_block, host);
    }
    __syncwarp();
  }

  __device__ const RingPlace& Output(int) const { return ring_; }
  __device__ bool Next(Bits<0>&) const { return !ended_; }
  __device__ void Work() {
    auto* header = reinterpret_cast<SlotHeader*>(this->OutputSlot());
    // A lane's selection each, as long as all may be entries.
    const int32_t width = min(32, most_entries_);
    const int64_t first_source = int64_t{p_.peers.rank} * p_.num_tokens * p_.top_k;
    int32_t num_entries = 0;
    for (; next_ < end_ && num_entries + width <= most_entries_; next_ += width) {
      const int64_t s = next_ + this->lane_;
      const bool has = this->lane_ < width && s < end_;
      const int number = has ? this->rank_.NumberOf(p_.dest_rank[s]) : -1;
      const int host =
          number >= first_rank_ && number < first_rank_ + num_hosts_ ? number - first_rank_ : -1;
      const uint32_t same = __match_any_sync(~0u, host);
      const uint32_t wanted = __ballot_sync(~0u, host >= 0);
      const uint32_t below = (1u << this->lane_) - 1;
      if (host >= 0) {
        SlotHeader::Entry& entry = header->entries()[num_entries + __popc(wanted & below)];
        entry.host = static_cast<int16_t>(host);
        entry.k = 0;
        entry.row = p_.dest_row[s];
        entry.arrival = arrivals_[host] + __popc(same & below);
        entry.word = static_cast<int32_t>(first_source + s);
      }
      __syncwarp();
      if (host >= 0 && (same & below) == 0) arrivals_[host] += __popc(same);
      __syncwarp();
      num_entries += __popc(wanted);
    }
    ended_ = next_ >= end_;
    if (this->lane_ == 0) {
      header->token = 0;
      header->num_entries = num_entries;
      header->last = ended_;
    }
    this->Wrote(EntryBytes(num_entries), /*has_row=*/false);
  }

 private:
  const PlanParams& p_;
  const RingPlace ring_;
  const int first_rank_;  // of the node
  const int num_hosts_;
  const int32_t most_entries_;
  int32_t* const arrivals_;  // [num_hosts] of the next selection there
  int64_t next_ = 0;
  int64_t end_ = 0;
  bool ended_ = false;
};

/// Places that a rank of another node sends to hosts of this one.
template <typename Net>
class PlaceForwarder : public WarpStage<PlaceForwarder<Net>, Net, 1, 0> {
 public:
  __device__ PlaceForwarder(Rank<Net>& rank, char* const* here, int source, int channel)
      : WarpStage<PlaceForwarder, Net, 1, 0>(rank, Direction::kOut),
        here_(here),
        ring_(rank.layout().Across(Direction::kOut, source, rank.node(), channel)) {}

  __device__ const RingPlace& Input(int) const { return ring_; }
  __device__ bool Next(Bits<1>& inputs) const {
    if (!ended_) inputs.Set(0);
    return !ended_;
  }
  __device__ void Work() {
    const auto* header = reinterpret_cast<const SlotHeader*>(this->InputSlot(0));
    for (int i = this->lane_; i < header->num_entries; i += 32) {
      const SlotHeader::Entry entry = header->entries()[i];
      const int host = this->rank_.HostRank(entry.host);
      reinterpret_cast<int32_t*>(here_[host])[entry.row] = entry.word;
      reinterpret_cast<int32_t*>(here_[kMaxRanks + host])[entry.arrival] = entry.row;
    }
    ended_ = header->last != 0;
  }

 private:
  char* const* const here_;  // row_source, then arrival_rows of the node's ranks
  const RingPlace ring_;
  bool ended_ = false;
};

/// This warp's stage. False if a rank gave up.
template <typename Net>
__device__ bool SendPlaces(Rank<Net>& rank, const PlanParams& p,
                           const PlanBlock<NodeCounts<Net>>& block, PlanShared& shared) {
  // Launches are smaller than those of rows: channels as their warps allow, and a block for each.
  const auto blocks = static_cast<int>(gridDim.x);
  const int num_channels =
      max(1, min(blocks, rank.config().num_channels * blocks / p.peers.num_sms));
  const int warp = static_cast<int>(threadIdx.x / 32) * blocks + static_cast<int>(blockIdx.x);
  const int channel = warp % num_channels;
  const int stage = warp / num_channels;
  const int num_senders = rank.nodes().num_nodes - 1;
  if (stage < num_senders) {
    PlaceSender<Net> sender(rank, p, block, shared.first_arrival,
                            shared.dst_running[threadIdx.x / 32], rank.OtherNode(stage), channel,
                            num_channels);
    return sender.Run();
  }
  const int source = rank.SourceOf(stage - num_senders);
  if (source < 0) return true;
  PlaceForwarder<Net> forwarder(rank, shared.here, source, channel);
  return forwarder.Run();
}

/// All threads of a rank that takes part.
template <typename Net>
__device__ void PlanOverNodes(const PlanParams& p, Rank<Net>& rank, PlanShared& shared) {
  Exchange& exchange = rank.exchange();
  NodeCounts<Net> counts(rank, p.num_experts);
  PlanBlock block(p, exchange, counts, shared);
  if (!block.PlaceBlocks()) return;
  const void* mine[2] = {p.row_source, p.arrival_rows};
  if (!rank.Begin(mine, shared.here, shared.flags)) return;
  block.PlaceSelections(p.peers.node_ranks);
  block.WriteSummary();
  // The selections of a channel were placed by any of this rank's warps.
  if (!exchange.BlockBarrier(shared.flags)) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) counts.End(shared.capacity_is_short != 0);
  if (!SendPlaces(rank, p, block, shared)) return;
  rank.Finish(shared.flags);
}

}  // namespace two_hop

template <typename Net>
__global__ void __launch_bounds__(kPlanThreads, 1)
    TwoHopPlanKernel(const __grid_constant__ two_hop::Params<PlanParams, Net> p) {
  auto& shared = *reinterpret_cast<two_hop::Shared<PlanShared>*>(DynamicShared());
  Exchange exchange(p.op.peers, ExchangeOp::kPlan);
  if (!exchange.takes_part()) return WriteEmptyPlan(p.op, exchange.num_ranks());
  shared.Load(p.context);
  two_hop::Rank<Net> rank(shared.context, p.net, exchange);
  two_hop::PlanOverNodes(p.op, rank, shared.op);
  if (threadIdx.x == 0) rank.PassOnAbort();
}

template <typename Net>
Status LaunchTwoHopPlan(const two_hop::Params<PlanParams, Net>& p, cudaStream_t stream) {
  return LaunchPlanKernel(TwoHopPlanKernel<Net>, p, p.op,
                          two_hop::Shared<PlanShared>::NumBytes(PlanBytes(p.op)), stream);
}

template <typename Net>
Status LoadTwoHopPlan() {
  return LoadKernels<two_hop::Params<PlanParams, Net>>({TwoHopPlanKernel<Net>}, "make_plan");
}

}  // namespace wideep
