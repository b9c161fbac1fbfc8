// CombineKernel and CombineGradKernel.
//
//   combine, pull   the home rank's warps read a token's rows wherever they lie and sum them.
//                   published: y, row_scalars.
//   combine, reduce the expert rank's warps sum a token's rows that lie there, and the home rank's
//                   read and add those sums: combine_reduce.cuh.
//   combine, push   the expert rank's warps sum a token's rows that lie there and send one row
//                   through the ring to the token's home; a group of warps there adds what comes
//                   from each rank, in order of rank. Also the way for buffers that are not mapped.
//   combine_grad    the expert rank's warps read a token's dout from its home, once, and make dy
//                   and the dot product of each of its rows. published: dout.
//
// A plan may be older than the mask: selections of masked ranks are skipped as if they were
// dropped, and the gradients of rows whose home is masked are zero.
#pragma once

#include "csrc/ep/arrivals.cuh"
#include "csrc/ep/combine_pull.cuh"
#include "csrc/ep/combine_reduce.cuh"
#include "csrc/ep/ring.cuh"
#include "csrc/ep/zero_tail.cuh"

namespace wideep {

// ---- push ----

/// Sums the rows of one token, whose pieces stream through shared memory, and copies the sum into a
/// slot. Lane i < count has row i and its weight.
template <DType kDType, bool kWeighted>
class SumSender {
 public:
  static constexpr int kPieceBytes = 2048;
  static constexpr int kNumOutputs = 2;
  static constexpr int kNumInputs =
      static_cast<int>(CombineShared::kBytesPerWarp / kPieceBytes) - kNumOutputs;

  /// `buffer`: CombineShared::kBytesPerWarp of this warp; `barriers`: kNumInputs of them.
  __device__ SumSender(char* buffer, uint64_t* barriers)
      : inputs_(buffer, barriers, kPieceBytes, kNumInputs),
        outputs_(buffer + kNumInputs * kPieceBytes),
        lane_(threadIdx.x % 32) {}

  /// `before_first_store()` runs once the first piece is summed.
  template <typename BeforeFirstStore>
  __device__ void Sum(const char* own_row, float own_weight, int count, int row_bytes, char* to,
                      BeforeFirstStore before_first_store) {
    constexpr int kColumns = kPieceBytes / 512;
    const int num_pieces = (row_bytes + kPieceBytes - 1) / kPieceBytes;
    int load_row = 0;
    int load_piece = 0;
    const auto load_next = [&] {
      if (load_piece == num_pieces) return;
      const auto* row = reinterpret_cast<const char*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(own_row), load_row));
      const int at = load_piece * kPieceBytes;
      inputs_.Load(row + at, min(kPieceBytes, row_bytes - at));
      if (++load_row == count) {
        load_row = 0;
        ++load_piece;
      }
    };
    for (int i = 1; i < kNumInputs; ++i) load_next();

    for (int piece = 0; piece < num_pieces; ++piece) {
      const int bytes = min(kPieceBytes, row_bytes - piece * kPieceBytes);
      float sum[kColumns][kVectorElems<kDType>] = {};
      for (int i = 0; i < count; ++i) {
        load_next();
        const float weight = kWeighted ? __shfl_sync(~0u, own_weight, i) : 1.0f;
        inputs_.Wait();
        const char* data = inputs_.Data();
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int at = (lane_ + 32 * c) * 16;
          if (at < bytes) {
            AddTerm<kDType, kWeighted>(*reinterpret_cast<const int4*>(data + at), weight, sum[c]);
          }
        }
        inputs_.Drop();
      }
      if (piece == 0) before_first_store();
      // The store before the last one has read its buffer.
      if (lane_ == 0) ptx::cp_async_bulk_wait_group_read<kNumOutputs - 1>();
      __syncwarp();
      char* const output = outputs_ + num_stored_++ % kNumOutputs * kPieceBytes;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int at = (lane_ + 32 * c) * 16;
        if (at < bytes) *reinterpret_cast<int4*>(output + at) = Pack<kDType>(sum[c]);
      }
      ptx::fence_proxy_async_shared_cta();
      __syncwarp();
      if (lane_ == 0) {
        ptx::cp_async_bulk_store_cache_hint(to + piece * kPieceBytes, ptx::SharedAddress(output),
                                            bytes, evict_last_);
        ptx::cp_async_bulk_commit_group();
      }
    }
  }

 private:
  BulkPipe inputs_;
  char* const outputs_;
  const int lane_;
  const uint64_t evict_last_ = ptx::createpolicy_l2_evict_last();
  uint32_t num_stored_ = 0;
};

