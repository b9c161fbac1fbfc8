// TwoHopDispatchKernel: tokens go to their rows over nodes. Dispatch, and, with another `Rows`,
// combine's gradient (two_hop_combine_grad.cuh).
//
//   senders     a warp for each (other node, channel): tokens with selections there, into the ring;
//               for the first of the nodes also this rank's tokens with selections in its own
//               node, to all of their rows: a token is read once for both
//   forwarders  a warp for each (rank of another node that this rank stands for, channel): what
//               comes, from its slot to all rows in this node
//
// Rows are written in place, wherever they lie in the node. `Rows` says what is published there and
// what a token makes of its rows:
//
//   kRowWork     how often a row's bytes are read or written for each of its rows
//   kNumBuffers, void Publish(const void* (&mine)[kNumBuffers])
//   Rows(p, here, pipe)
//   void Write(const char* token, bool of_ring, int32_t host, int64_t row, int32_t word, char*
//   slot)
//        all lanes: a token, which lies in a ring or not, to the rows that lanes bring, each of a
//        rank of the node (-1: none), and, by bulk copies of kSlotLane, to the row of a slot, if
//        that is not null. Compiled once (two_hop_rank.cuh: Small code)
//
// Finish orders everything in the node.
#pragma once

#include "csrc/ep/dispatch_shared.cuh"
#include "csrc/ep/two_hop_rank.cuh"
#include "csrc/ep/two_hop_roles.h"
#include "csrc/ep/zero_tail.cuh"

namespace wideep {

/// What DispatchParams and CombineGradParams have in common.
struct TwoHopTokens {
  PeerContext peers;
  PlanArrays plan;
  ExchangeOp op = ExchangeOp::kDispatch;
  int64_t num_tokens = 0;
  int32_t top_k = 0;
  int64_t row_bytes = 0;
  int64_t capacity = 0;
  bool zero_tail = true;
  const char* x = nullptr;         // in  [num_tokens, row_bytes]
  const float* weights = nullptr;  // in  [num_tokens, top_k]; null: none
  char* rows = nullptr;            // out [capacity, row_bytes]
  float* row_scalars = nullptr;    // out [capacity]
  int32_t piece_bytes = 0;
  int32_t num_stages = 0;
  // Of combine's gradient:
  const char* y = nullptr;             // in  [capacity, row_bytes]
  const float* row_weights = nullptr;  // in  [capacity]
};

namespace two_hop {

/// Tokens of [begin, end) with selections on some ranks. All lanes.
class TokensTo {
 public:
  __device__ TokensTo(const TwoHopTokens& p, uint32_t ranks, ChannelTokens tokens)
      : p_(p), ranks_(ranks), tokens_(tokens), window_(tokens.begin - 32) {}

  /// In order; -1: there are no more.
  __device__ int64_t Next() {
    while (found_ == 0) {
      window_ += 32;
      if (window_ >= tokens_.end) return -1;
      found_ = Find(window_);
    }
    const int64_t token = window_ + __ffs(static_cast<int>(found_)) - 1;
    found_ &= found_ - 1;
    return token;
  }
  /// The last of all; -1: there is none.
  __device__ int64_t Last() const {
    for (int64_t window = tokens_.end - 32; window > tokens_.begin - 32; window -= 32) {
      if (const uint32_t found = Find(window); found != 0) return window + 31 - __clz(found);
    }
    return -1;
  }
  __device__ bool Has(int32_t dst) const { return dst >= 0 && (ranks_ >> dst & 1) != 0; }

 private:
  /// Those of [window, window + 32), a bit each.
  __device__ uint32_t Find(int64_t window) const {
    const int64_t token = window + threadIdx.x % 32;
    bool goes = false;
    if (token >= tokens_.begin && token < tokens_.end) {
      for (int k = 0; k < p_.top_k; ++k) goes |= Has(p_.plan.dest_rank[token * p_.top_k + k]);
    }
    return __ballot_sync(~0u, goes);
  }

