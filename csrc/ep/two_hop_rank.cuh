// What a rank's kernels know in the exchange between nodes, and the rings of two_hop_layout.h for
// warps: one warp runs one Stage of two_hop_protocol.h, or works without rings.
//
// Numbers and ranks. Nodes, rings and slots speak of numbers: the ranks that are not masked, in
// order. Exchange, plans and buffers speak of ranks.
//
// Within a node everything is as on one node (exchange_protocol.cuh, PeerContext::node_ranks):
// Begin, Finish, and buffers that are mapped. Between nodes there are only rings and counts in
// registered memory, at the same place on every rank, and the abort word. `Net`, as seen by a
// kernel; offsets from the start of that memory, the same on every rank:
//
//   void PutWarp(int rank, int64_t to, const char* from, int64_t bytes, int64_t signal, uint64_t v)
//        all lanes; copies, later or now, then sets the word at `signal` to v. `from` lies in this
//        rank's memory
//   void Add(int rank, int64_t word, uint64_t v)       one thread; adds to a word
//   void PutControl(int rank, int64_t offset, uint32_t v)   one thread; a word of the rank's arena
//   kInPlace     whether stores reach the other ranks' memory. Then slots are written where they
//                are read, without staging:
//   char* At(int rank, int64_t offset)                 there
//   void Signal(int rank, int64_t word, uint64_t v)    one thread; releases, and sets a word
//
// Memory order. Before a put and before an addition lane 0 fences at system scope, and a signal is
// a release, after a warp barrier: what all lanes wrote (read) comes before. Words are acquired by
// lane 0, and a warp barrier passes that on. Bulk copies are completed by the stage (EndWrites).
//
// Small code. A stage's warps run through all of its code for every token, and warps of different
// stages share an SM: code that does not fit its instruction cache costs more than the rows. So
// what every stage calls is compiled once (__noinline__), and nothing in the loop divides.
//
// A wait that lasts too long ends as on one node, and whoever gives up or sees that another rank
// did tells all ranks on other nodes. So that the rank that does not come is named, those who wait
// for others that may wait for it are more patient: Begin least, then rings and counts, then
// Finish.
#pragma once

#include <cstddef>

#include "csrc/ep/exchange_protocol.cuh"
#include "csrc/ep/two_hop_config.h"
#include "csrc/ep/two_hop_protocol.h"

namespace wideep::two_hop {

/// `Op`: DispatchParams, .. What a mask changes is not among them (Context).
template <typename Op, typename Net>
struct Params {
  Op op;
  const Context* context;  // in the GPU's memory
  int64_t slot_bytes;      // Config's
  int32_t num_nodes;       // before any mask
  Net net;
};

/// Shared memory of a kernel over nodes: its rank's context, then the op's.
template <typename Op>
struct Shared {
  Context context;
  alignas(128) Op op;

  /// Brings the context. All threads.
  __device__ void Load(const Context* from) {
    static_assert(sizeof(Context) % 8 == 0);
    const auto* words = reinterpret_cast<const uint64_t*>(from);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Context) / 8); i += blockDim.x) {
      reinterpret_cast<uint64_t*>(&context)[i] = words[i];
    }
    __syncthreads();
  }
  /// Of which `op_bytes` are the op's.
  static constexpr int64_t NumBytes(int64_t op_bytes) {
    return static_cast<int64_t>(sizeof(Shared) - sizeof(Op)) + op_bytes;
  }
};

/// One thread's view of its rank, which takes part (is not masked).
template <typename Net>
class Rank {
 public:
  __device__ Rank(const Context& context, const Net& net, Exchange& exchange)
      : context_(context),
        net_(net),
        exchange_(exchange),
        node_(context.layout.config().nodes.NodeOf(context.number)) {}

  __device__ const Layout& layout() const { return context_.layout; }
  __device__ const Config& config() const { return context_.layout.config(); }
  __device__ const Nodes& nodes() const { return config().nodes; }
  __device__ Exchange& exchange() const { return exchange_; }
  __device__ int number() const { return context_.number; }
  __device__ int node() const { return node_; }
  __device__ int RankOf(int number) const { return context_.rank_of[number]; }
  /// -1 for no rank (-1) and for one that is masked.
  __device__ int NumberOf(int rank) const { return rank < 0 ? -1 : context_.number_of[rank]; }
  /// The rank of a host in this node, as slots name it.
  __device__ int HostRank(int index) const { return RankOf(nodes().first_rank[node_] + index); }
  /// The ranks of a node, a bit each. A host's index is the number of bits below its own.
  __device__ uint32_t RanksOf(int node) const {
    uint32_t ranks = 0;
    for (int i = nodes().first_rank[node]; i < nodes().first_rank[node + 1]; ++i) {
      ranks |= 1u << RankOf(i);
    }
    return ranks;
  }

