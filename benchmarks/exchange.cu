// The exchange kernels' time with virtual ranks on one GPU: every rank on a stream of its own, all
// in one captured graph, so that nothing of the host is in the figures.
//
//   exchange_benchmark [--ranks=8 --tokens=4096 --hidden=7168 --top-k=8 --experts=256 --sms=16
//                       --zipf=0 --iterations=20 --json=FILE --only=NAME]
//
// Time: whole op, all ranks, from the first start to the last end, over `iterations` ops in a row;
// the median of 5 such graphs. Floor: the least bytes that all ranks read and write, at the speed
// of a device-to-device copy measured in the same run. One GPU stands for all: this shows neither
// NVLink nor its latency.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "csrc/ep/combine.h"
#include "csrc/ep/dispatch.h"
#include "csrc/ep/plan.h"
#include "tests/gpu/cuda_machine.h"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace {

using testing::CudaMachine;
using testing::GroupSettings;
using testing::RequireCuda;
using Ranks = testing::VirtualRanks<CudaMachine>;

struct Options {
  int ranks = 8, top_k = 8, experts = 256, sms = 16, iterations = 20;
  int64_t tokens = 4096, hidden = 7168;
  double zipf = 0;
  std::string json, only;
};

Options Parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "--ranks")
      o.ranks = std::stoi(value);
    else if (name == "--tokens")
      o.tokens = std::stoll(value);
    else if (name == "--hidden")
      o.hidden = std::stoll(value);
    else if (name == "--top-k")
      o.top_k = std::stoi(value);
    else if (name == "--experts")
      o.experts = std::stoi(value);
    else if (name == "--sms")
      o.sms = std::stoi(value);
    else if (name == "--zipf")
      o.zipf = std::stod(value);
    else if (name == "--iterations")
      o.iterations = std::stoi(value);
    else if (name == "--json")
      o.json = value;
    else if (name == "--only")
      o.only = value;
    else
      std::fprintf(stderr, "unknown option %s\n", argument.c_str()), std::exit(2);
  }
  return o;
}

__global__ void FillRandomKernel(uint32_t* words, int64_t count, uint32_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    uint64_t x = (uint64_t{seed} << 40) + i + 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    // Two bf16 of magnitude 1/2 to 2 with random signs and mantissas.
    words[i] = (static_cast<uint32_t>(x >> 16) & 0x80ff80ffu) | 0x3f003f00u;
  }
}

/// Distinct experts per token; zipf: expert e with weight (e + 1)^-zipf in a shuffled order.
std::vector<int32_t> DrawRouting(const Options& o, const std::vector<int>& order,
                                 std::mt19937_64& random) {
  std::vector<double> weights(o.experts);
  for (int e = 0; e < o.experts; ++e) weights[e] = std::pow(e + 1.0, -o.zipf);
  std::discrete_distribution<int> draw(weights.begin(), weights.end());
  std::vector<int32_t> topk_idx;
  for (int64_t t = 0; t < o.tokens; ++t) {
    const size_t begin = topk_idx.size();
    while (topk_idx.size() < begin + o.top_k) {
      const int32_t expert = order[draw(random)];
      if (std::find(topk_idx.begin() + begin, topk_idx.end(), expert) == topk_idx.end()) {
        topk_idx.push_back(expert);
      }
    }
  }
  return topk_idx;
}

struct RankOps {
  PlanParams plan;
  DispatchParams dispatch;
  CombineParams combine;
  CombineGradParams combine_grad;
};

class Benchmark {
 public:
  explicit Benchmark(const Options& o) : o_(o), ranks_(Settings(o)) {
    std::mt19937_64 random(7);
    std::vector<int> order(o.experts);
    for (int e = 0; e < o.experts; ++e) order[e] = e;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::vector<int32_t>> topk_idx;
    std::vector<int64_t> received(o.ranks, 0);
    for (int r = 0; r < o.ranks; ++r) {
      topk_idx.push_back(DrawRouting(o, order, random));
      for (int64_t t = 0; t < o.tokens; ++t) {
        std::vector<bool> seen(o.ranks, false);
        for (int k = 0; k < o.top_k; ++k) {
          const int dst = topk_idx[r][t * o.top_k + k] / (o.experts / o.ranks);
          ++received[dst];
          if (!seen[dst]) ++pairs_;
          seen[dst] = true;
        }
      }
    }
    capacity_ = *std::max_element(received.begin(), received.end());
    ops_.resize(o.ranks);
    for (int r = 0; r < o.ranks; ++r) SetUpRank(r, topk_idx[r]);
    MeasureCopy();
  }