  const TwoHopTokens& p_;
  const uint32_t ranks_;
  const ChannelTokens tokens_;
  int64_t window_;
  uint32_t found_ = 0;
};

/// A row through shared memory. `store(offset, bytes)` by all lanes, for each piece. Rows of a ring
/// stay in L2, where the next ones are written; others are read once.
template <typename Store>
__device__ void CopyRow(BulkPipe& pipe, const char* row, int row_bytes, bool of_ring, Store store) {
  const int piece = pipe.piece_bytes();
  const int ahead = (pipe.num_stages() - 1) * piece;
  for (int at = -ahead; at < row_bytes; at += piece) {
    if (const int in = at + ahead; in < row_bytes) {
      const auto bytes = static_cast<uint32_t>(min(piece, row_bytes - in));
      of_ring ? pipe.Load(row + in, bytes) : pipe.LoadOnce(row + in, bytes);
    }
    if (at < 0) continue;
    pipe.Wait();
    store(at, static_cast<uint32_t>(min(piece, row_bytes - at)));
    pipe.Release();
  }
}

/// What a selection takes along.
__device__ inline int32_t WordOf(const TwoHopTokens& p, int64_t selection) {
  return p.weights == nullptr ? 0 : __float_as_int(p.weights[selection]);
}

WIDEEP_HOST_DEVICE inline int64_t SlotBytes(const TwoHopTokens& p) {
  return SlotHeaderBytes(p.top_k) + p.row_bytes;
}

/// The lane that writes slots' rows; no selection's.
constexpr int kSlotLane = 31;
static_assert(kMaxKernelTopK <= kSlotLane);

/// This rank's tokens for another node; `own_too`: and those for its own.
template <typename Rows, typename Net>
class DispatchSender : public WarpStage<DispatchSender<Rows, Net>, Net, 0, 1> {
 public:
  __device__ DispatchSender(Rank<Net>& rank, const TwoHopTokens& p, int node, bool own_too,
                            int channel, const Rows& rows)
      : DispatchSender::WarpStage(rank, Direction::kOut, SlotBytes(p)),
        p_(p),
        rows_(rows),
        output_(rank.layout().Across(Direction::kOut, rank.number(), node, channel)),
        there_(rank.RanksOf(node)),
        range_(TokensOf(p.num_tokens, channel, rank.config().num_channels)),
        tokens_(p, there_ | (own_too ? rank.RanksOf(rank.node()) : 0), range_),
        last_there_(TokensTo(p, there_, range_).Last()) {}

  __device__ const RingPlace& Output(int) const { return output_; }
  /// The end has to be told even if nothing goes there: by a slot without a token, after all.
  __device__ bool Next(Bits<0>&) {
    if (ended_) return false;
    token_ = tokens_.Next();
    ended_ = token_ < 0;
    if (ended_ && last_there_ >= 0) return false;
    const int64_t s = token_ * p_.top_k + this->lane_;
    const int32_t dst = token_ >= 0 && this->lane_ < p_.top_k ? p_.plan.dest_rank[s] : -1;
    dst_ = tokens_.Has(dst) ? dst : -1;
    row_ = dst_ >= 0 ? p_.plan.dest_row[s] : 0;
    word_ = dst_ >= 0 ? WordOf(p_, s) : 0;
    crosses_ = __ballot_sync(~0u, Crosses());
    return true;
  }
  __device__ void Outputs(Bits<1>& outputs) const {
    if (HasSlot()) outputs.Set(0);
  }
  __device__ void Work() {
    const int64_t header_bytes = SlotHeaderBytes(p_.top_k);
    char* slot_row = nullptr;
    if (HasSlot()) {
      auto* const header = reinterpret_cast<SlotHeader*>(this->OutputSlot());
      WriteHeader(*header);
      if (crosses_ != 0) slot_row = reinterpret_cast<char*>(header) + header_bytes;
      this->Wrote(header_bytes + (crosses_ != 0 ? p_.row_bytes : 0), crosses_ != 0);
    }
    if (token_ < 0) return;
    const bool stays = dst_ >= 0 && !Crosses();
    rows_.Write(p_.x + token_ * p_.row_bytes, /*of_ring=*/false, stays ? dst_ : -1, row_, word_,
                slot_row);
  }
  /// Of slots; rows in this node are complete at the op's end.
  __device__ void EndWrites() {
    if (this->lane_ != kSlotLane) return;
    ptx::cp_async_bulk_wait_group<0>();
    ptx::fence_proxy_async();
  }

