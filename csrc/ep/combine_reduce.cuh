// combine, form reduce, for GPUs of their own: what crosses the link is one sum per token and rank
// rather than every row.
//
//   sums  the expert rank's warps add the rows of each token that lie there, weighted, in order of
//         k and in float32, and round the sum to the rows' type. It lies in `sums` at the place of
//         the first of the rows. Tokens with one row are left alone, and so are this rank's own.
//   pull  the home rank's warps read the sums, the rows that are alone at their rank, and the rows
//         of their own rank, and add them in order of (rank, k).
//
// Tokens are cut into chunks by their number, the same on all ranks. Each warp goes through
//   sums of chunk 0, sums of 1, pull of 0, sums of 2, pull of 1, ..
// so that one rank's sums are made while other chunks cross the link.
//
//   who writes  sums: the expert rank. sums_ready [src][chunk] in the home's arena: rank src, once
//               all its warps have done the chunk for all homes (sum_warps counts them).
//   who waits   a home's warps before they pull a chunk, for all ranks that take part. Sums of a
//               chunk come after pulls of earlier chunks only, so that nobody waits in a circle.
//   who resets  sums_ready holds the epoch: nobody. sum_warps: the last warp that counts. Until
//               Finish nobody uses `sums` for anything else.
//
// Memory order. A warp's sums, its barrier, an acquire-release count of warps, the last warp's
// barrier, its release at system scope; acquire by the lane that waits, then its warp's barrier.
//
// The chunks are found, in shared memory, before peers are there: FindChunks. The bytes that cross,
// and when they are fewer enough: _peer_transport.choose_forms.
#pragma once

#include "csrc/ep/arrivals.cuh"
#include "csrc/ep/combine_pull.cuh"
#include "csrc/ep/ring.cuh"