  double copy_gb_s() const { return copy_gb_s_; }
  int64_t capacity() const { return capacity_; }
  int64_t selections() const { return int64_t{o_.ranks} * o_.tokens * o_.top_k; }
  int64_t tokens() const { return int64_t{o_.ranks} * o_.tokens; }
  int64_t pairs() const { return pairs_; }

  /// Microseconds of one op, over all ranks.
  double Time(const std::function<Status(RankOps&, cudaStream_t)>& launch) {
    cudaStream_t main;
    RequireCuda(cudaStreamCreate(&main), "stream");
    RequireCuda(cudaStreamBeginCapture(main, cudaStreamCaptureModeRelaxed), "capture");
    cudaEvent_t fork, join;
    RequireCuda(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming), "event");
    RequireCuda(cudaEventRecord(fork, main), "fork");
    for (int r = 0; r < o_.ranks; ++r) {
      RequireCuda(cudaStreamWaitEvent(ranks_.stream(r), fork), "fork");
      for (int i = 0; i < o_.iterations; ++i) {
        const Status status = launch(ops_[r], ranks_.stream(r));
        if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str()), std::exit(2);
      }
      RequireCuda(cudaEventCreateWithFlags(&join, cudaEventDisableTiming), "event");
      RequireCuda(cudaEventRecord(join, ranks_.stream(r)), "join");
      RequireCuda(cudaStreamWaitEvent(main, join), "join");
    }
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    RequireCuda(cudaStreamEndCapture(main, &graph), "capture");
    RequireCuda(cudaGraphInstantiate(&executable, graph, 0), "graph");
    cudaEvent_t begin, end;
    RequireCuda(cudaEventCreate(&begin), "event");
    RequireCuda(cudaEventCreate(&end), "event");
    std::vector<float> times;
    for (int i = 0; i < 6; ++i) {
      RequireCuda(cudaEventRecord(begin, main), "begin");
      RequireCuda(cudaGraphLaunch(executable, main), "launch");
      RequireCuda(cudaEventRecord(end, main), "end");
      RequireCuda(cudaStreamSynchronize(main), "run");
      float ms;
      RequireCuda(cudaEventElapsedTime(&ms, begin, end), "time");
      if (i > 0) times.push_back(ms);  // the first one warms up
    }
    for (int r = 0; r < o_.ranks; ++r) {
      if (ranks_.record(r).failure == 0) continue;
      std::fprintf(stderr, "%s\n",
                   Describe(ranks_.record(r), ranks_.settings().deadline_s, o_.top_k).c_str());
      std::exit(2);
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(main);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / o_.iterations;
  }

 private:
  static GroupSettings Settings(const Options& o) {
    GroupSettings group;
    group.num_ranks = o.ranks;
    group.num_experts = o.experts;
    group.top_k = o.top_k;
    group.max_row_bytes = 2 * o.hidden;
    group.num_sms = o.sms;
    group.deadline_s = 10;
    size_t free, total;
    RequireCuda(cudaMemGetInfo(&free, &total), "memory");
    group.pool_bytes = (free - (uint64_t{4} << 30)) / o.ranks / 10 * 9;
    return group;
  }

  template <typename T>
  T* TakeRandom(int rank, int64_t num_bytes) {
    char* at = Take<char>(rank, num_bytes);
    FillRandomKernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(at), num_bytes / 4, ++seed_);
    RequireCuda(cudaGetLastError(), "fill");
    return reinterpret_cast<T*>(at);
  }
  template <typename T>
  T* Take(int rank, int64_t count) {
    return ranks_.Take<T>(rank, count);
  }

  void SetUpRank(int rank, const std::vector<int32_t>& topk_idx) {
    RankOps& ops = ops_[rank];
    const int64_t selections = o_.tokens * o_.top_k;
    PlanParams& p = ops.plan;
    p.peers = ranks_.context(rank);
    p.num_tokens = o_.tokens;
    p.top_k = o_.top_k;
    p.num_experts = o_.experts;
    p.capacity = capacity_;
    p.topk_idx = ranks_.TakeCopy(rank, topk_idx);
    p.group_sizes = Take<int32_t>(rank, o_.experts / o_.ranks);
    p.num_rows = Take<int32_t>(rank, 1);
    p.overflow = Take<int32_t>(rank, 1);
    p.tokens_per_expert = Take<int32_t>(rank, o_.experts);
    p.dest_rank = Take<int32_t>(rank, selections);
    p.dest_row = Take<int32_t>(rank, selections);
    p.row_source = Take<int32_t>(rank, capacity_);
    p.arrival_rows = Take<int32_t>(rank, capacity_);
    p.rows_per_source = Take<int32_t>(rank, o_.ranks);
    const PlanArrays plan{p.dest_rank,  p.dest_row,     p.num_rows,
                          p.row_source, p.arrival_rows, p.rows_per_source};
    DispatchParams& d = ops.dispatch;
    d.peers = p.peers;
    d.plan = plan;
    d.num_tokens = o_.tokens;
    d.top_k = o_.top_k;
    d.row_bytes = 2 * o_.hidden;
    d.capacity = capacity_;
    d.zero_tail = false;
    d.x = TakeRandom<char>(rank, o_.tokens * d.row_bytes);
    d.weights = TakeRandom<float>(rank, selections * 4);
    d.rows = TakeRandom<char>(rank, capacity_ * d.row_bytes);
    d.row_weights = TakeRandom<float>(rank, capacity_ * 4);
    CombineParams& m = ops.combine;
    m.peers = p.peers;
    m.plan = plan;
    m.num_tokens = o_.tokens;
    m.top_k = o_.top_k;
    m.hidden = o_.hidden;
    m.y = d.rows;
    m.row_scalars = d.row_weights;
    m.out = TakeRandom<char>(rank, o_.tokens * d.row_bytes);
    CombineGradParams& g = ops.combine_grad;
    g.peers = p.peers;
    g.plan = plan;
    g.num_tokens = o_.tokens;
    g.top_k = o_.top_k;
    g.hidden = o_.hidden;
    g.capacity = capacity_;
    g.zero_tail = false;
    g.dout = m.out;
    g.y = d.rows;
    g.row_weights = d.row_weights;
    g.dy = TakeRandom<char>(rank, capacity_ * d.row_bytes);
    g.drow_weights = Take<float>(rank, capacity_);
  }

  void MeasureCopy() {
    const uint64_t bytes = uint64_t{2} << 30;
    char *from, *to;
    RequireCuda(cudaMalloc(&from, bytes), "copy");
    RequireCuda(cudaMalloc(&to, bytes), "copy");
    FillRandomKernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(from), bytes / 4, 99);
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<float> times;
    for (int i = 0; i < 9; ++i) {
      cudaEventRecord(begin);
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice);
      cudaEventRecord(end);
      RequireCuda(cudaDeviceSynchronize(), "copy");
      float ms;
      cudaEventElapsedTime(&ms, begin, end);
      if (i > 1) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    copy_gb_s_ = 2.0 * bytes / times[times.size() / 2] / 1e6;
    cudaFree(from);
    cudaFree(to);
  }

  Options o_;
  Ranks ranks_;
  std::vector<RankOps> ops_;
  int64_t capacity_ = 0;
  int64_t pairs_ = 0;  // (token, destination rank)
  double copy_gb_s_ = 0;
  uint32_t seed_ = 0;
};

