// The exchange kernels' time with virtual ranks on one GPU.
//
//   exchange_benchmark [--ranks=8 --tokens=4096 --hidden=7168 --top-k=8 --experts=256 --sms=16
//                       --routing=uniform|zipf|hot --iterations=20 --ops=PART,.. --variants --sweep
//                       --node-size=0 --under-way=800 --json=FILE --date=DATE]
//
// --sms: of each rank; by default 16, or all of the GPU for a single rank. --routing: experts drawn
// uniformly, by zipf(1.2) in a shuffled order, or with expert 0 as every token's first. --ops:
// those whose name has one of the parts. --variants: also tunings that are not the default.
// --sweep: one of tokens, hidden, top-k, ranks, SMs and routing at a time, around the point that
// the other options give. --node-size: also the ops between virtual nodes of so many ranks, over a
// network of stores, with rings of --under-way tokens a rank; 0: none.
//
// Time: whole op, all ranks, from the first start to the last end, over `iterations` ops in a row;
// the median of 5 such graphs (in a sweep, above 1.5 ms, 3 of half as many). Floor: the least bytes
// that all ranks read and write, at the speed of a device-to-device copy measured in the same run.
// Logical bytes: all rows; wire bytes: what crosses from one rank to another. One GPU stands for
// all: this shows neither NVLink nor its latency.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "benchmarks/virtual_ranks_timing.h"
#include "csrc/ep/combine.h"
#include "csrc/ep/dispatch.h"
#include "csrc/ep/mapped_net.cuh"
#include "csrc/ep/plan.h"
#include "csrc/ep/quantize.h"
#include "csrc/ep/two_hop_launch.cuh"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace {

using benchmarks::SlabMachine;
using testing::GroupSettings;
using testing::RequireCuda;
using Ranks = testing::VirtualRanks<SlabMachine>;

struct Options {
  int ranks = 8, top_k = 8, experts = 256, iterations = 20;
  int sms = 0;  // 0: the default
  int node_size = 0, under_way = 800;
  int64_t tokens = 4096, hidden = 7168;
  std::string routing = "uniform";
  std::vector<std::string> ops;
  bool variants = false, sweep = false;
  std::string json, date;
};

[[noreturn]] void Refuse(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(2);
}