namespace wideep {

/// Whether `rank` is a peer that takes part.
__device__ __forceinline__ bool IsActivePeer(const Exchange& exchange, int rank) {
  return rank < exchange.num_ranks() && rank != exchange.rank() && !exchange.IsMasked(rank);
}

/// Fills in shared.chunk_begins of active peers. All warps; Begin's barriers come after.
__device__ inline void FindChunks(const CombineParams& p, const Exchange& exchange,
                                  CombineShared& shared) {
  const int num_places = p.num_chunks + 1;
  for (int i = threadIdx.x / 32; i < exchange.num_ranks() * num_places; i += kWarpsPerBlock) {
    const int src = i / num_places;
    const int chunk = i % num_places;
    if (!IsActivePeer(exchange, src)) continue;
    const SourceArrivals arrivals(p.plan, src, p.top_k);
    const int64_t token = TokensOfChannel(p.num_tokens, chunk, p.num_chunks).begin;
    const auto source = static_cast<int32_t>((src * p.num_tokens + token) * p.top_k);
    const int32_t begin = chunk == 0              ? arrivals.begin()
                          : chunk == p.num_chunks ? arrivals.end()
                                                  : arrivals.LowerBound(source);
    if (threadIdx.x % 32 == 0) shared.chunk_begins[src][chunk] = begin;
  }
}

/// This warp's part of a chunk's sums, for all homes. `first_warp`: the warp that has the first
/// window; moves on, so that all warps get the same number over the chunks.
template <DType kDType, bool kWeighted>
__device__ void SumChunk(const CombineParams& p, const Exchange& exchange,
                         const CombineShared& shared, int chunk, int32_t& first_warp,
                         SumList& list) {
  const int lane = threadIdx.x % 32;
  const auto warp = static_cast<int32_t>(blockIdx.x * kWarpsPerBlock + threadIdx.x / 32);
  const auto num_warps = static_cast<int32_t>(gridDim.x * kWarpsPerBlock);
  const int64_t row_bytes = p.hidden * static_cast<int64_t>(SizeOf(kDType));
  for (int src = 0; src < exchange.num_ranks(); ++src) {
    if (!IsActivePeer(exchange, src)) continue;
    const SourceArrivals arrivals(p.plan, shared.chunk_begins[src][chunk],
                                  shared.chunk_begins[src][chunk + 1], p.top_k);
    const int32_t stripe = warp - first_warp + (warp < first_warp ? num_warps : 0);
    first_warp = (first_warp + NumWindows(arrivals)) % num_warps;
    ForEachToken(arrivals, stripe, num_warps, [&](const Arrivals& a, uint32_t lanes, int leader) {
      const int count = __popc(lanes);
      if (count == 1) return;
      const int64_t first_row = __shfl_sync(~0u, a.row, leader);
      if ((lanes >> lane & 1) != 0) {
        list.rows[lane - leader] = p.y + a.row * row_bytes;
        list.weights[lane - leader] = kWeighted ? p.row_scalars[a.row] : 1.0f;
      }
      __syncwarp();
      // Few rows a token: more of each under way.
      SumRows<kDType, kWeighted, /*kColumns=*/3, /*kRows=*/4>(
          p.sums + first_row * row_bytes, list, count, 0, static_cast<int>(row_bytes), lane, 32);
      __syncwarp();  // the list is read
    });
  }
}

/// This warp has done its sums of the chunk; the last one tells the homes.
__device__ inline void CountChunk(const Exchange& exchange, int chunk) {
  const int lane = threadIdx.x % 32;
  auto* const count = exchange.In<uint32_t>(exchange.rank(), exchange.layout().sum_warps) + chunk;
  __syncwarp();
  uint32_t before = 0;
  if (lane == 0) before = ptx::atom_add_acq_rel_gpu_u32(count, 1);
  if (__shfl_sync(~0u, before, 0) != gridDim.x * kWarpsPerBlock - 1) return;
  if (lane == 0) *count = 0;
  __syncwarp();
  if (!IsActivePeer(exchange, lane)) return;
  auto* const ready = exchange.In<uint32_t>(lane, exchange.layout().sums_ready);
  ptx::st_release_sys_u32(&ready[exchange.rank() * kMaxSumChunks + chunk], exchange.epoch());
}

/// Waits until all ranks have summed the chunk. All lanes; false if a rank gave up.
__device__ inline bool AwaitChunk(Exchange& exchange, int chunk) {
  const int lane = threadIdx.x % 32;
  const auto* const ready =
      exchange.In<const uint32_t>(exchange.rank(), exchange.layout().sums_ready);
  const bool came = !IsActivePeer(exchange, lane) ||
                    exchange.Wait(
                        [&] {
                          return ptx::ld_acquire_sys_u32(&ready[lane * kMaxSumChunks + chunk]) ==
                                 exchange.epoch();
                        },
                        Phase::kSums, lane);
  const bool all_came = __all_sync(~0u, came);
  __syncwarp();
  return all_came;
}

template <DType kDType, bool kWeighted>
__device__ bool ReduceSums(const CombineParams& p, Exchange& exchange, CombineShared& shared,
                           SumList& list) {
  const int64_t num_warps = int64_t{gridDim.x} * kWarpsPerBlock;
  int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  int32_t first_warp = 0;
  for (int chunk = 0; chunk <= p.num_chunks; ++chunk) {
    if (chunk < p.num_chunks) {
      SumChunk<kDType, kWeighted>(p, exchange, shared, chunk, first_warp, list);
      CountChunk(exchange, chunk);
    }
    if (chunk == 0) continue;
    const int64_t end = TokensOfChannel(p.num_tokens, chunk - 1, p.num_chunks).end;
    if (token < end && !AwaitChunk(exchange, chunk - 1)) return false;
    for (; token < end; token += num_warps) {
      PullToken<kDType, kWeighted, /*kReduced=*/true>(p, exchange, shared.here, token, list);
    }
  }
  return true;
}

}  // namespace wideep
