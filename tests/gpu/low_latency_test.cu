// The low-latency kernels with virtual ranks on one GPU: against the host's, and replayed from a
// captured graph with routing that changes every time.
#include <cuda_bf16.h>

#include <vector>

#include "tests/gpu/cuda_machine.h"
#include "tests/kernels/low_latency_interleaved.h"
#include "tests/kernels/relayed_low_latency.h"

namespace wideep {
namespace testing {
namespace {

using Ranks = VirtualRanks<CudaMachine>;

TEST(Quantize) {
  RunQuantize<CudaMachine>(1, 9, 512);
  RunQuantize<CudaMachine>(2, 300, 7168);
}

// Small, for compute-sanitizer: every wire and both forms, whole and in halves.
TEST(TwoRanksEveryWire) {
  for (const bool once_per_rank : {true, false}) {
    GroupSettings group;
    group.num_ranks = 2;
    group.num_experts = 8;
    group.num_sms = 2;
    group.chunk = 4;
    group.once_per_rank = once_per_rank;
    group.deadline_s = 1e9;
    Ranks ranks(group);
    Random random(3);
    for (int wire = 0; wire < 3; ++wire) {
      LowLatencyCase c;
      c.quantize = wire > 0;
      c.dequantize = wire == 1;
      if (!RunLowLatencyCase(ranks, c, random)) return;
      if (!RunOverlappedHalves(ranks, c, 3, random)) return;
    }
  }
}

// Sizes are small because the host computes everything too.
TEST(RandomShapes) { RunRandomLowLatency<CudaMachine>(40, 100, 24, 1024, 8, 0); }

TEST(RandomShapesWithDelays) { RunRandomLowLatency<CudaMachine>(20, 1000, 16, 512, 8, 200); }

TEST(RandomMasks) { RunMaskedLowLatency<CudaMachine>(30, 700, 16, 512, 8, 0); }

TEST(RandomMasksWithDelays) { RunMaskedLowLatency<CudaMachine>(10, 2700, 8, 256, 8, 200); }

TEST(Lopsided) { RunLopsidedLowLatency<CudaMachine>(8); }

TEST(VirtualNodes) {
  uint64_t seed = 0;
  for (const int node_size : {4, 2, 3, 1}) {
    GroupSettings group;
    group.num_ranks = 8;
    group.num_experts = 32;
    group.num_sms = 4;
    group.chunk = 16;
    group.deadline_s = 5;
    RunVirtualNodes<CudaMachine>(group, node_size, ++seed);
  }
}

GroupSettings EightRanks(bool once_per_rank) {
  GroupSettings group;
  group.num_ranks = 8;
  group.num_experts = 64;
  group.top_k = 8;
  group.num_sms = 16;
  group.chunk = 32;
  group.max_row_bytes = 2 * 7168;
  group.pool_bytes = 512 << 20;
  group.once_per_rank = once_per_rank;
  return group;
}

TEST(LargeRows) {
  for (const bool once_per_rank : {true, false}) {
    GroupSettings group = EightRanks(once_per_rank);
    group.num_experts = 32;
    group.chunk = 8;
    Ranks ranks(group);
    Random random(4);
    for (int wire = once_per_rank ? 0 : 2; wire < 3; ++wire) {
      for (const int64_t num_tokens : {1, 8}) {
        LowLatencyCase c;
        c.hidden = 7168;
        c.num_tokens = num_tokens;
        c.quantize = wire > 0;
        c.dequantize = wire == 1;
        if (!RunLowLatencyCase(ranks, c, random)) return;
      }
    }
  }
}

TEST(OverlappedHalvesWithDelays) {
  for (const bool once_per_rank : {true, false}) {
    GroupSettings group = EightRanks(once_per_rank);
    group.chunk = 16;
    Ranks ranks(group);
    Random random(5);
    LowLatencyCase c;
    c.hidden = 512;
    c.num_tokens = 16;
    c.zero_tail = false;
    c.delay_us = 100;
    if (!RunOverlappedHalves(ranks, c, 50, random)) return;
    if (!RunDispatchHalvesAlone(ranks, c, 50, random)) return;
    if (!RunInterleaved(ranks, c, 50, random)) return;
  }
}

TEST(MissingRankIsNamed) {
  GroupSettings group = EightRanks(true);
  group.deadline_s = 0.2;
  Ranks ranks(group);
  // All memory first: it waits for the device, where a launched rank waits for the others.
  std::vector<LowLatencyDispatchParams> params(8);
  for (int rank = 0; rank < 8; ++rank) {
    LowLatencyDispatchParams& p = params[rank];
    p.peers = ranks.context(rank);
    p.tokens = {2, 8, group.num_experts, 128};
    p.zero_tail = false;
    p.x = ranks.Take<char>(rank, 2 * 256);
    p.topk_idx = ranks.TakeCopy(
        rank, std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
    p.rows = ranks.Take<char>(rank, 8 * 256 * 256);
    p.counts = ranks.Take<int32_t>(rank, 8);
    p.row_source = ranks.Take<int32_t>(rank, 8 * 256);
  }
  for (int rank = 0; rank < 8; ++rank) {
    if (rank != 5) CHECK(LaunchLowLatencyDispatch(params[rank], ranks.stream(rank)).ok());
  }
  CHECK(ranks.machine().Synchronize());
  for (int rank = 0; rank < 8; ++rank) {
    if (rank == 5) continue;
    const std::string text = Describe(ranks.record(rank), group.deadline_s, group.top_k);
    CHECK_EQ(ranks.record(rank).failure, static_cast<uint32_t>(Failure::kDeadline));
    CHECK_CONTAINS(text, "ll_dispatch: ");
    CHECK_CONTAINS(text, "for rank 5 to send its counts");
  }
}

// ---- replays: inputs are made on the device, anew in every step, and results checked there ----

__host__ __device__ uint32_t Mix(uint32_t a, uint32_t b, uint32_t c) {
  uint64_t z = (uint64_t{a} << 40) + (uint64_t{b} << 16) + c + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

struct ReplayParams {
  int rank;
  int num_ranks;
  int num_tokens;
  int top_k;
  int num_experts;
  int hidden;
  int rows_per_expert;
  uint32_t* step;
  __nv_bfloat16* x;
  int32_t* topk_idx;
  float* weights;
  const __nv_bfloat16* rows;
  const int32_t* counts;
  const int32_t* row_source;
  const __nv_bfloat16* out;
  unsigned int* num_wrong;

  /// Distinct for the ks of a token; some masked, some tokens with none.
  __device__ int Expert(int src, int token, int k, uint32_t at_step) const {
    const uint32_t start = Mix(src, token, at_step);
    if (start % 7 == 0 || Mix(start, k, 1) % 9 == 0) return -1;
    return static_cast<int>((start / 7 + k * (1 + 2 * (start % 3))) % num_experts);
  }
  /// Whole numbers that bfloat16 holds exactly.
  __device__ float Value(int src, int token, int column, uint32_t at_step) const {
    return static_cast<float>((Mix(src, token, at_step) / 11 + column) % 256);
  }
  __device__ float Weight(int k) const { return 1.0f / (1 << k % 3); }
};

__global__ void MakeInputsKernel(ReplayParams p) {
  const uint32_t step = *p.step;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int num_threads = gridDim.x * blockDim.x;
  for (int s = thread; s < p.num_tokens * p.top_k; s += num_threads) {
    p.topk_idx[s] = p.Expert(p.rank, s / p.top_k, s % p.top_k, step);
    p.weights[s] = p.Weight(s % p.top_k);
  }
  for (int i = thread; i < p.num_tokens * p.hidden; i += num_threads) {
    p.x[i] = __float2bfloat16(p.Value(p.rank, i / p.hidden, i % p.hidden, step));
  }
}

/// A thread block for each local expert, then one for each token.
__global__ void CheckResultsKernel(ReplayParams p) {
  const uint32_t step = *p.step;
  const int local_experts = p.num_experts / p.num_ranks;
  const auto check = [&](bool right) {
    if (!right) atomicAdd(p.num_wrong, 1u);
  };
  if (static_cast<int>(blockIdx.x) < local_experts) {
    const int e = blockIdx.x;
    int row = e * p.rows_per_expert;
    for (int src = 0; src < p.num_ranks; ++src) {
      for (int s = 0; s < p.num_tokens * p.top_k; ++s) {
        const int token = s / p.top_k;
        if (p.Expert(src, token, s % p.top_k, step) != p.rank * local_experts + e) continue;
        check(p.row_source[row] == src * p.num_tokens * p.top_k + s);
        for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
          const float value = __bfloat162float(p.rows[int64_t{row} * p.hidden + i]);
          check(value == p.Value(src, token, i, step));
        }
        ++row;
      }
    }
    check(p.counts[e] == row - e * p.rows_per_expert);
    for (int i = row + threadIdx.x; i < (e + 1) * p.rows_per_expert; i += blockDim.x) {
      check(p.row_source[i] == -1);
    }
    return;
  }
  const int token = blockIdx.x - local_experts;
  for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    float sum = 0;
    for (int k = 0; k < p.top_k; ++k) {
      if (p.Expert(p.rank, token, k, step) >= 0) {
        sum += p.Weight(k) * p.Value(p.rank, token, i, step);  // exact, in any order
      }
    }
    check(__bfloat162float(p.out[token * p.hidden + i]) == __bfloat162float(__float2bfloat16(sum)));
  }
}

__global__ void NextStepKernel(uint32_t* step) { ++*step; }

void ReplayGraphs(bool once_per_rank, bool halves, int replays) {
  GroupSettings group = EightRanks(once_per_rank);
  group.max_row_bytes = 1024;
  group.num_sms = 8;
  group.deadline_s = 20;
  Ranks ranks(group);
  constexpr int kTokens = 16;
  constexpr int kHidden = 512;
  const int rows_per_expert = static_cast<int>(group.num_ranks * group.chunk);
  const int local_experts = group.num_experts / group.num_ranks;
  std::vector<cudaGraphExec_t> graphs(group.num_ranks);
  std::vector<unsigned int*> num_wrong(group.num_ranks);
  const auto zeroed = [&](int rank) { return ranks.TakeCopy(rank, std::vector<uint32_t>{0}); };
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    LowLatencyDispatchParams d;
    d.peers = ranks.context(rank);
    d.tokens = {kTokens, group.top_k, group.num_experts, kHidden};
    d.quantize = false;
    d.zero_tail = false;
    auto* x = ranks.Take<char>(rank, kTokens * kHidden * 2);
    auto* topk_idx = ranks.Take<int32_t>(rank, kTokens * group.top_k);
    auto* weights = ranks.Take<float>(rank, kTokens * group.top_k);
    d.x = x;
    d.topk_idx = topk_idx;
    d.rows = ranks.Take<char>(rank, int64_t{local_experts} * rows_per_expert * kHidden * 2);
    d.counts = ranks.Take<int32_t>(rank, local_experts);
    d.row_source = ranks.Take<int32_t>(rank, int64_t{local_experts} * rows_per_expert);
    LowLatencyCombineParams m;
    m.peers = d.peers;
    m.tokens = d.tokens;
    m.y = d.rows;
    m.counts = d.counts;
    m.row_source = d.row_source;
    m.topk_idx = topk_idx;
    m.topk_weights = weights;
    m.out = ranks.Take<char>(rank, kTokens * kHidden * 2);
    num_wrong[rank] = zeroed(rank);
    const ReplayParams p{rank,
                         group.num_ranks,
                         kTokens,
                         group.top_k,
                         group.num_experts,
                         kHidden,
                         rows_per_expert,
                         zeroed(rank),
                         reinterpret_cast<__nv_bfloat16*>(x),
                         topk_idx,
                         weights,
                         reinterpret_cast<const __nv_bfloat16*>(d.rows),
                         d.counts,
                         d.row_source,
                         reinterpret_cast<const __nv_bfloat16*>(m.out),
                         num_wrong[rank]};
    uint32_t* dispatch_ticket = zeroed(rank);
    uint32_t* combine_ticket = zeroed(rank);
    cudaStream_t stream = ranks.stream(rank);
    RequireCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
    MakeInputsKernel<<<4, 256, 0, stream>>>(p);
    if (halves) {
      d.ticket = dispatch_ticket;
      m.ticket = combine_ticket;
      for (const auto part : {LowLatencyPart::kSend, LowLatencyPart::kReceive}) {
        d.part = part;
        CHECK(LaunchLowLatencyDispatch(d, stream).ok());
      }
      for (const auto part : {LowLatencyPart::kSend, LowLatencyPart::kReceive}) {
        m.part = part;
        CHECK(LaunchLowLatencyCombine(m, stream).ok());
      }
    } else {
      CHECK(LaunchLowLatencyDispatch(d, stream).ok());
      CHECK(LaunchLowLatencyCombine(m, stream).ok());
    }
    CheckResultsKernel<<<local_experts + kTokens, 128, 0, stream>>>(p);
    NextStepKernel<<<1, 1, 0, stream>>>(p.step);
    cudaGraph_t graph;
    RequireCuda(cudaStreamEndCapture(stream, &graph), "capture");
    RequireCuda(cudaGraphInstantiate(&graphs[rank], graph, 0), "graph");
    cudaGraphDestroy(graph);
  }
  for (int i = 0; i < replays; ++i) {
    for (int rank = 0; rank < group.num_ranks; ++rank) {
      RequireCuda(cudaGraphLaunch(graphs[rank], ranks.stream(rank)), "replay");
    }
  }
  CHECK(ranks.machine().Synchronize());
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    CHECK_EQ(ranks.Read(num_wrong[rank], 1)[0], 0u);
    CHECK_EQ(ranks.record(rank).failure, 0u);
    if (ranks.record(rank).failure != 0) {
      std::fprintf(stderr, "%s\n",
                   Describe(ranks.record(rank), group.deadline_s, group.top_k).c_str());
    }
    cudaGraphExecDestroy(graphs[rank]);
  }
}

TEST(TenThousandReplays) {
  ReplayGraphs(/*once_per_rank=*/true, /*halves=*/false, 10000);
  ReplayGraphs(/*once_per_rank=*/false, /*halves=*/false, 2000);
}

TEST(ReplaysOfHalves) { ReplayGraphs(/*once_per_rank=*/true, /*halves=*/true, 2000); }

}  // namespace
}  // namespace testing
}  // namespace wideep