/// The expert rank's end: one warp, one ring, the tokens of `home` in the channel.
template <DType kDType, bool kWeighted>
__device__ bool SendSums(const CombineParams& p, Exchange& exchange, const RingRole& role, int home,
                         int channel, CombineShared& shared) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto row_bytes = static_cast<int>(p.hidden * static_cast<int64_t>(SizeOf(kDType)));
  const int64_t header_bytes = RingHeaderBytes(p.top_k);
  RingSender ring(exchange, home, channel, header_bytes + row_bytes);
  SumSender<kDType, kWeighted> sender(shared.buffer(warp),
                                      shared.barriers + warp * CombineShared::kBarriersPerWarp);
  const TokenRange range = TokensOfChannel(p.num_tokens, channel, role.num_channels);
  const SourceArrivals arrivals(p.plan, home, p.top_k);
  const auto first_source = [&](int64_t token) {
    return static_cast<int32_t>((home * p.num_tokens + token) * p.top_k);
  };
  const int32_t end = arrivals.LowerBound(first_source(range.end));
  int32_t at = arrivals.LowerBound(first_source(range.begin));
  // All rows of a token: at most top_k, so the 32 that begin with its first hold them.
  Arrivals next = arrivals.At(at);
  while (at < end) {
    const Arrivals now = next;
    const int32_t token = __shfl_sync(~0u, now.token, 0);
    const int count = __popc(__ballot_sync(~0u, now.token == token));
    at += count;
    next = arrivals.At(at);  // early: two dependent loads
    const float scalar = lane < count ? p.row_scalars[now.row] : 0;
    RingHeader* slot = ring.Slot();
    if (slot == nullptr) return false;
    if (lane < count) {
      slot->words()[lane] = now.source % p.top_k;
      slot->words()[p.top_k + lane] = __float_as_int(scalar);
    }
    if (lane == 0) slot->num_rows = count;
    sender.Sum(p.y + max(now.row, 0) * int64_t{row_bytes}, scalar, count, row_bytes,
               reinterpret_cast<char*>(slot) + header_bytes,
               // The token before: its copies have had the time of this one's first piece.
               [&] { ring.Flush(); });
    ring.Defer();
  }
  ring.Flush();
  return true;
}

/// The home rank's end: a group of warps takes the tokens of a channel one after the other; lane r
/// of each warp follows the ring from rank r.
template <DType kDType, bool kWeighted>
__device__ bool ReceiveSums(const CombineParams& p, Exchange& exchange, const RingRole& role,
                            SumList& list) {
  constexpr int kGroupThreads = 32 * kWarpsPerGroup;
  const int lane = threadIdx.x % 32;
  const int group = threadIdx.x / kGroupThreads;
  const int channel = role.block * kCombineGroupsPerBlock + group;
  if (channel >= role.num_channels) return true;
  const int num_ranks = exchange.num_ranks();
  const int64_t row_bytes = p.hidden * static_cast<int64_t>(SizeOf(kDType));
  const int64_t header_bytes = RingHeaderBytes(p.top_k);
  const bool first_warp = threadIdx.x % kGroupThreads < 32;
  const bool frees = first_warp && lane < num_ranks && !exchange.IsMasked(lane);
  const TokenRange range = TokensOfChannel(p.num_tokens, channel, role.num_channels);
  RingReceiver ring(exchange, lane < num_ranks ? lane : 0, channel, header_bytes + row_bytes);

  for (int64_t token = range.begin; token < range.end; ++token) {
    const int64_t s = token * p.top_k + lane;
    const int32_t dst = lane < p.top_k ? HostOf(p.plan, s, exchange) : -1;
    const uint32_t ranks = __reduce_or_sync(~0u, dst >= 0 ? 1u << dst : 0u);
    if (!kWeighted && first_warp && lane < p.top_k && dst < 0) p.dweights[s] = 0;
    const bool sends = ranks >> lane & 1;
    const bool came = !sends || ring.Wait();
    if (!__all_sync(~0u, came)) return false;
    // One token late: by now its sums are written, and the release need not wait for them.
    if (frees) ring.Free();
    if (sends) {
      const RingHeader* slot = ring.Slot();
      list.rows[__popc(ranks & ((1u << lane) - 1))] =
          reinterpret_cast<const char*>(slot) + header_bytes;
      if (!kWeighted && first_warp) {
        for (int i = 0; i < slot->num_rows; ++i) {
          p.dweights[token * p.top_k + slot->words()[i]] =
              __int_as_float(slot->words()[p.top_k + i]);
        }
      }
    }
    __syncwarp();
    SumRows<kDType, /*kWeighted=*/false>(p.out + token * row_bytes, list, __popc(ranks), 0,
                                         static_cast<int>(row_bytes), threadIdx.x % kGroupThreads,
                                         kGroupThreads);
    // All warps of the group have read the slots.
    ptx::bar_sync(1 + group, kGroupThreads);
    if (sends) ring.Pop(/*frees=*/false);
  }
  // A group without tokens meets no barrier: its other warps may still read the count.
  if (frees && range.begin < range.end) {
    ring.Free();
    ring.Store();
  }
  return true;
}

