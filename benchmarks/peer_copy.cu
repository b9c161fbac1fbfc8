// What the link between the GPUs of a host gives: every GPU copies to, or from, other GPUs, all at
// once.
//
//   peer_copy_benchmark [--mb=512] [--repeats=20] [--json=FILE]
//
// Patterns: `next`, each GPU with the one after it, and `all`, equal parts with every other GPU.
// Ways: the copy engine (cudaMemcpyPeerAsync), a kernel that writes to the peer and one that reads
// from it, 16 bytes a thread and access, on 8 to all SMs. A figure is what a GPU sends or fetches a
// second, of the slowest GPU, median of --repeats; meanwhile as much comes the other way. Data are
// random bits.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

enum class Way { kCopyEngine, kWrite, kRead, kReadRows };

constexpr int64_t kRowVectors = 14336 / 16;

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

__global__ void Fill(uint4* to, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x}) {
    uint64_t state = (uint64_t{seed} << 40) + i;
    uint32_t words[4];
    for (uint32_t& word : words) {  // SplitMix64
      uint64_t z = state += 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      word = static_cast<uint32_t>(z >> 16);
    }
    to[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Eight accesses of a thread are under way at once, as in the exchange kernels.
__global__ void __launch_bounds__(1024)
    Copy(const uint4* __restrict__ from, uint4* __restrict__ to, int64_t count) {
  constexpr int kInFlight = 8;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
    uint4 values[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) values[j] = from[i + j * step];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) to[i + j * step] = values[j];
  }
  for (; i < count; i += step) to[i] = from[i];
}

// Row `r` of `to` is row `r * kStride` of `from`, modulo their number.
__global__ void __launch_bounds__(1024)
    CopyRows(const uint4* __restrict__ from, uint4* __restrict__ to, int64_t rows) {
  constexpr int kInFlight = 14;
  constexpr int64_t kStride = 1000003;  // a prime
  static_assert(kRowVectors % (32 * kInFlight) == 0);
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / 32;
  for (int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32; row < rows;
       row += warps) {
    const uint4* source = from + row * kStride % rows * kRowVectors + threadIdx.x % 32;
    uint4* target = to + row * kRowVectors + threadIdx.x % 32;
    for (int64_t at = 0; at < kRowVectors; at += 32 * kInFlight) {
      uint4 values[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) values[j] = source[at + 32 * j];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) target[at + 32 * j] = values[j];
    }
  }
}

struct Gpu {
  uint4 *source, *target;
  cudaStream_t stream;
  cudaEvent_t begin, end;
};