 private:
  __device__ bool HasSlot() const { return crosses_ != 0 || ended_; }
  __device__ bool Crosses() const { return dst_ >= 0 && (there_ >> dst_ & 1) != 0; }
  __device__ void WriteHeader(SlotHeader& header) const {
    const int lane = this->lane_;
    if (Crosses()) {
      SlotHeader::Entry entry{};
      entry.host = static_cast<int16_t>(__popc(there_ & ((1u << dst_) - 1)));
      entry.k = static_cast<int16_t>(lane);
      entry.row = row_;
      entry.word = word_;
      header.entries()[__popc(crosses_ & ((1u << lane) - 1))] = entry;
    }
    if (lane == 0) {
      header = {static_cast<int32_t>(token_), __popc(crosses_), token_ == last_there_ ? 1 : 0, 0};
    }
  }

  const TwoHopTokens& p_;
  const Rows& rows_;
  const RingPlace output_;
  const uint32_t there_;  // ranks of the other node
  const ChannelTokens range_;
  TokensTo tokens_;
  const int64_t last_there_;  // -1: none goes there
  bool ended_ = false;
  int64_t token_ = -1;
  uint32_t crosses_ = 0;  // lanes whose selections do
  // Of selection `lane_`; rank -1: none here.
  int32_t dst_ = -1;
  int32_t row_ = 0;
  int32_t word_ = 0;
};

/// Rows and their weights.
class DispatchRows {
 public:
  static constexpr int kRowWork = 1;
  static constexpr int kNumBuffers = 2;
  static __device__ void Publish(const TwoHopTokens& p, const void* (&mine)[kNumBuffers]) {
    mine[0] = p.rows;
    mine[1] = p.row_scalars;
  }
  __device__ DispatchRows(const TwoHopTokens& p, char* const* here, BulkPipe& pipe)
      : p_(p), here_(here), pipe_(pipe) {}

  __device__ __noinline__ void Write(const char* token, bool of_ring, int32_t host, int64_t row,
                                     int32_t word, char* slot) const {
    char* to = threadIdx.x % 32 == kSlotLane ? slot : nullptr;
    if (host >= 0) {
      to = here_[host] + row * p_.row_bytes;
      reinterpret_cast<float*>(here_[kMaxRanks + host])[row] = __int_as_float(word);
    }
    // What was acquired, copies read, and may overwrite what others have read.
    ptx::fence_proxy_async();
    CopyRow(pipe_, token, static_cast<int>(p_.row_bytes), of_ring, [&](int at, uint32_t bytes) {
      if (to == nullptr) return;
      host >= 0 ? pipe_.Store(to + at, bytes) : pipe_.StoreForReading(to + at, bytes);
    });
  }

 private:
  const TwoHopTokens& p_;
  char* const* const here_;
  BulkPipe& pipe_;
};

template <typename Rows, typename Net>
class DispatchForwarder : public WarpStage<DispatchForwarder<Rows, Net>, Net, 1, 0> {
 public:
  __device__ DispatchForwarder(Rank<Net>& rank, const TwoHopTokens& p, int source, int channel,
                               const Rows& rows)
      : DispatchForwarder::WarpStage(rank, Direction::kOut, SlotBytes(p)),
        header_bytes_(SlotHeaderBytes(p.top_k)),
        rows_(rows),
        input_(rank.layout().Across(Direction::kOut, source, rank.node(), channel)) {}

