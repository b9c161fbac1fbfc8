// TwoHopCombineKernel: combine, and dispatch's backward pass, over nodes (two_hop_protocol.h).
//
//   reducer  a warp for each channel of each rank on another node that this rank stands for: sums
//            the rows of a token that lie on this node, in order of (rank, k), rounds the
//            sum to the rows' type, and sends it home. Its order of tokens is that of the hosts'
//            arrivals (node_arrivals.cuh), which is the home's.
//   home     a warp for each channel of this rank's tokens: adds what comes from other nodes, and
//            the rows on its own node one by one, in order of node, then (rank, k).
//
// All sums are in float32. On its way a row is rounded once if it crosses, and once more at home.
// Published within a node: y, row_scalars and the plan's arrays by host (HostArrays).
//
// Dispatch's backward pass: each row's scalar travels as an entry of its token's slot.
//
// A plan may be older than the mask: rows of masked ranks are skipped as if they were dropped.
#pragma once

#include "csrc/ep/combine.cuh"
#include "csrc/ep/node_arrivals.cuh"
#include "csrc/ep/two_hop_rank.cuh"
#include "csrc/ep/two_hop_roles.h"

namespace wideep::two_hop {

/// What a home group sums; its rows are in the list of its first warp.
struct HomeTask {
  static constexpr int32_t kEnded = -1;
  static constexpr int32_t kGaveUp = -2;
  char* out;
  int32_t count;  // of rows
};

struct CombineBlock {
  char* here[kMaxPublished * kMaxRanks];
  uint32_t flags[kProtocolFlags];
  int8_t node_of[kMaxRanks];  // of ranks; -1: masked
  HostArrays hosts[kMaxNodeRanks];
  SumList lists[kWarpsPerBlock];
  HomeTask tasks[kWarpsPerBlock];
  RingPlace inputs[kWarpsPerBlock][kMaxRanks - 1];  // of homes
  ArrivalWindow windows[kWarpsPerBlock];
};
static_assert(sizeof(Shared<CombineBlock>) <= kMaxSharedBytes);

WIDEEP_HOST_DEVICE inline int64_t SlotBytes(const CombineParams& p) {
  return SlotHeaderBytes(p.top_k) + p.hidden * static_cast<int64_t>(SizeOf(p.dtype));
}

/// SumRows, for all stages: one copy of the code (two_hop_rank.cuh). Few rows a token: more of each
/// under way.
template <DType kDType, bool kWeighted>
__device__ __noinline__ void SumRowsHere(char* out, const SumList& list, int num_rows,
                                         int row_bytes, int thread, int num_threads) {
  SumRows<kDType, kWeighted, /*kColumns=*/3, /*kRows=*/4, /*kReadOnce=*/true>(
      out, list, num_rows, 0, row_bytes, thread, num_threads);
}

/// The sums of one channel of `home`, a number, on this node.
template <DType kDType, bool kWeighted, typename Net>
class Reducer : public WarpStage<Reducer<kDType, kWeighted, Net>, Net, 0, 1> {
  using Base = WarpStage<Reducer, Net, 0, 1>;

 public:
  __device__ Reducer(Rank<Net>& rank, const CombineParams& p, CombineBlock& block, int home,
                     int channel)
      : Base(rank, Direction::kBack, SlotBytes(p)),
        ring_(rank.layout().Across(Direction::kBack, home, rank.node(), channel)),
        header_bytes_(SlotHeaderBytes(p.top_k)),
        row_bytes_(static_cast<int>(p.hidden * static_cast<int64_t>(SizeOf(kDType)))),
        list_(block.lists[threadIdx.x / 32]),
        tokens_(TokensOf(p.num_tokens, channel, rank.config().num_channels)),
        arrivals_(block.hosts, rank.nodes().SizeOf(rank.node()), block.windows[threadIdx.x / 32],
                  rank.RankOf(home), p.num_tokens, p.top_k, tokens_.begin, tokens_.end) {}

  __device__ const RingPlace& Output(int) const { return ring_; }
  __device__ bool Next(Bits<0>&) { return arrivals_.Next(); }

