// DispatchKernel: rows go to their places in expert order, in the peers' own buffers.
//
//   push   who writes: the source rank's warps, each row of a token to all its places.
//          published: rows, row_weights.
//   pull   who writes: the destination rank's warps; they read each token's row once from its home.
//          published: x, weights.
//   rings  where a published buffer is not mapped: see ring.cuh.
//
// A plan may be older than the mask: its selections of masked ranks are skipped, and rows that a
// masked rank would have sent are zero.
//
// Nobody waits for single rows: Finish orders everything (exchange_protocol.cuh).
#pragma once

#include "csrc/ep/arrivals.cuh"
#include "csrc/ep/dispatch.h"
#include "csrc/ep/dispatch_shared.cuh"
#include "csrc/ep/ring.cuh"
#include "csrc/ep/zero_tail.cuh"

namespace wideep {

/// Each token of this rank: its row into shared memory, and from there to all its places.
__device__ inline void PushRows(const DispatchParams& p, const Exchange& exchange,
                                char* const* rows, float* const* row_weights, BulkPipe& pipe) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  const int64_t num_warps = int64_t{gridDim.x} * kWarpsPerBlock;
  const auto pieces = static_cast<int>((p.row_bytes + p.piece_bytes - 1) / p.piece_bytes);
  const auto bytes_of = [&](int piece) {
    return static_cast<uint32_t>(
        min(int64_t{p.piece_bytes}, p.row_bytes - int64_t{piece} * p.piece_bytes));
  };

  int64_t load_token = warp;
  int load_piece = 0;
  const auto load_next = [&] {
    if (load_token >= p.num_tokens) return;
    pipe.Load(p.x + load_token * p.row_bytes + int64_t{load_piece} * p.piece_bytes,
              bytes_of(load_piece));
    if (++load_piece == pieces) {
      load_piece = 0;
      load_token += num_warps;
    }
  };
  for (int i = 1; i < pipe.num_stages(); ++i) load_next();

  for (int64_t token = warp; token < p.num_tokens; token += num_warps) {
    char* to = nullptr;
    if (lane < p.top_k) {
      const int64_t s = token * p.top_k + lane;
      const int32_t dst = p.plan.dest_rank[s];
      if (dst >= 0 && !exchange.IsMasked(dst)) {
        const int64_t row = p.plan.dest_row[s];
        to = rows[dst] + row * p.row_bytes;
        row_weights[dst][row] = p.weights[s];
      }
    }
    for (int piece = 0; piece < pieces; ++piece) {
      load_next();
      pipe.Wait();
      if (to != nullptr) pipe.Store(to + int64_t{piece} * p.piece_bytes, bytes_of(piece));
      pipe.Release();
    }
  }
}

/// Each token that has rows here: its row from its home into shared memory, and to all of them.
__device__ inline void PullRows(const DispatchParams& p, const Exchange& exchange,
                                const char* const* x, const float* const* weights, BulkPipe& pipe) {
  const int lane = threadIdx.x % 32;
  const int num_ranks = p.peers.num_ranks;
  const int warp = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  const int warps_per_source = gridDim.x * kWarpsPerBlock / num_ranks;
  const int src = warp % num_ranks;
  const int stripe = warp / num_ranks;
  if (stripe >= warps_per_source || exchange.IsMasked(src)) return;
  const auto pieces = static_cast<int>((p.row_bytes + p.piece_bytes - 1) / p.piece_bytes);
  const int32_t first_source = static_cast<int32_t>(src * p.num_tokens * p.top_k);

  const SourceArrivals arrivals(p.plan, src, p.top_k);
  ForEachToken(
      arrivals, stripe, warps_per_source, [&](const Arrivals& a, uint32_t lanes, int leader) {
        const bool mine = lanes >> lane & 1;
        const int64_t token = __shfl_sync(~0u, a.token, leader) - src * p.num_tokens;
        const char* from = x[src] + token * p.row_bytes;
        if (mine) p.row_weights[a.row] = weights[src][a.source - first_source];
        for (int piece = 0; piece < pieces + pipe.num_stages() - 1; ++piece) {
          const auto bytes_of = [&](int i) {
            return static_cast<uint32_t>(
                min(int64_t{p.piece_bytes}, p.row_bytes - int64_t{i} * p.piece_bytes));
          };
          if (piece < pieces) pipe.Load(from + int64_t{piece} * p.piece_bytes, bytes_of(piece));
          const int out = piece - (pipe.num_stages() - 1);
          if (out < 0) continue;
          pipe.Wait();
          if (mine) {
            pipe.Store(p.rows + a.row * p.row_bytes + int64_t{out} * p.piece_bytes, bytes_of(out));
          }
          pipe.Release();
        }
      });
}