  __device__ const RingPlace& Input(int) const { return input_; }
  __device__ bool Next(Bits<1>& inputs) const {
    if (!ended_) inputs.Set(0);
    return !ended_;
  }
  __device__ void Work() {
    const char* const slot = this->InputSlot(0);
    const auto* const header = reinterpret_cast<const SlotHeader*>(slot);
    const int32_t num_entries = header->num_entries;
    ended_ = header->last != 0;
    if (num_entries == 0) return;
    SlotHeader::Entry entry{};
    int32_t host = -1;
    if (this->lane_ < num_entries) {
      entry = header->entries()[this->lane_];
      host = this->rank_.HostRank(entry.host);
    }
    rows_.Write(slot + header_bytes_, /*of_ring=*/true, host, entry.row, entry.word, nullptr);
  }

 private:
  const int64_t header_bytes_;
  const Rows& rows_;
  const RingPlace input_;
  bool ended_ = false;
};

/// Part `part` of `num_parts` of this rank's tokens with selections in its own node, if there is no
/// other.
template <typename Rows, typename Net>
__device__ void DispatchInNode(const Rank<Net>& rank, const TwoHopTokens& p, int part,
                               int num_parts, const Rows& rows) {
  const int lane = threadIdx.x % 32;
  TokensTo tokens(p, rank.RanksOf(rank.node()), TokensOf(p.num_tokens, part, num_parts));
  for (int64_t token = tokens.Next(); token >= 0; token = tokens.Next()) {
    const int64_t s = token * p.top_k + lane;
    const int32_t dst = lane < p.top_k ? p.plan.dest_rank[s] : -1;
    const bool goes = tokens.Has(dst);
    rows.Write(p.x + token * p.row_bytes, /*of_ring=*/false, goes ? dst : -1,
               goes ? p.plan.dest_row[s] : 0, goes ? WordOf(p, s) : 0, nullptr);
  }
}

/// This warp's part. False: somebody gave up.
template <typename Rows, typename Net>
__device__ bool DispatchTokens(Rank<Net>& rank, const TwoHopTokens& p, const Rows& rows) {
  const int channels = rank.config().num_channels;
  const int num_other = rank.nodes().num_nodes - 1;
  const int num_sources = rank.num_sources();
  // Rows that are read or written for a token in a node, and for one that crosses.
  const int node_work = 1 + rank.RowsOfToken(p.top_k) * Rows::kRowWork;
  constexpr int kCrossWork = Net::kInPlace ? 2 : 4;
  const Roles<3> roles(static_cast<int>(gridDim.x),
                       {{num_other > 0 ? channels : Role::kAny, kCrossWork + node_work},
                        {channels * max(0, num_other - 1), kCrossWork * (num_other - 1)},
                        {channels * num_sources, node_work * num_sources}});
  const Part part = roles.Of(static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x / 32));
  if (part.role == 2) {
    const int source = rank.SourceOf(part.number / channels);
    return DispatchForwarder<Rows, Net>(rank, p, source, part.number % channels, rows).Run();
  }
  if (part.role > 2) return true;
  if (num_other == 0) {
    DispatchInNode(rank, p, part.number, part.num_parts, rows);
    return true;
  }
  const int other = part.role + part.number / channels;
  return DispatchSender<Rows, Net>(rank, p, rank.OtherNode(other), /*own_too=*/other == 0,
                                   part.number % channels, rows)
      .Run();
}

}  // namespace two_hop

