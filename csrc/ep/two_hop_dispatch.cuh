// TwoHopDispatchKernel: tokens go to their rows over nodes. Dispatch, and, with another `Rows`,
// combine's gradient (two_hop_combine_grad.cuh).
//
//   senders     a warp for each (other node, channel): tokens with selections there, into staging
//               memory and across
//   forwarders  a warp for each (rank of another node that this rank stands for, channel): what
//               comes, from its slot to all rows in this node
//   own         the other warps: this rank's tokens with selections in its own node, to all of them
//
// Rows are written in place, wherever they lie in the node. `Rows` says what is published there and
// what a token makes of its rows:
//
//   kNumBuffers, void Publish(const void* (&mine)[kNumBuffers])
//   Rows(p, here, pipe)
//   void Write<kOfRing>(const char* token, int32_t host, int64_t row, int32_t word)
//        all lanes: a token, which lies in a ring or not, to the rows that lanes bring, each of a
//        rank of the node (-1: none)
//
// Finish orders everything in the node.
#pragma once

#include "csrc/ep/dispatch_shared.cuh"
#include "csrc/ep/two_hop_rank.cuh"
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

/// Tokens of [begin, end) with selections on some ranks, in order. All lanes.
class TokensTo {
 public:
  __device__ TokensTo(const TwoHopTokens& p, uint32_t ranks, ChannelTokens tokens)
      : p_(p), ranks_(ranks), window_(tokens.begin - 32), end_(tokens.end) {}

  __device__ uint32_t ranks() const { return ranks_; }
  /// -1: there are no more.
  __device__ int64_t Next() {
    while (found_ == 0) {
      window_ += 32;
      if (window_ >= end_) return -1;
      const int64_t token = window_ + threadIdx.x % 32;
      bool goes = false;
      if (token < end_) {
        for (int k = 0; k < p_.top_k; ++k) goes |= Has(p_.plan.dest_rank[token * p_.top_k + k]);
      }
      found_ = __ballot_sync(~0u, goes);
    }
    const int64_t token = window_ + __ffs(static_cast<int>(found_)) - 1;
    found_ &= found_ - 1;
    return token;
  }
  __device__ bool Has(int32_t dst) const { return dst >= 0 && (ranks_ >> dst & 1) != 0; }

 private:
  const TwoHopTokens& p_;
  const uint32_t ranks_;
  int64_t window_;
  const int64_t end_;
  uint32_t found_ = 0;
};