  /// Rows of a token in this node, about: of evenly spread selections, and at least one.
  __device__ int RowsOfToken(int top_k) const {
    return max(1, top_k * nodes().SizeOf(node_) / nodes().num_ranks);
  }
  /// The i-th of the num_nodes - 1 other nodes.
  __device__ int OtherNode(int i) const { return i < node_ ? i : i + 1; }
  /// The number of the i-th rank on another node that this rank stands for; -1: there are fewer.
  __device__ int SourceOf(int i) const { return i < num_sources() ? context_.sources[i] : -1; }
  __device__ int num_sources() const { return context_.num_sources; }

  /// Own registered memory.
  __device__ char* At(int64_t offset) const { return context_.memory + offset; }
  __device__ RankState* state() const {
    return reinterpret_cast<RankState*>(At(layout().num_bytes()));
  }

  /// Acquires a word of own registered memory. All lanes get the same.
  __device__ uint64_t Load(int64_t word) const {
    uint64_t v = 0;
    if (threadIdx.x % 32 == 0) v = ptx::ld_acquire_sys_u64(reinterpret_cast<uint64_t*>(At(word)));
    v = __shfl_sync(~0u, v, 0);
    __syncwarp();  // lane 0's acquire, for all; a shuffle does not order memory
    return v;
  }
  /// Releases what all lanes wrote, and puts bytes [from, from + num_bytes) of own registered
  /// memory to `to` at another rank, then the word. All lanes.
  __device__ __noinline__ void Put(int number, int64_t to, int64_t from, int64_t num_bytes,
                                   int64_t word, uint64_t v) const {
    Release();
    net_.PutWarp(RankOf(number), to, At(from), num_bytes, word, v);
  }
  /// Releases what all lanes wrote, and sets a word of another rank. All lanes. If Net::kInPlace.
  __device__ __noinline__ void Signal(int number, int64_t word, uint64_t v) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) net_.Signal(RankOf(number), word, v);
    __syncwarp();
  }
  /// A place in another rank's registered memory, at which stores reach it. If Net::kInPlace.
  __device__ char* AtOther(int number, int64_t offset) const {
    return net_.At(RankOf(number), offset);
  }
  /// Releases what all lanes did, and adds to a word of another rank. All lanes.
  __device__ __noinline__ void Add(int number, int64_t word, uint64_t v) const {
    Release();
    if (threadIdx.x % 32 == 0) net_.Add(RankOf(number), word, v);
  }

  /// Exchange::Begin in the node, whose buffers have to be mapped. All threads of the block.
  template <int kBuffers>
  __device__ bool Begin(const void* const (&mine)[kBuffers], char** here, uint32_t* flags) const {
    bool all_mapped;
    bool ok = exchange_.Begin(mine, here, flags, all_mapped);
    if (ok && !all_mapped && threadIdx.x == 0) {
      exchange_.Fail(Failure::kNotMapped, Phase::kPublished, exchange_.rank(), 0, 0);
    }
    ok &= all_mapped;
    if (!ok && threadIdx.x == 0) PassOnAbort();
    return ok;
  }
  /// Exchange::Finish in the node. All threads of all blocks.
  __device__ void Finish(uint32_t* flags) const {
    exchange_.Finish(flags, 2 * patience_ns());
    if (threadIdx.x == 0) PassOnAbort();
  }

  /// Waits until a word of own registered memory, which counts up, has reached `least`; acquires
  /// it. False if a rank gave up. All lanes, of which one polls.
  __device__ __noinline__ bool WaitFor(int64_t word, uint64_t least, Phase phase,
                                       int peer_number) const {
    bool came = true;
    if (threadIdx.x % 32 == 0) {
      const auto* const at = reinterpret_cast<const uint64_t*>(At(word));
      // By their difference: `least` may lie below zero.
      came = exchange_.Wait(
          [&] { return static_cast<int64_t>(ptx::ld_acquire_sys_u64(at) - least) >= 0; }, phase,
          RankOf(peer_number), patience_ns());
      if (!came) PassOnAbort();
    }
    came = __shfl_sync(~0u, came, 0);
    __syncwarp();  // lane 0's acquire, for all; a shuffle does not order memory
    return came;
  }
  /// Tells ranks on other nodes if this rank has given up, or has seen that another one did. One
  /// thread, at the end of every kernel, and wherever a wait was in vain.
  __device__ void PassOnAbort() const {
    const uint32_t word = ptx::ld_relaxed_sys_u32(&exchange_.control()->abort);
    if (word == 0 || exchange_.IsMasked(AbortWord::Reporter(word))) return;
    for (int other = 0; other < nodes().num_ranks; ++other) {
      if (nodes().NodeOf(other) == node_) continue;
      net_.PutControl(RankOf(other), static_cast<int64_t>(offsetof(Control, abort)), word);
    }
  }

 private:
  __device__ uint64_t patience_ns() const { return exchange_.deadline_ns() / 8; }
  __device__ void Release() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::fence_acq_rel_sys();
    __syncwarp();
  }

  const Context& context_;
  const Net& net_;
  Exchange& exchange_;
  const int node_;
};