Options Parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "--ranks") {
      o.ranks = std::stoi(value);
    } else if (name == "--tokens") {
      o.tokens = std::stoll(value);
    } else if (name == "--hidden") {
      o.hidden = std::stoll(value);
    } else if (name == "--top-k") {
      o.top_k = std::stoi(value);
    } else if (name == "--experts") {
      o.experts = std::stoi(value);
    } else if (name == "--sms") {
      o.sms = std::stoi(value);
    } else if (name == "--node-size") {
      o.node_size = std::stoi(value);
    } else if (name == "--under-way") {
      o.under_way = std::stoi(value);
    } else if (name == "--routing") {
      o.routing = value;
    } else if (name == "--iterations") {
      o.iterations = std::stoi(value);
    } else if (name == "--ops") {
      for (size_t comma; (comma = value.find(',')) != std::string::npos;) {
        o.ops.push_back(value.substr(0, comma));
        value = value.substr(comma + 1);
      }
      o.ops.push_back(value);
    } else if (name == "--variants") {
      o.variants = true;
    } else if (name == "--sweep") {
      o.sweep = true;
    } else if (name == "--json") {
      o.json = value;
    } else if (name == "--date") {
      o.date = value;
    } else {
      Refuse("unknown option " + argument);
    }
  }
  if (o.routing != "uniform" && o.routing != "zipf" && o.routing != "hot") {
    Refuse("--routing: expected uniform, zipf or hot, got " + o.routing);
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

/// Distinct experts per token. zipf: expert e with weight (e + 1)^-1.2 in a shuffled order.
std::vector<int32_t> DrawRouting(const Options& o, const std::vector<int>& order,
                                 std::mt19937_64& random) {
  const double skew = o.routing == "zipf" ? 1.2 : 0.0;
  std::vector<double> weights(o.experts);
  for (int e = 0; e < o.experts; ++e) weights[e] = std::pow(e + 1.0, -skew);
  std::discrete_distribution<int> draw(weights.begin(), weights.end());
  std::vector<int32_t> topk_idx;
  for (int64_t t = 0; t < o.tokens; ++t) {
    const size_t begin = topk_idx.size();
    if (o.routing == "hot") topk_idx.push_back(0);
    while (topk_idx.size() < begin + o.top_k) {
      const int32_t expert = order[draw(random)];
      if (std::find(topk_idx.begin() + begin, topk_idx.end(), expert) == topk_idx.end()) {
        topk_idx.push_back(expert);
      }
    }
  }
  return topk_idx;
}

/// Of all ranks together.
struct Traffic {
  int64_t rows = 0;        // selections
  int64_t rows_away = 0;   // of them, those of another rank's experts
  int64_t pairs = 0;       // (token, rank that has rows of it)
  int64_t pairs_away = 0;  // of them, those of another rank
  int64_t most_rows = 0;   // that a rank receives
  int64_t crossings = 0;   // (token, other node that has rows of it)
};

struct Routing {
  std::vector<std::vector<int32_t>> topk_idx;  // [ranks][tokens, top_k]
  Traffic traffic;

  explicit Routing(const Options& o) {
    std::mt19937_64 random(7);
    std::vector<int> order(o.experts);
    for (int e = 0; e < o.experts; ++e) order[e] = e;
    if (o.routing == "zipf") std::shuffle(order.begin(), order.end(), random);
    std::vector<int64_t> received(o.ranks, 0);
    for (int src = 0; src < o.ranks; ++src) {
      topk_idx.push_back(DrawRouting(o, order, random));
      for (int64_t t = 0; t < o.tokens; ++t) {
        uint32_t seen = 0;
        for (int k = 0; k < o.top_k; ++k) {
          const int dst = topk_idx[src][t * o.top_k + k] / (o.experts / o.ranks);
          const bool first = !(seen >> dst & 1);
          seen |= 1u << dst;
          ++received[dst];
          ++traffic.rows;
          traffic.rows_away += dst != src;
          traffic.pairs += first;
          traffic.pairs_away += first && dst != src;
        }
        for (int node = 0; o.node_size > 0 && node * o.node_size < o.ranks; ++node) {
          const uint32_t hosts = seen >> node * o.node_size & ((1u << o.node_size) - 1);
          traffic.crossings += node != src / o.node_size && hosts != 0;
        }
      }
    }
    traffic.most_rows = *std::max_element(received.begin(), received.end());
  }
};

struct RankOps {
  PlanParams plan;
  QuantizeParams quantize;
  DispatchParams dispatch;
  DispatchParams dispatch_fp8;
  CombineParams combine;
  CombineGradParams combine_grad;
  std::shared_ptr<TwoHop> two_hop;  // null: no nodes
};

two_hop::GroupShape ShapeOf(const Options& o) {
  two_hop::GroupShape shape;
  shape.arena = {o.ranks, o.experts, o.top_k, 2 * o.hidden, o.sms};
  for (int rank = 0; rank < o.ranks; ++rank) shape.node_of_rank.push_back(rank / o.node_size);
  shape.tokens_under_way = o.under_way;
  return shape;
}
int64_t RingBytes(const Options& o) {
  int64_t num_bytes = 0;
  if (o.node_size > 0) benchmarks::Require(two_hop::MemoryBytes(ShapeOf(o), num_bytes));
  return num_bytes;
}

/// The ranks of one case, with all buffers of all ops.
class Bench {
 public:
  Bench(const Options& o, const Routing& routing)
      : o_(o), capacity_(routing.traffic.most_rows), ranks_(Settings(o, capacity_)) {
    for (int r = 0; r < o.ranks; ++r) ops_.push_back(SetUpRank(r, routing.topk_idx[r]));
    if (o.node_size > 0) SetUpNodes();
    RequireCuda(cudaDeviceSynchronize(), "set-up");
  }

  double Microseconds(int iterations, int repeats,
                      const std::function<Status(RankOps&, cudaStream_t)>& launch) {
    return benchmarks::TimeRanks(
        ranks_, o_.top_k, iterations, repeats,
        [&](int rank, cudaStream_t stream) { return launch(ops_[rank], stream); });
  }

 private:
  static GroupSettings Settings(const Options& o, int64_t capacity) {
    GroupSettings group;
    group.num_ranks = o.ranks;
    group.num_experts = o.experts;
    group.top_k = o.top_k;
    group.max_row_bytes = 2 * o.hidden;
    group.num_sms = o.sms;
    group.deadline_s = 10;
    // y and dy; x, out and FP8 rows; everything else.
    group.pool_bytes = 2 * capacity * 2 * o.hidden + o.tokens * 6 * o.hidden +
                       64 * (o.tokens * o.top_k + capacity + o.experts) + (1 << 20);
    const ArenaLayout layout(ArenaConfig{o.ranks, o.experts, o.top_k, group.max_row_bytes,
                                         group.num_sms, group.chunk, group.once_per_rank});
    SlabMachine::Reserve(o.ranks *
                         (group.pool_bytes + layout.num_bytes + RingBytes(o) + (1 << 20)));
    return group;
  }

  void SetUpNodes() {
    const int64_t num_bytes = RingBytes(o_);
    MappedNet net{};
    for (int r = 0; r < o_.ranks; ++r) {
      net.memory[r] = static_cast<char*>(ranks_.machine().Allocate(r, num_bytes));
      net.arenas[r] = ranks_.context(r).arena;
    }
    for (int r = 0; r < o_.ranks; ++r) {
      const TwoHopSettings settings{ShapeOf(o_), r, net.memory[r], num_bytes};
      benchmarks::Require(MakeTwoHop(settings, net, ops_[r].two_hop));
    }
  }

  template <typename T>
  T* TakeRandom(int rank, int64_t num_bytes) {
    char* at = ranks_.Take<char>(rank, num_bytes);
    FillRandomKernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(at), num_bytes / 4, ++seed_);
    RequireCuda(cudaGetLastError(), "fill");
    return reinterpret_cast<T*>(at);
  }
  template <typename T>
  T* Take(int rank, int64_t count) {
    return ranks_.Take<T>(rank, count);
  }

  RankOps SetUpRank(int rank, const std::vector<int32_t>& topk_idx) {
    RankOps ops;
    const int64_t selections = o_.tokens * o_.top_k;
    const int64_t row_bytes = 2 * o_.hidden;
    ops.plan = testing::TakePlan(ranks_, rank, topk_idx, capacity_);
    const PlanParams& p = ops.plan;
    const PlanArrays plan{p.dest_rank,  p.dest_row,     p.num_rows,
                          p.row_source, p.arrival_rows, p.rows_per_source};
    DispatchParams& d = ops.dispatch;
    d.peers = p.peers;
    d.plan = plan;
    d.num_tokens = o_.tokens;
    d.top_k = o_.top_k;
    d.row_bytes = row_bytes;
    d.capacity = capacity_;
    d.zero_tail = false;
    d.x = TakeRandom<char>(rank, o_.tokens * row_bytes);
    d.weights = TakeRandom<float>(rank, selections * 4);
    d.rows = TakeRandom<char>(rank, capacity_ * row_bytes);
    d.row_weights = TakeRandom<float>(rank, capacity_ * 4);
    CombineParams& m = ops.combine;
    m.peers = p.peers;
    m.plan = plan;
    m.num_tokens = o_.tokens;
    m.top_k = o_.top_k;
    m.hidden = o_.hidden;
    m.y = d.rows;
    m.row_scalars = d.row_weights;
    m.out = TakeRandom<char>(rank, o_.tokens * row_bytes);
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
    g.dy = TakeRandom<char>(rank, capacity_ * row_bytes);
    g.drow_weights = Take<float>(rank, capacity_);
    ops.combine.sums = g.dy;
    // FP8 rows arrive where dy goes.
    const int64_t wire_bytes = WireRowBytes(o_.hidden);
    char* const wire = Take<char>(rank, o_.tokens * wire_bytes);
    ops.quantize = QuantizeToWire(DType::kBF16, d.x, o_.tokens, o_.hidden, wire, wire_bytes);
    ops.dispatch_fp8 = d;
    ops.dispatch_fp8.row_bytes = wire_bytes;
    ops.dispatch_fp8.x = wire;
    ops.dispatch_fp8.rows = g.dy;
    return ops;
  }

  const Options o_;
  const int64_t capacity_;
  Ranks ranks_;
  std::vector<RankOps> ops_;
  uint32_t seed_ = 0;
};