/// A row through shared memory. `store(offset, bytes)` by all lanes, for each piece. Rows of a ring
/// stay in L2, where the next ones are written; others are read once.
template <bool kOfRing, typename Store>
__device__ void CopyRow(BulkPipe& pipe, const char* row, int64_t row_bytes, Store store) {
  const auto pieces = static_cast<int>((row_bytes + pipe.piece_bytes() - 1) / pipe.piece_bytes());
  const auto bytes_of = [&](int piece) {
    return static_cast<uint32_t>(
        min(int64_t{pipe.piece_bytes()}, row_bytes - int64_t{piece} * pipe.piece_bytes()));
  };
  const int ahead = pipe.num_stages() - 1;
  for (int piece = 0; piece < pieces + ahead; ++piece) {
    if (piece < pieces) {
      const char* const from = row + int64_t{piece} * pipe.piece_bytes();
      kOfRing ? pipe.Load(from, bytes_of(piece)) : pipe.LoadOnce(from, bytes_of(piece));
    }
    const int out = piece - ahead;
    if (out < 0) continue;
    pipe.Wait();
    store(int64_t{out} * pipe.piece_bytes(), bytes_of(out));
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

template <typename Net>
class DispatchSender : public WarpStage<DispatchSender<Net>, Net, 0, 1> {
 public:
  __device__ DispatchSender(Rank<Net>& rank, const TwoHopTokens& p, int node, int channel,
                            BulkPipe& pipe)
      : DispatchSender::WarpStage(rank, Direction::kOut, SlotBytes(p)),
        p_(p),
        pipe_(pipe),
        output_(rank.layout().Across(Direction::kOut, rank.number(), node, channel)),
        tokens_(p, rank.RanksOf(node), TokensOf(p.num_tokens, channel, rank.config().num_channels)),
        next_(tokens_.Next()) {}

  __device__ RingPlace Output(int) const { return output_; }
  /// The end has to be told even if nothing goes there.
  __device__ bool Next(Bits<0>&) const { return !ended_; }
  __device__ void Work() {
    auto* const header = reinterpret_cast<SlotHeader*>(this->OutputSlot());
    const int lane = this->lane_;
    const int64_t token = next_;
    if (token >= 0) next_ = tokens_.Next();
    ended_ = next_ < 0;
    uint32_t lanes = 0;
    if (token >= 0) {
      const int64_t s = token * p_.top_k + lane;
      const int32_t dst = lane < p_.top_k ? p_.plan.dest_rank[s] : -1;
      const bool goes = tokens_.Has(dst);
      lanes = __ballot_sync(~0u, goes);
      if (goes) {
        SlotHeader::Entry entry{};
        entry.host = static_cast<int16_t>(__popc(tokens_.ranks() & ((1u << dst) - 1)));
        entry.k = static_cast<int16_t>(lane);
        entry.row = p_.plan.dest_row[s];
        entry.word = WordOf(p_, s);
        header->entries()[__popc(lanes & ((1u << lane) - 1))] = entry;
      }
    }
    if (lane == 0) {
      *header = {static_cast<int32_t>(token), __popc(lanes), ended_ ? 1 : 0, 0};
    }
    const int64_t header_bytes = SlotHeaderBytes(p_.top_k);
    if (token < 0) return this->Wrote(header_bytes, /*has_row=*/false);
    // Copies may overwrite what the last put from this slot has read.
    ptx::fence_proxy_async();
    char* const to = reinterpret_cast<char*>(header) + header_bytes;
    CopyRow</*kOfRing=*/false>(pipe_, p_.x + token * p_.row_bytes, p_.row_bytes,
                               [&](int64_t at, uint32_t bytes) {
                                 if (lane == 0) pipe_.StoreForReading(to + at, bytes);
                               });
    this->Wrote(header_bytes + p_.row_bytes, /*has_row=*/true);
  }
  __device__ void EndWrites() {
    ptx::cp_async_bulk_wait_group<0>();
    ptx::fence_proxy_async();
  }

 private:
  const TwoHopTokens& p_;
  BulkPipe& pipe_;
  const RingPlace output_;
  TokensTo tokens_;
  int64_t next_;
  bool ended_ = false;
};

/// Rows and their weights.
class DispatchRows {
 public:
  static constexpr int kNumBuffers = 2;
  static __device__ void Publish(const TwoHopTokens& p, const void* (&mine)[kNumBuffers]) {
    mine[0] = p.rows;
    mine[1] = p.row_scalars;
  }
  __device__ DispatchRows(const TwoHopTokens& p, char* const* here, BulkPipe& pipe)
      : p_(p), here_(here), pipe_(pipe) {}

  template <bool kOfRing>
  __device__ void Write(const char* token, int32_t host, int64_t row, int32_t word) const {
    char* to = nullptr;
    if (host >= 0) {
      to = here_[host] + row * p_.row_bytes;
      reinterpret_cast<float*>(here_[kMaxRanks + host])[row] = __int_as_float(word);
    }
    // What was acquired, copies read.
    ptx::fence_proxy_async();
    CopyRow<kOfRing>(pipe_, token, p_.row_bytes, [&](int64_t at, uint32_t bytes) {
      if (to != nullptr) pipe_.Store(to + at, bytes);
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

  __device__ RingPlace Input(int) const { return input_; }
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
    rows_.template Write</*kOfRing=*/true>(slot + header_bytes_, host, entry.row, entry.word);
  }

 private:
  const int64_t header_bytes_;
  const Rows& rows_;
  const RingPlace input_;
  bool ended_ = false;
};

/// Part `part` of `num_parts` of this rank's tokens with selections in its own node.
template <typename Rows, typename Net>
__device__ void DispatchInNode(const Rank<Net>& rank, const TwoHopTokens& p, int part,
                               int num_parts, const Rows& rows) {
  const int lane = threadIdx.x % 32;
  TokensTo tokens(p, rank.RanksOf(rank.node()), TokensOf(p.num_tokens, part, num_parts));
  for (int64_t token = tokens.Next(); token >= 0; token = tokens.Next()) {
    const int64_t s = token * p.top_k + lane;
    const int32_t dst = lane < p.top_k ? p.plan.dest_rank[s] : -1;
    const bool goes = tokens.Has(dst);
    rows.template Write</*kOfRing=*/false>(p.x + token * p.row_bytes, goes ? dst : -1,
                                           goes ? p.plan.dest_row[s] : 0, goes ? WordOf(p, s) : 0);
  }
}

/// This warp's part. False: somebody gave up.
template <typename Rows, typename Net>
__device__ bool DispatchTokens(Rank<Net>& rank, const TwoHopTokens& p, const Rows& rows,
                               BulkPipe& pipe) {
  const int channels = rank.config().num_channels;
  const int num_other = rank.nodes().num_nodes - 1;
  const int num_ends = num_other + rank.num_sources();
  const int end = rank.warp() / channels;
  const int channel = rank.warp() % channels;
  if (end < num_other) {
    return DispatchSender<Net>(rank, p, rank.OtherNode(end), channel, pipe).Run();
  }
  if (end < num_ends) {
    const int source = rank.SourceOf(end - num_other);
    return DispatchForwarder<Rows, Net>(rank, p, source, channel, rows).Run();
  }
  const int first = num_ends * channels;
  DispatchInNode(rank, p, rank.warp() - first, rank.num_warps() - first, rows);
  return true;
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
  if (!two_hop::DispatchTokens(rank, p, rows, pipe)) return;
  if (p.zero_tail) ZeroTail(p.rows, p.row_scalars, *p.plan.num_rows, p.capacity, p.row_bytes);
  ZeroMaskedRows(exchange, p.plan, p.rows, p.row_scalars, p.row_bytes);
  rank.Finish(shared.flags);
}

/// `of`: the params of the op that `tokens` are of.
template <typename Rows, typename Op, typename Net>
Status LaunchTwoHopTokens(const TwoHopTokens& tokens, const two_hop::Params<Op, Net>& of,
                          cudaStream_t stream, const char* op) {
  const two_hop::Params<TwoHopTokens, Net> params{WithBuffers(tokens), of.context, of.slot_bytes,
                                                  of.net};
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
