// The low-latency kernels' time with virtual ranks on one GPU: every rank on a stream of its own,
// all in one captured graph, so that nothing of the host is in the figures.
//
//   low_latency_benchmark [--ranks=2,4,8 --tokens=1,2,4,8,16,32,64,128 --hidden=7168 --top-k=8
//                          --experts=256 --sms=16 --once=1,0 --pieces=0 --blocks=0
//                          --iterations=20 --repeats=100 --json=FILE]
//
// Time: microseconds a call, all ranks, from the first start to the last end over `iterations`
// calls in a row; the median of `repeats` such graphs. Floor: the least bytes that all ranks read
// and write, at the speed of a device-to-device copy measured in the same run. One GPU stands for
// all: this shows neither NVLink nor its latency.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "benchmarks/virtual_ranks_timing.h"
#include "csrc/ep/low_latency.h"
#include "csrc/ep/quantize.h"
#include "tests/kernels/virtual_ranks.h"

namespace wideep {
namespace {

using testing::CudaMachine;
using testing::GroupSettings;
using Ranks = testing::VirtualRanks<CudaMachine>;

struct Options {
  std::vector<int> ranks = {2, 4, 8}, tokens = {1, 2, 4, 8, 16, 32, 64, 128}, once = {1, 0};
  int64_t hidden = 7168;
  int top_k = 8, experts = 256, sms = 16, pieces = 0, blocks = 0, iterations = 20, repeats = 100;
  std::string json;
};

std::vector<int> ParseList(const std::string& text) {
  std::vector<int> values;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) values.push_back(std::stoi(part));
  return values;
}

Options Parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "--ranks") {
      o.ranks = ParseList(value);
    } else if (name == "--tokens") {
      o.tokens = ParseList(value);
    } else if (name == "--once") {
      o.once = ParseList(value);
    } else if (name == "--hidden") {
      o.hidden = std::stoll(value);
    } else if (name == "--top-k") {
      o.top_k = std::stoi(value);
    } else if (name == "--experts") {
      o.experts = std::stoi(value);
    } else if (name == "--sms") {
      o.sms = std::stoi(value);
    } else if (name == "--pieces") {
      o.pieces = std::stoi(value);
    } else if (name == "--blocks") {
      o.blocks = std::stoi(value);
    } else if (name == "--iterations") {
      o.iterations = std::stoi(value);
    } else if (name == "--repeats") {
      o.repeats = std::stoi(value);
    } else if (name == "--json") {
      o.json = value;
    } else {
      std::fprintf(stderr, "unknown option %s\n", argument.c_str());
      std::exit(2);
    }
  }
  return o;
}

struct RankOps {
  LowLatencyDispatchParams dispatch;
  LowLatencyCombineParams combine;
};

class Benchmark {
 public:
  Benchmark(const Options& o, int num_ranks, bool once)
      : o_(o), ranks_(Settings(o, num_ranks, once)) {
    const int max_tokens = *std::max_element(o.tokens.begin(), o.tokens.end());
    const int64_t num_rows = int64_t{o.experts} * max_tokens;
    std::mt19937_64 random(7);
    for (int rank = 0; rank < num_ranks; ++rank) {
      std::vector<int32_t> topk_idx;
      std::vector<int32_t> experts(o.experts);
      for (int e = 0; e < o.experts; ++e) experts[e] = e;
      for (int token = 0; token < max_tokens; ++token) {
        std::shuffle(experts.begin(), experts.end(), random);
        topk_idx.insert(topk_idx.end(), experts.begin(), experts.begin() + o.top_k);
      }
      RankOps ops;
      LowLatencyDispatchParams& d = ops.dispatch;
      d.peers = ranks_.context(rank);
      d.tokens = {max_tokens, o.top_k, o.experts, o.hidden};
      d.tuning = {o.pieces, o.blocks};
      d.zero_tail = false;
      d.x = Zeroed(rank, max_tokens * o.hidden * 2);
      d.topk_idx = ranks_.TakeCopy(rank, topk_idx);
      d.rows = Zeroed(rank, num_rows * o.hidden * 2);
      d.row_scales = ranks_.Take<float>(rank, num_rows * o.hidden / kQuantBlock);
      d.counts = ranks_.Take<int32_t>(rank, o.experts / num_ranks);
      d.row_source = ranks_.Take<int32_t>(rank, num_rows);
      LowLatencyCombineParams& m = ops.combine;
      m.peers = d.peers;
      m.tokens = d.tokens;
      m.tuning = d.tuning;
      m.y = d.rows;
      m.counts = d.counts;
      m.row_source = d.row_source;
      m.topk_idx = d.topk_idx;
      m.topk_weights = ranks_.TakeCopy(rank, std::vector<float>(max_tokens * o.top_k, 0.125f));
      m.out = Zeroed(rank, max_tokens * o.hidden * 2);
      ops_.push_back(ops);
      topk_idx_.push_back(topk_idx);
    }
  }

  void SetTokens(int num_tokens, bool quantize, bool dequantize) {
    for (RankOps& ops : ops_) {
      ops.dispatch.tokens.num_tokens = num_tokens;
      ops.combine.tokens.num_tokens = num_tokens;
      ops.dispatch.quantize = quantize;
      ops.dispatch.dequantize = dequantize;
    }
  }