using LaunchOp = std::function<Status(RankOps&, cudaStream_t)>;

LaunchOp Then(LaunchOp first, LaunchOp second) {
  return [=](RankOps& ops, cudaStream_t stream) {
    const Status status = first(ops, stream);
    return status.ok() ? second(ops, stream) : status;
  };
}

LaunchOp Dispatch(DispatchForm form, bool zero_copy = true, bool fp8 = false, int stages = 0) {
  return [=](RankOps& ops, cudaStream_t stream) {
    DispatchParams p = fp8 ? ops.dispatch_fp8 : ops.dispatch;
    p.form = form;
    p.peers.zero_copy = zero_copy;
    p.num_stages = stages;
    return LaunchDispatch(p, stream);
  };
}

LaunchOp Combine(CombineForm form, bool gradient, int num_chunks = 0) {
  return [=](RankOps& ops, cudaStream_t stream) {
    CombineParams p = ops.combine;
    p.form = form;
    p.num_chunks = num_chunks;
    if (gradient) p.dweights = const_cast<float*>(ops.dispatch.weights);
    return LaunchCombine(p, stream);
  };
}

LaunchOp CombineGrad(bool zero_copy) {
  return [=](RankOps& ops, cudaStream_t stream) {
    CombineGradParams p = ops.combine_grad;
    p.peers.zero_copy = zero_copy;
    return LaunchCombineGrad(p, stream);
  };
}