template <DType kDType, bool kWeighted>
__device__ bool PushSums(const CombineParams& p, Exchange& exchange, CombineShared& shared,
                         SumList& list) {
  const RingRole role(exchange.num_ranks());
  if (!role.sends) return ReceiveSums<kDType, kWeighted>(p, exchange, role, list);
  const int home = role.Warp() % exchange.num_ranks();
  const int channel = role.Warp() / exchange.num_ranks();
  if (channel >= role.num_channels || exchange.IsMasked(home)) return true;
  return SendSums<kDType, kWeighted>(p, exchange, role, home, channel, shared);
}

/// What a masked rank gets.
template <bool kWeighted>
__device__ void ZeroOutputs(const CombineParams& p, int64_t row_bytes) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = thread * 16; at < p.num_tokens * row_bytes; at += num_threads * 16) {
    ptx::st_global_v4(p.out + at, make_int4(0, 0, 0, 0));
  }
  if constexpr (!kWeighted) {
    for (int64_t s = thread; s < p.num_tokens * p.top_k; s += num_threads) p.dweights[s] = 0;
  }
}

template <DType kDType, bool kWeighted>
__global__ void __launch_bounds__(kCombineThreads, 1)
    CombineKernel(const __grid_constant__ CombineParams p) {
  CombineShared& shared = *reinterpret_cast<CombineShared*>(DynamicShared());
  SumList& list = shared.list(threadIdx.x / 32);
  Exchange exchange(p.peers, kWeighted ? ExchangeOp::kCombine : ExchangeOp::kDispatchGrad);
  if (!exchange.takes_part()) {
    return ZeroOutputs<kWeighted>(p, p.hidden * static_cast<int64_t>(SizeOf(kDType)));
  }
  const bool reduces = p.form == CombineForm::kReduce;
  if (reduces) FindChunks(p, exchange, shared);
  const void* mine[3] = {p.y, p.row_scalars, reduces ? p.sums : p.y};
  bool all_mapped;
  if (!exchange.Begin(mine, shared.here, shared.flags, all_mapped)) return;
  if (all_mapped && reduces) {
    if (!ReduceSums<kDType, kWeighted>(p, exchange, shared, list)) return;
  } else if (all_mapped && p.form == CombineForm::kPull) {
    PullSums<kDType, kWeighted>(p, exchange, shared.here, list);
  } else if (!PushSums<kDType, kWeighted>(p, exchange, shared, list)) {
    return;
  }
  exchange.Finish(shared.flags);
}

// ---- combine's backward pass ----

/// A row of combine's gradient, wherever it lies.
struct GradRow {
  const char* y;
  char* dy;
  float* dot;
  float weight;
};
__device__ __forceinline__ GradRow OwnGradRow(const CombineGradParams& p, int32_t row,
                                              int64_t row_bytes) {
  return {p.y + row * row_bytes, p.dy + row * row_bytes, p.drow_weights + row, p.row_weights[row]};
}

template <typename T>
__device__ __forceinline__ T* PointerOfLane(T* pointer, int lane) {
  return reinterpret_cast<T*>(
      __shfl_sync(~0u, reinterpret_cast<unsigned long long>(pointer), lane));
}