/// A warp that runs one Stage, which has at most one output. All members: all lanes, whose state is
/// the same. `Derived` has what Stage asks for: Next, Outputs (by default the one there is) and
/// Work, which calls Wrote for the slot that it fills and has read its inputs when it returns;
/// and
///
///   const RingPlace& Input(int i) const      num_slots 0: there is none; if it has inputs
///   const RingPlace& Output(int o) const     if it has an output
///   void EndWrites()                  before slots are put: copies into them are complete
///
/// Slots of an op are as far apart as it needs, so that puts of several have no gaps: a SlotHeader,
/// its entries, from SlotHeaderBytes(top_k) on the row. A sender therefore begins with an empty
/// ring.
template <typename Derived, typename Net, int kInputs, int kOutputs>
class WarpStage {
  static_assert(kOutputs <= 1, "one output");

 public:
  /// `slot_bytes`: a multiple of 16, at most Config::slot_bytes (0: that), the same at both ends of
  /// a ring.
  __device__ WarpStage(Rank<Net>& rank, Direction direction, int64_t slot_bytes = 0)
      : rank_(rank),
        direction_(direction),
        slot_bytes_(slot_bytes > 0 ? slot_bytes : rank.config().slot_bytes),
        lane_(threadIdx.x % 32) {}

  /// To the end of the op. False: somebody gave up.
  __device__ bool Run() {
    if constexpr (kInputs > 0) {
      for (int i = 0; i < kInputs; ++i) {
        const RingPlace& ring = self().Input(i);
        if (ring.num_slots > 0) stage_.in[i].Begin(Word(ring.taken), ring.num_slots);
      }
    }
    if constexpr (kOutputs > 0) {
      const RingPlace& ring = self().Output(0);
      const uint64_t sent = Word(ring.sent);
      stage_.out[0].Begin(sent, ring.num_slots, ring.batch);
      if (!AwaitEmpty(ring, sent)) return false;
      stage_.out[0].credits = sent;
    }
    __syncwarp();  // lane 0 writes these words at the end
    for (Progress progress = Progress::kMoved; progress != Progress::kDone;) {
      progress = stage_.Step(self());
      if (progress == Progress::kWaits && !Wait()) return false;
    }
    if (lane_ == 0) StorePositions();
    return true;
  }

  // ---- for Stage ----