template <typename Rows, typename Net>
__global__ void __launch_bounds__(kDispatchThreads, 1)
    TwoHopDispatchKernel(const __grid_constant__ two_hop::Params<TwoHopTokens, Net> params) {
  const TwoHopTokens& p = params.op;
  auto& memory = *reinterpret_cast<two_hop::Shared<DispatchShared>*>(DynamicShared());
  DispatchShared& shared = memory.op;
  Exchange exchange(p.peers, p.op);
  if (!exchange.takes_part()) {
    return ZeroRows(p.plan, p.zero_tail, p.rows, p.row_scalars, p.capacity, p.row_bytes);
  }
  memory.Load(params.context);
  two_hop::Rank<Net> rank(memory.context, params.net, exchange);
  const void* mine[Rows::kNumBuffers];
  Rows::Publish(p, mine);
  if (!rank.Begin(mine, shared.here, shared.flags)) return;
  const int warp = threadIdx.x / 32;
  BulkPipe pipe(shared.buffers(warp, int64_t{p.num_stages} * p.piece_bytes),
                shared.barriers + warp * kMaxStages, p.piece_bytes, p.num_stages);
  const Rows rows(p, shared.here, pipe);
  if (!two_hop::DispatchTokens(rank, p, rows)) return;
  if (p.zero_tail) ZeroTail(p.rows, p.row_scalars, *p.plan.num_rows, p.capacity, p.row_bytes);
  ZeroMaskedRows(exchange, p.plan, p.rows, p.row_scalars, p.row_bytes);
  rank.Finish(shared.flags);
}

/// `of`: the params of the op that `tokens` are of.
template <typename Rows, typename Op, typename Net>
Status LaunchTwoHopTokens(const TwoHopTokens& tokens, const two_hop::Params<Op, Net>& of,
                          cudaStream_t stream, const char* op) {
  const two_hop::Params<TwoHopTokens, Net> params{WithBuffers(tokens), of.context, of.slot_bytes,
                                                  of.num_nodes, of.net};
  const TwoHopTokens& p = params.op;
  const int64_t slot_bytes = two_hop::SlotBytes(p);
  if (p.row_bytes % 16 != 0 || p.top_k > kMaxKernelTopK || slot_bytes > params.slot_bytes) {
    return Status::InvalidArgument(
        std::string(op) + ": expected rows of a multiple of 16 bytes, top_k of at most " +
        std::to_string(kMaxKernelTopK) + " and slots of at most " +
        std::to_string(params.slot_bytes) + " bytes on CUDA, got " + std::to_string(p.row_bytes) +
        " bytes, top_k " + std::to_string(p.top_k) + " and slots of " + std::to_string(slot_bytes) +
        " bytes");
  }
  // All blocks: every end of a ring has a warp.
  return Launch(TwoHopDispatchKernel<Rows, Net>, p.peers.num_sms, kDispatchThreads,
                two_hop::Shared<DispatchShared>::NumBytes(DispatchSharedBytes(p)), stream, params,
                op);
}

template <typename Net>
Status LaunchTwoHopDispatch(const two_hop::Params<DispatchParams, Net>& params,
                            cudaStream_t stream) {
  const DispatchParams& p = params.op;
  TwoHopTokens tokens;
  tokens.peers = p.peers;
  tokens.plan = p.plan;
  tokens.num_tokens = p.num_tokens;
  tokens.top_k = p.top_k;
  tokens.row_bytes = p.row_bytes;
  tokens.capacity = p.capacity;
  tokens.zero_tail = p.zero_tail;
  tokens.x = p.x;
  tokens.weights = p.weights;
  tokens.rows = p.rows;
  tokens.row_scalars = p.row_weights;
  tokens.piece_bytes = p.piece_bytes;
  tokens.num_stages = p.num_stages;
  return LaunchTwoHopTokens<two_hop::DispatchRows>(tokens, params, stream, "dispatch");
}

template <typename Net>
Status LoadTwoHopDispatch() {
  return LoadKernels<two_hop::Params<TwoHopTokens, Net>>(
      {TwoHopDispatchKernel<two_hop::DispatchRows, Net>}, "dispatch over nodes");
}

}  // namespace wideep