class PeerCopy {
 public:
  PeerCopy(int num_gpus, int64_t bytes) : gpus_(num_gpus), bytes_(bytes) {
    for (int g = 0; g < num_gpus; ++g) {
      Require(cudaSetDevice(g), "device");
      for (int peer = 0; peer < num_gpus; ++peer)
        if (peer != g) Require(cudaDeviceEnablePeerAccess(peer, 0), "peer access");
      Gpu& gpu = gpus_[g];
      Require(cudaMalloc(&gpu.source, bytes), "memory");
      Require(cudaMalloc(&gpu.target, bytes), "memory");
      Require(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking), "stream");
      Require(cudaEventCreate(&gpu.begin), "event");
      Require(cudaEventCreate(&gpu.end), "event");
      Fill<<<1024, 256, 0, gpu.stream>>>(gpu.source, bytes / 16, 2 * g);
      Fill<<<1024, 256, 0, gpu.stream>>>(gpu.target, bytes / 16, 2 * g + 1);
      Require(cudaStreamSynchronize(gpu.stream), "fill");
    }
  }

  // GB/s that a GPU sends or fetches, on the slowest one.
  double Measure(bool all, Way way, int sms, int repeats) {
    std::vector<double> speeds;
    for (int repeat = -2; repeat < repeats; ++repeat) {
      for (int g = 0; g < size(); ++g) Launch(g, all, way, sms);
      float slowest = 0;
      for (Gpu& gpu : gpus_) {
        float ms;
        Require(cudaEventSynchronize(gpu.end), "copy");
        Require(cudaEventElapsedTime(&ms, gpu.begin, gpu.end), "time");
        slowest = std::max(slowest, ms);
      }
      if (repeat >= 0) speeds.push_back(bytes_ / (slowest * 1e6));
    }
    std::sort(speeds.begin(), speeds.end());
    return speeds[speeds.size() / 2];
  }

 private:
  int size() const { return static_cast<int>(gpus_.size()); }

  void Launch(int g, bool all, Way way, int sms) {
    Gpu& gpu = gpus_[g];
    Require(cudaSetDevice(g), "device");
    Require(cudaEventRecord(gpu.begin, gpu.stream), "begin");
    const int peers = all ? size() - 1 : 1;
    const int64_t part = bytes_ / 16 / peers;
    for (int p = 0; p < peers; ++p) {
      const Gpu& peer = gpus_[(g + 1 + p) % size()];
      // Part p of this GPU's memory and of the peer's: two GPUs never write the same place.
      const bool fetches = way == Way::kRead || way == Way::kReadRows;
      const Gpu& reader = fetches ? gpu : peer;
      const Gpu& writer = fetches ? peer : gpu;
      uint4* to = reader.target + p * part;
      const uint4* from = writer.source + p * part;
      if (way == Way::kCopyEngine) {
        Require(cudaMemcpyAsync(to, from, part * 16, cudaMemcpyDeviceToDevice, gpu.stream), "copy");
      } else if (way == Way::kReadRows) {
        CopyRows<<<sms, 1024, 0, gpu.stream>>>(from, to, part / kRowVectors);
      } else {
        Copy<<<sms, 1024, 0, gpu.stream>>>(from, to, part);
      }
    }
    Require(cudaEventRecord(gpu.end, gpu.stream), "end");
  }

  std::vector<Gpu> gpus_;
  int64_t bytes_;
};

}  // namespace

int main(int argc, char** argv) {
  int64_t mb = 512;
  int repeats = 20;
  std::FILE* json = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--mb=", 5) == 0) {
      mb = std::atoll(argv[i] + 5);
    } else if (std::strncmp(argv[i], "--repeats=", 10) == 0) {
      repeats = std::atoi(argv[i] + 10);
    } else if (std::strncmp(argv[i], "--json=", 7) == 0) {
      json = std::fopen(argv[i] + 7, "a");
    } else {
      std::fprintf(stderr, "unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  int num_gpus = 0;
  Require(cudaGetDeviceCount(&num_gpus), "GPUs");
  if (num_gpus < 2) {
    std::fprintf(stderr, "peer_copy_benchmark: expected at least 2 GPUs, got %d\n", num_gpus);
    return 2;
  }
  cudaDeviceProp properties;
  Require(cudaGetDeviceProperties(&properties, 0), "GPU 0");
  std::printf("%d x %s, %lld MB a GPU: GB/s that each sends (fetches), all at once\n", num_gpus,
              properties.name, static_cast<long long>(mb));
  PeerCopy copy(num_gpus, mb << 20);
  const auto report = [&](bool all, Way way, int sms) {
    const char* names[] = {"copy engine", "kernel writes", "kernel reads", "reads rows"};
    const char* name = names[static_cast<int>(way)];
    const double speed = copy.Measure(all, way, sms, repeats);
    std::printf("%-5s %-14s %4d SMs %8.1f\n", all ? "all" : "next", name, sms, speed);
    if (json == nullptr) return;
    std::fprintf(json,
                 "{\"kind\": \"peer_copy\", \"gpus\": %d, \"device\": \"%s\", \"pattern\": \"%s\", "
                 "\"way\": \"%s\", "
                 "\"sms\": %d, \"mb\": %lld, \"gb_per_s\": %.1f}\n",
                 num_gpus, properties.name, all ? "all" : "next", name, sms,
                 static_cast<long long>(mb), speed);
  };
  for (int all = 0; all <= (num_gpus > 2 ? 1 : 0); ++all) {
    report(all, Way::kCopyEngine, 0);
    for (int sms : {8, 16, 32, properties.multiProcessorCount}) {
      report(all, Way::kWrite, sms);
      report(all, Way::kRead, sms);
      report(all, Way::kReadRows, sms);
    }
  }
  if (json != nullptr) std::fclose(json);
  return 0;
}