/// When an op is measured.
enum class Where { kEverywhere, kAtOnePoint, kAsVariant };

struct Op {
  std::string name;
  Where where;
  double floor_bytes;    // of all ranks, read and written
  double logical_bytes;  // of all ranks
  double wire_bytes;     // of all ranks
  LaunchOp launch;
};

std::vector<Op> Ops(const Options& o, const Traffic& t) {
  const double row = 2.0 * o.hidden;
  const double fp8 = WireRowBytes(o.hidden);
  const double tokens = double(o.ranks) * o.tokens;
  const double rows = t.rows;
  const double once = t.pairs_away * row;  // each token once to each other rank
  const double each = t.rows_away * row;   // every row by itself
  const double floor = (tokens + rows) * row;
  const double grad_floor = (tokens + 2 * rows) * row;
  const LaunchOp plan = [](RankOps& ops, cudaStream_t stream) {
    return LaunchPlan(ops.plan, stream);
  };
  const LaunchOp quantize = [](RankOps& ops, cudaStream_t stream) {
    return LaunchQuantize(ops.quantize, stream);
  };
  const auto push = DispatchForm::kPush;
  const auto pull = DispatchForm::kPull;
  const auto everywhere = Where::kEverywhere;
  const auto here = Where::kAtOnePoint;
  const auto variant = Where::kAsVariant;
  std::vector<Op> ops{
      {"plan", everywhere, 0, 0, 0, plan},
      {"plan + dispatch push", everywhere, floor, rows * row, each, Then(plan, Dispatch(push))},
      {"plan + dispatch pull", everywhere, floor, rows * row, once, Then(plan, Dispatch(pull))},
      {"plan + dispatch rings", here, floor, rows * row, once,
       Then(plan, Dispatch(push, /*zero_copy=*/false))},
      {"dispatch push", here, floor, rows * row, each, Dispatch(push)},
      {"dispatch pull", here, floor, rows * row, once, Dispatch(pull)},
      {"dispatch rings", here, floor, rows * row, once, Dispatch(push, /*zero_copy=*/false)},
      {"combine pull", everywhere, floor, rows * row, each, Combine(CombineForm::kPull, false)},
      {"combine push", here, floor, rows * row, once, Combine(CombineForm::kPush, false)},
      {"combine reduce", here, floor, rows * row, once, Combine(CombineForm::kReduce, false)},
      {"dispatch grad pull", here, floor, rows * row, each, Combine(CombineForm::kPull, true)},
      {"dispatch grad push", here, floor, rows * row, once, Combine(CombineForm::kPush, true)},
      {"dispatch grad reduce", here, floor, rows * row, once, Combine(CombineForm::kReduce, true)},
      {"combine grad", everywhere, grad_floor, rows * row, once, CombineGrad(true)},
      {"combine grad rings", here, grad_floor, rows * row, once, CombineGrad(false)},
      {"dispatch push, 1 stage", variant, floor, rows * row, each, Dispatch(push, true, false, 1)},
      {"dispatch push, 4 stages", variant, floor, rows * row, each, Dispatch(push, true, false, 4)},
      {"dispatch pull, 1 stage", variant, floor, rows * row, once, Dispatch(pull, true, false, 1)},
      {"dispatch pull, 4 stages", variant, floor, rows * row, once, Dispatch(pull, true, false, 4)},
      {"combine reduce, 1 chunk", variant, floor, rows * row, once,
       Combine(CombineForm::kReduce, false, 1)},
      {"combine reduce, 4 chunks", variant, floor, rows * row, once,
       Combine(CombineForm::kReduce, false, 4)},
      {"combine reduce, 16 chunks", variant, floor, rows * row, once,
       Combine(CombineForm::kReduce, false, 16)},
  };
  if (o.node_size > 0) {
    const double across = t.crossings * row;
    const auto sum = [](bool gradient) -> LaunchOp {
      return [=](RankOps& ops, cudaStream_t stream) {
        CombineParams p = ops.combine;
        if (gradient) p.dweights = const_cast<float*>(ops.dispatch.weights);
        return ops.two_hop->Combine(p, stream);
      };
    };
    const std::vector<Op> more{
        {"nodes: plan", everywhere, 0, 0, 0,
         [](RankOps& ops, cudaStream_t stream) { return ops.two_hop->Plan(ops.plan, stream); }},
        {"nodes: dispatch", everywhere, floor, rows * row, across,
         [](RankOps& ops, cudaStream_t stream) {
           return ops.two_hop->Dispatch(ops.dispatch, stream);
         }},
        {"nodes: combine", everywhere, floor, rows * row, across, sum(false)},
        {"nodes: dispatch grad", everywhere, floor, rows * row, across, sum(true)},
        {"nodes: combine grad", everywhere, grad_floor, rows * row, across,
         [](RankOps& ops, cudaStream_t stream) {
           return ops.two_hop->CombineGrad(ops.combine_grad, stream);
         }},
    };
    ops.insert(ops.end(), more.begin(), more.end());
  }
  if (o.hidden % kQuantBlock == 0) {
    const double fp8_floor = (tokens + rows) * fp8;
    const double both_floor = tokens * row + rows * fp8;
    const LaunchOp fp8_push = Dispatch(push, true, /*fp8=*/true);
    const LaunchOp fp8_pull = Dispatch(pull, true, /*fp8=*/true);
    const double fp8_each = t.rows_away * fp8, fp8_once = t.pairs_away * fp8;
    const std::vector<Op> more{
        {"quantize", here, tokens * (row + fp8), 0, 0, quantize},
        {"dispatch fp8 push", here, fp8_floor, rows * fp8, fp8_each, fp8_push},
        {"dispatch fp8 pull", here, fp8_floor, rows * fp8, fp8_once, fp8_pull},
        {"plan + quantize + dispatch fp8 push", here, both_floor, rows * fp8, fp8_each,
         Then(plan, Then(quantize, fp8_push))},
        {"plan + quantize + dispatch fp8 pull", here, both_floor, rows * fp8, fp8_once,
         Then(plan, Then(quantize, fp8_pull))},
    };
    ops.insert(ops.end(), more.begin(), more.end());
  }
  return ops;
}