  __device__ void Work() {
    auto* const header = reinterpret_cast<SlotHeader*>(Base::OutputSlot());
    const int count = arrivals_.Take(row_bytes_, list_, kWeighted ? nullptr : header->entries());
    if (Base::lane_ == 0) {
      header->token = arrivals_.token();
      header->num_entries = kWeighted ? 0 : count;
    }
    __syncwarp();
    SumRowsHere<kDType, kWeighted>(reinterpret_cast<char*>(header) + header_bytes_, list_, count,
                                   row_bytes_, Base::lane_, 32);
    __syncwarp();  // the list is read
    Base::Wrote(header_bytes_ + row_bytes_, /*has_row=*/true);
  }

 private:
  const RingPlace ring_;
  const int64_t header_bytes_;
  const int row_bytes_;
  SumList& list_;
  const ChannelTokens tokens_;
  NodeArrivals arrivals_;
};

/// Which warps of a block are homes, in groups, and which reduce. Groups are as large as leaves
/// every channel and every reducer its own: with many nodes there are few channels.
class CombineRoles {
 public:
  /// `cross_work`: how often a row that crosses is read or written on its way to its slot.
  __device__ CombineRoles(int num_channels, int num_sources, int num_nodes, int rows_of_token,
                          int cross_work)
      : roles_(static_cast<int>(gridDim.x),
               {{num_channels, rows_of_token + num_nodes},
                {num_channels * num_sources, num_sources * (rows_of_token + cross_work - 1)}}),
        blocks_(roles_.apart() ? roles_.blocks(0) : static_cast<int>(gridDim.x)),
        groups_((num_channels + blocks_ - 1) / blocks_) {
    const int num_reducers = roles_.apart() ? 0 : num_channels * num_sources;
    while (2 * group_warps_ * groups_ <= kWarpsPerBlock &&
           (kWarpsPerBlock - 2 * group_warps_ * groups_) * blocks_ >= num_reducers) {
      group_warps_ *= 2;
    }
  }

  __device__ int group_warps() const { return group_warps_; }
  __device__ bool IsHome() const { return HasHomes() && Warp() < groups_ * group_warps_; }
  __device__ int ChannelOf(int group) const { return group * blocks_ + Block(); }
  /// Of a warp that is no home's; -1: none either.
  __device__ int Reducer() const {
    if (!roles_.apart()) return (Warp() - groups_ * group_warps_) * blocks_ + Block();
    return HasHomes() ? -1 : Warp() * roles_.blocks(1) + Block() - blocks_;
  }

 private:
  static __device__ int Warp() { return static_cast<int>(threadIdx.x / 32); }
  static __device__ int Block() { return static_cast<int>(blockIdx.x); }
  __device__ bool HasHomes() const { return Block() < blocks_; }

  const Roles<2> roles_;
  const int blocks_;  // with homes
  const int groups_;  // of a block
  int group_warps_ = 1;
};

/// One thread's view of its home group.
class HomeGroup {
 public:
  __device__ HomeGroup(CombineBlock& block, int num_warps)
      : num_threads_(32 * num_warps),
        group_(threadIdx.x / num_threads_),
        thread_(threadIdx.x % num_threads_),
        list_(block.lists[group_ * num_warps]),
        task_(block.tasks[group_ * num_warps]) {}

  __device__ int group() const { return group_; }
  /// Whether this is the first warp's.
  __device__ bool leads() const { return thread_ < 32; }
  __device__ SumList& list() const { return list_; }

  /// The first warp, with the list filled: all warps sum.
  template <DType kDType, bool kWeighted>
  __device__ void Sum(char* out, int count, int row_bytes) {
    Set(out, count);
    SumPart<kDType, kWeighted>(row_bytes);
    Meet();  // the list is read, and what it names
  }
  /// The first warp, at the end.
  __device__ void End(bool ok) { Set(nullptr, ok ? HomeTask::kEnded : HomeTask::kGaveUp); }
  /// The others, until then. False: the first one gave up.
  template <DType kDType, bool kWeighted>
  __device__ bool Help(int row_bytes) {
    for (Meet(); task_.count >= 0; Meet()) {
      SumPart<kDType, kWeighted>(row_bytes);
      Meet();
    }
    return task_.count == HomeTask::kEnded;
  }