void Run(const Options& o) {
  Benchmark benchmark(o);
  const double row = 2.0 * o.hidden;
  const double tokens = benchmark.tokens() * row;
  const double rows = benchmark.selections() * row;
  FILE* json = o.json.empty() ? nullptr : std::fopen(o.json.c_str(), "a");
  std::printf(
      "%d ranks, %d SMs each, %lld tokens a rank, hidden %lld bf16, top-%d of %d%s; copy %.0f "
      "GB/s; "
      "most rows on a rank %lld; %.2f ranks a token\n",
      o.ranks, o.sms, static_cast<long long>(o.tokens), static_cast<long long>(o.hidden), o.top_k,
      o.experts, o.zipf > 0 ? (", zipf " + std::to_string(o.zipf)).c_str() : "",
      benchmark.copy_gb_s(), static_cast<long long>(benchmark.capacity()),
      static_cast<double>(benchmark.pairs()) / benchmark.tokens());
  // `floor_bytes`: of all ranks, read and written.
  const auto report = [&](const char* name, double floor_bytes,
                          const std::function<Status(RankOps&, cudaStream_t)>& launch) {
    if (!o.only.empty() && std::string(name).find(o.only) == std::string::npos) return;
    const double us = benchmark.Time(launch);
    const double floor_us = floor_bytes / benchmark.copy_gb_s() / 1e3;
    const double logical_gb_s = rows / o.ranks / us / 1e3;
    const double wire_gb_s = benchmark.pairs() * row / o.ranks / us / 1e3;
    std::printf(
        "%-24s %9.1f us   floor %8.1f us (%.2f)   a rank: %6.1f GB/s logical, %6.1f once per "
        "rank\n",
        name, us, floor_us, us / std::max(floor_us, 1e-9), logical_gb_s, wire_gb_s);
    std::fflush(stdout);
    if (json == nullptr) return;
    std::fprintf(
        json,
        "{\"op\": \"%s\", \"ranks\": %d, \"sms\": %d, \"tokens\": %lld, \"hidden\": %lld, "
        "\"top_k\": %d, "
        "\"experts\": %d, \"zipf\": %g, \"us\": %.2f, \"floor_us\": %.2f, \"copy_gb_s\": %.0f, "
        "\"logical_gb_s\": %.1f, \"wire_gb_s\": %.1f}\n",
        name, o.ranks, o.sms, static_cast<long long>(o.tokens), static_cast<long long>(o.hidden),
        o.top_k, o.experts, o.zipf, us, floor_us, benchmark.copy_gb_s(), logical_gb_s, wire_gb_s);
  };

  // The plan comes first: the other ops use what it wrote.
  const std::string only = o.only;
  report("plan", 0, [](RankOps& ops, cudaStream_t stream) { return LaunchPlan(ops.plan, stream); });
  if (!only.empty()) {
    benchmark.Time([](RankOps& ops, cudaStream_t stream) { return LaunchPlan(ops.plan, stream); });
  }
  const auto dispatch = [](DispatchForm form, bool zero_copy, int stages, int piece_bytes) {
    return [=](RankOps& ops, cudaStream_t stream) {
      DispatchParams p = ops.dispatch;
      p.form = form;
      p.peers.zero_copy = zero_copy;
      p.num_stages = stages;
      p.piece_bytes = piece_bytes;
      return LaunchDispatch(p, stream);
    };
  };
  const auto combine = [](CombineForm form, bool zero_copy, bool gradient) {
    return [=](RankOps& ops, cudaStream_t stream) {
      CombineParams p = ops.combine;
      p.form = form;
      p.peers.zero_copy = zero_copy;
      if (gradient) p.dweights = const_cast<float*>(ops.dispatch.weights);
      return LaunchCombine(p, stream);
    };
  };
  report("dispatch push", tokens + rows, dispatch(DispatchForm::kPush, true, 0, 0));
  report("dispatch push 1 stage", tokens + rows, dispatch(DispatchForm::kPush, true, 1, 0));
  report("dispatch push 4 stages", tokens + rows, dispatch(DispatchForm::kPush, true, 4, 0));
  report("dispatch pull", tokens + rows, dispatch(DispatchForm::kPull, true, 0, 0));
  report("dispatch pull 1 stage", tokens + rows, dispatch(DispatchForm::kPull, true, 1, 0));
  report("dispatch pull 4 stages", tokens + rows, dispatch(DispatchForm::kPull, true, 4, 0));
  report("dispatch rings", tokens + rows, dispatch(DispatchForm::kPush, false, 0, 0));
  report("combine pull", tokens + rows, combine(CombineForm::kPull, true, false));
  report("combine push", tokens + rows, combine(CombineForm::kPush, true, false));
  report("dispatch grad pull", tokens + rows, combine(CombineForm::kPull, true, true));
  report("dispatch grad push", tokens + rows, combine(CombineForm::kPush, true, true));
  report("combine grad", tokens + 2 * rows, [](RankOps& ops, cudaStream_t stream) {
    return LaunchCombineGrad(ops.combine_grad, stream);
  });
  report("combine grad rings", tokens + 2 * rows, [](RankOps& ops, cudaStream_t stream) {
    CombineGradParams p = ops.combine_grad;
    p.peers.zero_copy = false;
    return LaunchCombineGrad(p, stream);
  });
  if (json != nullptr) std::fclose(json);
}

}  // namespace
}  // namespace wideep

int main(int argc, char** argv) {
  wideep::Run(wideep::Parse(argc, argv));
  return 0;
}