/// The GPU, and where figures go.
struct Report {
  std::string device;
  int num_sms;
  double copy_gb_s;
  FILE* json;
};

void Run(const Options& o, const Report& report, bool all_ops) {
  if (o.experts % o.ranks != 0 || o.sms < 2 || o.ranks * o.sms > report.num_sms) {
    Refuse("expected experts divisible by ranks, and ranks * sms of 2 to " +
           std::to_string(report.num_sms));
  }
  const Routing routing(o);
  const Traffic& t = routing.traffic;
  Bench bench(o, routing);
  std::printf(
      "%d ranks, %d SMs each, %lld tokens a rank, hidden %lld bf16, top-%d of %d, %s; most rows on "
      "a rank %lld; %.2f ranks a token\n",
      o.ranks, o.sms, static_cast<long long>(o.tokens), static_cast<long long>(o.hidden), o.top_k,
      o.experts, o.routing.c_str(), static_cast<long long>(t.most_rows),
      static_cast<double>(t.pairs) / (o.ranks * o.tokens));

  const std::vector<Op> ops = Ops(o, t);
  // The others use what the plan wrote, and dispatch FP8 what quantize wrote.
  for (const Op& op : ops) {
    if (op.name == "plan" || op.name == "quantize") bench.Microseconds(1, 1, op.launch);
  }
  for (const Op& op : ops) {
    if (op.where == Where::kAtOnePoint && !all_ops) continue;
    if (op.where == Where::kAsVariant && !(all_ops && o.variants)) continue;
    const bool chosen = std::any_of(o.ops.begin(), o.ops.end(), [&](const std::string& part) {
      return op.name.find(part) != std::string::npos;
    });
    if (!o.ops.empty() && !chosen) continue;
    const double floor_us = op.floor_bytes / report.copy_gb_s / 1e3;
    const bool large = !all_ops && floor_us > 1500;
    const double us = bench.Microseconds(large ? std::max(1, o.iterations / 2) : o.iterations,
                                         large ? 3 : 5, op.launch);
    const double logical_gb_s = op.logical_bytes / o.ranks / us / 1e3;
    const double wire_gb_s = op.wire_bytes / o.ranks / us / 1e3;
    std::printf(
        "  %-36s %9.1f us   floor %8.1f us (%3.0f%%)   a rank: %6.1f GB/s logical, %6.1f wire\n",
        op.name.c_str(), us, floor_us, 100 * floor_us / us, logical_gb_s, wire_gb_s);
    std::fflush(stdout);
    if (report.json == nullptr) continue;
    std::fprintf(report.json,
                 "{\"kind\": \"exchange_kernels\", \"device\": \"%s\", \"date\": \"%s\", "
                 "\"op\": \"%s\", \"ranks\": %d, \"sms\": %d, \"tokens\": %lld, \"hidden\": %lld, "
                 "\"top_k\": %d, \"experts\": %d, \"routing\": \"%s\", \"us\": %.2f, "
                 "\"floor_us\": %.2f, \"copy_gb_s\": %.0f, \"logical_gb_s\": %.1f, "
                 "\"wire_gb_s\": %.1f, \"most_rows\": %lld, \"node_size\": %d}\n",
                 report.device.c_str(), o.date.c_str(), op.name.c_str(), o.ranks, o.sms,
                 static_cast<long long>(o.tokens), static_cast<long long>(o.hidden), o.top_k,
                 o.experts, o.routing.c_str(), us, floor_us, report.copy_gb_s, logical_gb_s,
                 wire_gb_s, static_cast<long long>(t.most_rows), o.node_size);
    std::fflush(report.json);
  }
}