 private:
  __device__ void Set(char* out, int count) {
    if (thread_ == 0) task_ = {out, count};
    Meet();
  }
  __device__ void Meet() {
    if (num_threads_ == 32) {
      __syncwarp();
    } else {
      ptx::bar_sync(1 + group_, num_threads_);
    }
  }
  template <DType kDType, bool kWeighted>
  __device__ void SumPart(int row_bytes) {
    SumRowsHere<kDType, kWeighted>(task_.out, list_, task_.count, row_bytes, thread_, num_threads_);
  }

  const int num_threads_;
  const int group_;
  const int thread_;
  SumList& list_;
  HomeTask& task_;
};

/// The outputs of one channel of this rank's tokens, from at most kInputs other nodes.
template <DType kDType, bool kWeighted, int kInputs, typename Net>
class Home : public WarpStage<Home<kDType, kWeighted, kInputs, Net>, Net, kInputs, 0> {
  using Base = WarpStage<Home, Net, kInputs, 0>;
  using Base::lane_;
  using Base::rank_;

 public:
  /// By the group's first warp.
  __device__ Home(Rank<Net>& rank, const CombineParams& p, CombineBlock& block, HomeGroup& group,
                  int channel)
      : Base(rank, Direction::kBack, SlotBytes(p)),
        p_(p),
        block_(block),
        group_(group),
        list_(group.list()),
        inputs_(block.inputs[threadIdx.x / 32]),
        header_bytes_(SlotHeaderBytes(p.top_k)),
        row_bytes_(p.hidden * static_cast<int64_t>(SizeOf(kDType))) {
    if (lane_ < kInputs) {
      inputs_[lane_] = lane_ < rank.nodes().num_nodes - 1
                           ? rank.layout().Across(Direction::kBack, rank.number(),
                                                  rank.OtherNode(lane_), channel)
                           : RingPlace();
    }
    __syncwarp();
    const ChannelTokens tokens = TokensOf(p.num_tokens, channel, rank.config().num_channels);
    token_ = tokens.begin - 1;
    end_ = tokens.end;
    LoadNext();
  }

  __device__ const RingPlace& Input(int i) const { return inputs_[i]; }

  __device__ bool Next(Bits<kInputs>& inputs) {
    if (++token_ >= end_) return false;
    dst_ = next_dst_;
    row_ = next_row_;
    LoadNext();
    node_ = dst_ < 0 ? -1 : block_.node_of[dst_];
    const bool has_row = node_ == rank_.node();
    scalar_ = has_row ? Scalars(dst_)[row_] : 0;
    nodes_ = __reduce_or_sync(~0u, node_ < 0 ? 0u : 1u << node_);
    for (int i = 0; i < rank_.nodes().num_nodes - 1; ++i) {
      if (nodes_ >> rank_.OtherNode(i) & 1) inputs.Set(i);
    }
    return true;
  }

  __device__ void Work() {
    const bool has_row = node_ == rank_.node();
    // What comes from a node stands in the place of the first of its rows.
    const uint32_t same_node = __match_any_sync(~0u, node_);
    const bool is_sum = node_ >= 0 && !has_row && lane_ == __ffs(same_node) - 1;
    // Ranks of a node lie next to each other in the order of ranks.
    const SumOrder order = OrderByRank(has_row || is_sum ? dst_ : -1, p_.top_k);
    if (has_row) {
      list_.rows[order.place] = block_.here[dst_] + row_ * row_bytes_;
      list_.weights[order.place] = scalar_;
    } else if (is_sum) {
      list_.rows[order.place] = Slot(node_) + header_bytes_;
      list_.weights[order.place] = 1.0f;
    }
    if constexpr (!kWeighted) WriteScalars(has_row);
    group_.template Sum<kDType, kWeighted>(p_.out + token_ * row_bytes_, order.count,
                                           static_cast<int>(row_bytes_));
  }