  /// Pairs of a token and a rank that hosts experts of it.
  int64_t Pairs(int num_tokens) const {
    const int local_experts = o_.experts / static_cast<int>(ops_.size());
    int64_t pairs = 0;
    for (const auto& topk_idx : topk_idx_) {
      for (int token = 0; token < num_tokens; ++token) {
        std::vector<bool> seen(ops_.size());
        for (int k = 0; k < o_.top_k; ++k) {
          const int dst = topk_idx[token * o_.top_k + k] / local_experts;
          pairs += !seen[dst];
          seen[dst] = true;
        }
      }
    }
    return pairs;
  }

  double Dispatch() {
    return Time([](RankOps& ops, cudaStream_t stream) {
      return LaunchLowLatencyDispatch(ops.dispatch, stream);
    });
  }
  double Combine() {
    return Time([](RankOps& ops, cudaStream_t stream) {
      return LaunchLowLatencyCombine(ops.combine, stream);
    });
  }

 private:
  static GroupSettings Settings(const Options& o, int num_ranks, bool once) {
    GroupSettings group;
    group.num_ranks = num_ranks;
    group.num_experts = o.experts;
    group.top_k = o.top_k;
    group.max_row_bytes = 2 * o.hidden;
    group.num_sms = o.sms;
    group.chunk = *std::max_element(o.tokens.begin(), o.tokens.end());
    group.once_per_rank = once;
    group.deadline_s = 10;
    // rows, scales, sources; x and out
    group.pool_bytes =
        (o.experts + 16) * group.chunk * (2 * o.hidden + o.hidden / 16 + 1024) + (64 << 20);
    return group;
  }

  char* Zeroed(int rank, int64_t num_bytes) {
    char* at = ranks_.Take<char>(rank, num_bytes);
    ranks_.machine().Fill(at, 0, num_bytes);
    return at;
  }

  double Time(const std::function<Status(RankOps&, cudaStream_t)>& launch) {
    return benchmarks::TimeRanks(
        ranks_, o_.top_k, o_.iterations, o_.repeats,
        [&](int rank, cudaStream_t stream) { return launch(ops_[rank], stream); });
  }

  const Options o_;
  Ranks ranks_;
  std::vector<RankOps> ops_;
  std::vector<std::vector<int32_t>> topk_idx_;
};

void Run(const Options& o) {
  const double copy_gb_s = benchmarks::MeasureCopy();
  cudaDeviceProp device;
  testing::RequireCuda(cudaGetDeviceProperties(&device, 0), "device");
  std::FILE* json = o.json.empty() ? nullptr : std::fopen(o.json.c_str(), "a");
  std::printf("copy %.0f GB/s; hidden %lld, top-%d of %d, at most %d blocks a rank\n", copy_gb_s,
              static_cast<long long>(o.hidden), o.top_k, o.experts, o.sms);
  std::printf("%5s %6s %-9s %-12s %12s %8s %12s %8s\n", "ranks", "tokens", "sent once", "wire",
              "dispatch us", "floor", "combine us", "floor");
  const double wire_row[] = {static_cast<double>(WireRowBytes(o.hidden)),
                             static_cast<double>(WireRowBytes(o.hidden)), 2.0 * o.hidden};
  const double row[] = {static_cast<double>(WireRowBytes(o.hidden)), 2.0 * o.hidden,
                        2.0 * o.hidden};
  const char* const names[] = {"fp8 kept", "fp8 to bf16", "bf16"};
  for (const int num_ranks : o.ranks) {
    for (const int once : o.once) {
      Benchmark benchmark(o, num_ranks, once != 0);
      for (const int tokens : o.tokens) {
        for (int wire = 0; wire < 3; ++wire) {
          benchmark.SetTokens(tokens, wire < 2, wire == 1);
          const double selections = double(num_ranks) * tokens * o.top_k;
          const double sent = once ? double(benchmark.Pairs(tokens)) : selections;
          // x read, wire rows written and read, rows written.
          const double dispatch_floor = (num_ranks * tokens * 2.0 * o.hidden +
                                         2 * sent * wire_row[wire] + selections * row[wire]) /
                                        copy_gb_s / 1e3;
          // y read, rows at home written and read, out written.
          const double combine_floor =
              (selections * 6.0 * o.hidden + num_ranks * tokens * 2.0 * o.hidden) / copy_gb_s / 1e3;
          const double dispatch = benchmark.Dispatch();
          const double combine = benchmark.Combine();
          std::printf("%5d %6d %-9s %-12s %12.1f %8.1f %12.1f %8.1f\n", num_ranks, tokens,
                      once ? "per rank" : "per expert", names[wire], dispatch, dispatch_floor,
                      combine, combine_floor);
          std::fflush(stdout);
          if (json == nullptr) continue;
          std::fprintf(json,
                       "{\"ranks\": %d, \"tokens\": %d, \"once_per_rank\": %s, \"wire\": \"%s\", "
                       "\"hidden\": %lld, \"top_k\": %d, \"experts\": %d, \"sms\": %d, "
                       "\"dispatch_us\": %.2f, \"dispatch_floor_us\": %.2f, \"combine_us\": %.2f, "
                       "\"combine_floor_us\": %.2f, \"copy_gb_s\": %.0f, \"pieces\": %d, "
                       "\"repeats\": %d, \"device\": \"%s\"}\n",
                       num_ranks, tokens, once ? "true" : "false", names[wire],
                       static_cast<long long>(o.hidden), o.top_k, o.experts, o.sms, dispatch,
                       dispatch_floor, combine, combine_floor, copy_gb_s, o.pieces, o.repeats,
                       device.name);
        }
      }
    }
  }
  if (json != nullptr) std::fclose(json);
}

}  // namespace
}  // namespace wideep

int main(int argc, char** argv) { wideep::Run(wideep::Parse(argc, argv)); }