/// One setting at a time away from `base`.
std::vector<Options> Sweep(const Options& base, int num_sms) {
  std::vector<Options> cases;
  const auto add = [&](auto change) {
    Options o = base;
    change(o);
    if (o.ranks * o.sms <= num_sms) cases.push_back(o);
  };
  for (int64_t tokens : {1, 8, 64, 512, 4096, 8192}) {
    if (tokens != base.tokens) add([=](Options& o) { o.tokens = tokens; });
  }
  for (int64_t hidden : {2048, 4096, 7168, 8192}) {
    if (hidden != base.hidden) add([=](Options& o) { o.hidden = hidden; });
  }
  for (int top_k : {1, 2, 4, 8, 10}) {
    if (top_k != base.top_k) add([=](Options& o) { o.top_k = top_k; });
  }
  for (int ranks : {1, 2, 4, 8}) {
    if (ranks != base.ranks) add([=](Options& o) { o.ranks = ranks; });
  }
  for (int sms : {4, 8, 12, 16}) {
    if (sms != base.sms) add([=](Options& o) { o.sms = sms; });
  }
  add([](Options& o) { o.ranks = 4, o.sms = 24; });
  add([=](Options& o) { o.ranks = 1, o.sms = num_sms / 2 * 2; });
  for (const char* routing : {"uniform", "zipf", "hot"}) {
    if (routing != base.routing) add([=](Options& o) { o.routing = routing; });
  }
  return cases;
}

void RunAll(Options o) {
  cudaDeviceProp device;
  RequireCuda(cudaGetDeviceProperties(&device, 0), "device");
  const Report report{device.name, device.multiProcessorCount, benchmarks::MeasureCopy(),
                      o.json.empty() ? nullptr : std::fopen(o.json.c_str(), "a")};
  std::printf("%s, %d SMs, copy %.0f GB/s\n", device.name, report.num_sms, report.copy_gb_s);
  if (o.sms == 0) o.sms = o.ranks == 1 ? report.num_sms / 2 * 2 : 16;
  Run(o, report, /*all_ops=*/true);
  if (o.sweep) {
    for (const Options& one : Sweep(o, report.num_sms)) {
      // A single rank with the whole GPU is a point of its own.
      Run(one, report, /*all_ops=*/one.ranks == 1 && one.sms > o.sms);
    }
  }
  if (report.json != nullptr) std::fclose(report.json);
}

}  // namespace
}  // namespace wideep

int main(int argc, char** argv) {
  // Before CUDA starts: each rank's stream needs a queue of its own.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  wideep::RunAll(wideep::Parse(argc, argv));
}