 private:
  /// Early: what comes next depends on it.
  __device__ void LoadNext() {
    const bool loads = token_ + 1 < end_ && lane_ < p_.top_k;
    const int64_t s = (token_ + 1) * p_.top_k + lane_;
    next_dst_ = loads ? p_.plan.dest_rank[s] : -1;
    next_row_ = loads ? p_.plan.dest_row[s] : -1;
  }
  __device__ const float* Scalars(int rank) const {
    return reinterpret_cast<const float*>(block_.here[kMaxRanks + rank]);
  }
  /// The token in the ring from another node.
  __device__ const char* Slot(int node) const {
    return Base::InputSlot(node < rank_.node() ? node : node - 1);
  }
  /// Each selection's scalar; 0 for those without a row.
  __device__ void WriteScalars(bool has_row) {
    float* const to = p_.dweights + token_ * p_.top_k;
    if (lane_ < p_.top_k && (has_row || node_ < 0)) to[lane_] = scalar_;
    for (uint32_t others = nodes_ & ~(1u << rank_.node()); others != 0; others &= others - 1) {
      const auto* header = reinterpret_cast<const SlotHeader*>(Slot(__ffs(others) - 1));
      if (lane_ >= header->num_entries) continue;
      const SlotHeader::Entry& entry = header->entries()[lane_];
      to[entry.k] = __int_as_float(entry.word);
    }
  }

  const CombineParams& p_;
  const CombineBlock& block_;
  HomeGroup& group_;
  SumList& list_;
  RingPlace* const inputs_;  // [kInputs], in shared memory
  const int64_t header_bytes_;
  const int64_t row_bytes_;
  int64_t token_;
  int64_t end_;
  uint32_t nodes_ = 0;  // with rows of the token, a bit each
  // Of selection `lane_`:
  int32_t dst_ = -1;
  int32_t node_ = -1;  // -1: no row
  int64_t row_ = -1;
  float scalar_ = 0;
  int32_t next_dst_;
  int32_t next_row_;
};

/// What the block's warps need of the published buffers. All threads.
template <typename Net>
__device__ void FillBlock(const Rank<Net>& rank, CombineBlock& block) {
  const int i = threadIdx.x;
  if (i < kMaxRanks) {
    const int number = rank.NumberOf(i);
    block.node_of[i] = static_cast<int8_t>(number < 0 ? -1 : rank.nodes().NodeOf(number));
  }
  if (i < rank.nodes().SizeOf(rank.node())) {
    char* const* const here = block.here + rank.HostRank(i);
    block.hosts[i] = {here[0], reinterpret_cast<const float*>(here[kMaxRanks]),
                      reinterpret_cast<const int32_t*>(here[2 * kMaxRanks]),
                      reinterpret_cast<const int32_t*>(here[3 * kMaxRanks]),
                      reinterpret_cast<const int32_t*>(here[4 * kMaxRanks])};
  }
  __syncthreads();
}

/// This warp's part in a home group, if the group has a channel.
template <DType kDType, bool kWeighted, int kInputs, typename Net>
__device__ bool RunHome(Rank<Net>& rank, const CombineParams& p, CombineBlock& block,
                        const CombineRoles& roles) {
  HomeGroup group(block, roles.group_warps());
  const int channel = roles.ChannelOf(group.group());
  if (channel >= rank.config().num_channels) return true;
  if (!group.leads()) {
    const auto row_bytes = static_cast<int>(p.hidden * static_cast<int64_t>(SizeOf(kDType)));
    return group.template Help<kDType, kWeighted>(row_bytes);
  }
  const bool ok = Home<kDType, kWeighted, kInputs, Net>(rank, p, block, group, channel).Run();
  group.End(ok);
  return ok;
}

/// This warp's part. False: somebody gave up.
template <DType kDType, bool kWeighted, int kInputs, typename Net>
__device__ bool RunCombine(Rank<Net>& rank, const CombineParams& p, CombineBlock& block) {
  const int num_channels = rank.config().num_channels;
  const CombineRoles roles(num_channels, rank.num_sources(), rank.nodes().num_nodes,
                           rank.RowsOfToken(p.top_k), Net::kInPlace ? 2 : 4);
  if (roles.IsHome()) return RunHome<kDType, kWeighted, kInputs>(rank, p, block, roles);
  const int number = roles.Reducer();
  const int home = number < 0 ? -1 : rank.SourceOf(number / num_channels);
  return home < 0 ||
         Reducer<kDType, kWeighted, Net>(rank, p, block, home, number % num_channels).Run();
}

/// `kInputs`: at least the other nodes; the fewer, the less to keep.
template <DType kDType, bool kWeighted, int kInputs, typename Net>
__global__ void __launch_bounds__(kCombineThreads, 1)
    TwoHopCombineKernel(const __grid_constant__ Params<CombineParams, Net> params) {
  const CombineParams& p = params.op;
  auto& shared = *reinterpret_cast<Shared<CombineBlock>*>(DynamicShared());
  CombineBlock& block = shared.op;
  Exchange exchange(p.peers, kWeighted ? ExchangeOp::kCombine : ExchangeOp::kDispatchGrad);
  if (!exchange.takes_part()) {
    return ZeroOutputs<kWeighted>(p, p.hidden * static_cast<int64_t>(SizeOf(kDType)));
  }
  shared.Load(params.context);
  Rank<Net> rank(shared.context, params.net, exchange);
  const void* mine[5] = {p.y, p.row_scalars, p.plan.arrival_rows, p.plan.row_source,
                         p.plan.rows_per_source};
  if (!rank.Begin(mine, block.here, block.flags)) return;
  FillBlock(rank, block);
  if (!RunCombine<kDType, kWeighted, kInputs>(rank, p, block)) return;
  rank.Finish(block.flags);
}

}  // namespace wideep::two_hop