__device__ inline bool DispatchThroughRings(const DispatchParams& p, Exchange& exchange,
                                            BulkPipe& pipe) {
  const int lane = threadIdx.x % 32;
  const RingTokens tokens{p.num_tokens,
                          p.top_k,
                          p.plan.dest_rank,
                          p.plan.dest_row,
                          p.x,
                          p.row_bytes,
                          reinterpret_cast<const int32_t*>(p.weights)};
  return SendTokensThroughRings(
      exchange, tokens, nullptr, &pipe,
      [&](const RingHeader& header, const char* row, int, auto free_slot) {
        char* to = nullptr;
        if (lane < header.num_rows) {
          const int64_t place = header.words()[lane];
          p.row_weights[place] = __int_as_float(header.words()[p.top_k + lane]);
          to = p.rows + place * p.row_bytes;
        }
        for (int64_t at = 0; at < p.row_bytes; at += pipe.piece_bytes()) {
          const auto bytes =
              static_cast<uint32_t>(min(int64_t{pipe.piece_bytes()}, p.row_bytes - at));
          pipe.Load(row + at, bytes);
          pipe.Wait();
          if (at + bytes == p.row_bytes) free_slot();
          if (to != nullptr) pipe.Store(to + at, bytes);
          pipe.Release();
        }
      });
}

__global__ void __launch_bounds__(kDispatchThreads, 1)
    DispatchKernel(const __grid_constant__ DispatchParams p) {
  DispatchShared& shared = *reinterpret_cast<DispatchShared*>(DynamicShared());
  Exchange exchange(p.peers, ExchangeOp::kDispatch);
  if (!exchange.takes_part()) {
    return ZeroRows(p.plan, p.zero_tail, p.rows, p.row_weights, p.capacity, p.row_bytes);
  }
  const bool push = p.form == DispatchForm::kPush;
  const void* mine[2] = {push ? static_cast<const void*>(p.rows) : p.x,
                         push ? static_cast<const void*>(p.row_weights) : p.weights};
  bool all_mapped;
  if (!exchange.Begin(mine, shared.here, shared.flags, all_mapped)) return;

  const int warp = threadIdx.x / 32;
  char* const buffers = shared.buffers(warp, int64_t{p.num_stages} * p.piece_bytes);
  uint64_t* const barriers = shared.barriers + warp * kMaxStages;
  if (all_mapped) {
    BulkPipe pipe(buffers, barriers, p.piece_bytes, p.num_stages);
    if (push) {
      PushRows(p, exchange, shared.here, reinterpret_cast<float* const*>(shared.here + kMaxRanks),
               pipe);
    } else {
      PullRows(p, exchange, shared.here,
               reinterpret_cast<const float* const*>(shared.here + kMaxRanks), pipe);
    }
  } else {
    BulkPipe pipe(buffers, barriers, p.num_stages * p.piece_bytes, 1);
    if (!DispatchThroughRings(p, exchange, pipe)) return;
  }
  if (p.zero_tail) {
    ZeroTail(p.rows, p.row_weights, *p.plan.num_rows, p.capacity, p.row_bytes);
  }
  ZeroMaskedRows(exchange, p.plan, p.rows, p.row_weights, p.row_bytes);
  exchange.Finish(shared.flags);
}

}  // namespace wideep