  __device__ uint64_t Arrived(int i, uint32_t slot) {
    if constexpr (kInputs > 0) return rank_.Load(self().Input(i).arrived + int64_t{slot} * 8);
    return 0;
  }
  __device__ void Free(int i, uint64_t tokens) {
    if constexpr (kInputs > 0) {
      const RingPlace& ring = self().Input(i);
      rank_.Add(ring.sender, ring.credits, tokens);
    }
  }
  __device__ uint64_t Credits(int o) {
    if constexpr (kOutputs > 0) return rank_.Load(self().Output(o).credits);
    return 0;
  }
  __device__ void HandOver(int o, uint64_t first, uint64_t end) {
    if constexpr (kOutputs > 0) {
      self().EndWrites();
      const RingPlace& ring = self().Output(o);
      const int64_t slot = stage_.out[o].FirstHeldSlot();
      // Slots lie next to each other; the last one goes as far as it is filled.
      const int64_t bytes = static_cast<int64_t>(end - first - 1) * slot_bytes_ + last_slot_bytes_;
      if constexpr (Net::kInPlace) {
        rank_.Signal(ring.receiver, ring.arrived + slot * 8, end);
      } else {
        rank_.Put(ring.receiver, ring.slots + slot * slot_bytes_, ring.staging + slot * slot_bytes_,
                  bytes, ring.arrived + slot * 8, end);
      }
      bytes_put_ += static_cast<unsigned long long>(bytes);
    }
  }
  __device__ void Outputs(Bits<kOutputs>& outputs) {
    if (kOutputs > 0) outputs.Set(0);
  }
  __device__ void EndWrites() {}

 protected:
  /// The slot of input i that Work reads.
  __device__ const char* InputSlot(int i) const {
    return rank_.At(self().Input(i).slots + int64_t{stage_.InputSlot(i)} * slot_bytes_);
  }
  /// The slot that Work writes: the receiver's, or in staging memory.
  __device__ char* OutputSlot() const {
    const RingPlace& ring = self().Output(0);
    const int64_t at = int64_t{stage_.OutputSlot(0)} * slot_bytes_;
    if constexpr (Net::kInPlace) return rank_.AtOther(ring.receiver, ring.slots + at);
    return rank_.At(ring.staging + at);
  }
  /// `num_bytes`: of the slot that Work has filled, a multiple of 16.
  __device__ void Wrote(int64_t num_bytes, bool has_row) {
    last_slot_bytes_ = num_bytes;
    tokens_put_ += has_row;
  }

  Rank<Net>& rank_;
  const Direction direction_;
  const int64_t slot_bytes_;
  const int lane_;

 private:
  /// Until the receiver has read what ops before have sent, which lies otherwise.
  __device__ bool AwaitEmpty(const RingPlace& ring, uint64_t sent) {
    return rank_.WaitFor(ring.credits, sent, Phase::kRingHead, ring.receiver);
  }
  __device__ Derived& self() { return *static_cast<Derived*>(this); }
  __device__ const Derived& self() const { return *static_cast<const Derived*>(this); }
  __device__ uint64_t& Word(int64_t offset) const {
    return *reinterpret_cast<uint64_t*>(rank_.At(offset));
  }
  /// Until what the stage waits for is there; the next step acquires it.
  __device__ bool Wait() {
    if constexpr (kInputs > 0) {
      if (stage_.phase == decltype(stage_)::kInputs) {
        const int i = stage_.ready;
        const RingPlace& ring = self().Input(i);
        return rank_.WaitFor(ring.arrived + int64_t{stage_.InputSlot(i)} * 8,
                             stage_.in[i].taken + 1, Phase::kRingTail, ring.sender);
      }
    }
    if constexpr (kOutputs > 0) {
      const SenderEnd& end = stage_.out[0];
      const RingPlace& ring = self().Output(0);
      return rank_.WaitFor(ring.credits, end.sent - end.num_slots + 1, Phase::kRingHead,
                           ring.receiver);
    }
    return true;
  }
  /// For the next op. One lane.
  __device__ void StorePositions() {
    if constexpr (kInputs > 0) {
      for (int i = 0; i < kInputs; ++i) {
        const RingPlace& ring = self().Input(i);
        if (ring.num_slots > 0) Word(ring.taken) = stage_.in[i].taken;
      }
    }
    if constexpr (kOutputs > 0) Word(self().Output(0).sent) = stage_.out[0].sent;
    const int way = static_cast<int>(direction_);
    if (tokens_put_ > 0) atomicAdd(&rank_.state()->tokens_put[way], tokens_put_);
    if (bytes_put_ > 0) atomicAdd(&rank_.state()->bytes_put[way], bytes_put_);
  }

  Stage<kInputs, kOutputs> stage_{};
  int64_t last_slot_bytes_ = 0;
  unsigned long long tokens_put_ = 0;
  unsigned long long bytes_put_ = 0;
};

}  // namespace wideep::two_hop