namespace wideep {

/// For at most 2, 4 and kMaxRanks nodes.
template <bool kWeighted, typename Net>
class CombineKernels {
 public:
  using Params = two_hop::Params<CombineParams, Net>;
  using Kernel = void (*)(Params);

  static Kernel Of(DType dtype, int num_nodes) {
    return dtype == DType::kBF16  ? OfNodes<DType::kBF16>(num_nodes)
           : dtype == DType::kF16 ? OfNodes<DType::kF16>(num_nodes)
                                  : OfNodes<DType::kF32>(num_nodes);
  }
  static Status Load() {
    for (const int num_nodes : {2, 4, kMaxRanks}) {
      for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
        Status status = LoadKernels<Params>({Of(dtype, num_nodes)}, "combine over nodes");
        if (!status.ok()) return status;
      }
    }
    return Status();
  }

 private:
  template <DType kDType>
  static Kernel OfNodes(int num_nodes) {
    using two_hop::TwoHopCombineKernel;
    return num_nodes <= 2   ? TwoHopCombineKernel<kDType, kWeighted, 1, Net>
           : num_nodes <= 4 ? TwoHopCombineKernel<kDType, kWeighted, 3, Net>
                            : TwoHopCombineKernel<kDType, kWeighted, kMaxRanks - 1, Net>;
  }
};

template <bool kWeighted, typename Net>
Status LaunchTwoHopSum(const two_hop::Params<CombineParams, Net>& params, const char* op,
                       cudaStream_t stream) {
  const CombineParams& p = params.op;
  if (Status status = CheckCombineShape(op, p.dtype, p.hidden, p.top_k); !status.ok()) {
    return status;
  }
  const int64_t slot_bytes = two_hop::SlotBytes(p);
  if (slot_bytes > params.slot_bytes) {
    return Status::InvalidArgument(std::string(op) + ": expected slots of at most " +
                                   std::to_string(params.slot_bytes) + " bytes, got " +
                                   std::to_string(slot_bytes) +
                                   "; make the group with the hidden and top_k of its calls");
  }
  const auto kernel = CombineKernels<kWeighted, Net>::Of(p.dtype, params.num_nodes);
  // All blocks: every stage has a warp.
  return Launch(kernel, p.peers.num_sms, kCombineThreads,
                sizeof(two_hop::Shared<two_hop::CombineBlock>), stream, params, op);
}

template <typename Net>
Status LaunchTwoHopCombine(const two_hop::Params<CombineParams, Net>& params, cudaStream_t stream) {
  if (params.op.dweights == nullptr) return LaunchTwoHopSum<true>(params, "combine", stream);
  return LaunchTwoHopSum<false>(params, "dispatch's gradient", stream);
}

template <typename Net>
Status LoadTwoHopCombine() {
  if (Status status = CombineKernels<true, Net>::Load(); !status.ok()) return status;
  return CombineKernels<false, Net>::Load();
}

}  // namespace wideep