/// dy and the dot product of each row of one token, kRowsAtOnce at a time. Each of `lanes` brings a
/// row.
template <DType kDType>
__device__ __forceinline__ void ScaleAndDot(const char* dout, int64_t row_bytes, const GradRow& own,
                                            uint32_t lanes) {
  constexpr int kRowsAtOnce = 2;
  constexpr int kColumns = 4;
  constexpr int kElems = kVectorElems<kDType>;
  const int lane = threadIdx.x % 32;
  while (lanes != 0) {
    int of_lane[kRowsAtOnce];  // -1: none
    const char* y_row[kRowsAtOnce];
    char* dy_row[kRowsAtOnce];
    float weight[kRowsAtOnce];
    float dot[kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      of_lane[i] = __ffs(static_cast<int>(lanes)) - 1;
      lanes &= lanes - 1;
      const int from = max(of_lane[i], 0);
      y_row[i] = PointerOfLane(own.y, from);
      dy_row[i] = PointerOfLane(own.dy, from);
      weight[i] = __shfl_sync(~0u, own.weight, from);
    }
    for (int64_t at = lane * 16; at < row_bytes; at += kColumns * 512) {
      int4 dout_bits[kColumns];
      int4 y_bits[kRowsAtOnce][kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (at + c * 512 >= row_bytes) continue;
        dout_bits[c] = ptx::ld_global_no_allocate_v4(dout + at + c * 512);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (of_lane[i] >= 0) {
            y_bits[i][c] = ptx::ld_global_no_allocate_v4(y_row[i] + at + c * 512);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (at + c * 512 >= row_bytes) continue;
        float d[kElems];
        Unpack<kDType>(dout_bits[c], d);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (of_lane[i] < 0) continue;
          float y[kElems];
          Unpack<kDType>(y_bits[i][c], y);
          float scaled[kElems];
#pragma unroll
          for (int e = 0; e < kElems; ++e) {
            dot[i] += y[e] * d[e];
            scaled[e] = __fmul_rn(weight[i], d[e]);
          }
          ptx::st_global_v4(dy_row[i] + at + c * 512, Pack<kDType>(scaled));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) dot[i] += __shfl_xor_sync(~0u, dot[i], step);
      if (lane == of_lane[i]) *own.dot = dot[i];
    }
  }
}

template <DType kDType>
__device__ void PullDouts(const CombineGradParams& p, const Exchange& exchange, char* const* dout) {
  const int lane = threadIdx.x % 32;
  const int num_ranks = p.peers.num_ranks;
  const int warp = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  const int warps_per_source = gridDim.x * kWarpsPerBlock / num_ranks;
  const int src = warp % num_ranks;
  const int stripe = warp / num_ranks;
  if (stripe >= warps_per_source || exchange.IsMasked(src)) return;
  const int64_t row_bytes = p.hidden * static_cast<int64_t>(SizeOf(kDType));
  const SourceArrivals arrivals(p.plan, src, p.top_k);
  ForEachToken(arrivals, stripe, warps_per_source,
               [&](const Arrivals& a, uint32_t lanes, int leader) {
                 const int64_t token = __shfl_sync(~0u, a.token, leader) - src * p.num_tokens;
                 const bool mine = lanes >> lane & 1;
                 ScaleAndDot<kDType>(dout[src] + token * row_bytes, row_bytes,
                                     mine ? OwnGradRow(p, a.row, row_bytes) : GradRow(), lanes);
               });
}

template <DType kDType>
__device__ bool DoutsThroughRings(const CombineGradParams& p, Exchange& exchange, BulkPipe& pipe) {
  const int lane = threadIdx.x % 32;
  const int64_t row_bytes = p.hidden * static_cast<int64_t>(SizeOf(kDType));
  const RingTokens tokens{p.num_tokens, p.top_k,   p.plan.dest_rank, p.plan.dest_row,
                          p.dout,       row_bytes, nullptr};
  return SendTokensThroughRings(
      exchange, tokens, nullptr, &pipe,
      [&](const RingHeader& header, const char* dout, int, auto free_slot) {
        const int32_t num_rows = header.num_rows;
        const int32_t row = header.words()[min(lane, num_rows - 1)];
        ScaleAndDot<kDType>(dout, row_bytes, OwnGradRow(p, row, row_bytes), (1u << num_rows) - 1);
        free_slot();
      });
}

template <DType kDType>
__global__ void __launch_bounds__(kCombineThreads, 1)
    CombineGradKernel(const __grid_constant__ CombineGradParams p) {
  CombineShared& shared = *reinterpret_cast<CombineShared*>(DynamicShared());
  Exchange exchange(p.peers, ExchangeOp::kCombineGrad);
  const int64_t row_bytes = p.hidden * static_cast<int64_t>(SizeOf(kDType));
  if (!exchange.takes_part()) {
    return ZeroRows(p.plan, p.zero_tail, p.dy, p.drow_weights, p.capacity, row_bytes);
  }
  const void* mine[1] = {p.dout};
  bool all_mapped;
  if (!exchange.Begin(mine, shared.here, shared.flags, all_mapped)) return;
  if (all_mapped) {
    PullDouts<kDType>(p, exchange, shared.here);
  } else {
    const int warp = threadIdx.x / 32;
    BulkPipe pipe(shared.buffer(warp), shared.barriers + warp * CombineShared::kBarriersPerWarp,
                  static_cast<int>(CombineShared::kBytesPerWarp), 1);
    if (!DoutsThroughRings<kDType>(p, exchange, pipe)) return;
  }
  if (p.zero_tail) ZeroTail(p.dy, p.drow_weights, *p.plan.num_rows, p.capacity, row_bytes);
  ZeroMaskedRows(exchange, p.plan, p.dy, p.drow_weights, row_bytes);
  exchange.Finish(shared.flags);
}

}  // namespace wideep
