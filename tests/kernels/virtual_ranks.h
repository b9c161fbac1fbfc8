// R ranks of one group without R processes: each has an arena, a mapped pool and a stream of its
// own. `Machine` is the GPU (tests/gpu/cuda_machine.h) or the emulator on the host
// (tests/simt/simt_machine.h); the cases of tests/kernels run on both.
//
//   Machine(num_ranks, seed)
//   void* Allocate(rank, bytes)            aligned to 256, freed with the machine
//   void CopyIn(to, from, bytes), CopyOut(to, from, bytes), Fill(to, byte, bytes)
//   T* PinnedRecord<T>()                   host memory that kernels can write, zeroed
//   cudaStream_t Stream(rank)
//   void Delay(rank, microseconds)         holds up the rank's stream
//   bool Synchronize()                     false, with a message, if something went wrong
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ep/peer_context.h"
#include "csrc/ep/plan.h"

namespace wideep {
namespace testing {

struct GroupSettings {
  int num_ranks = 4;
  int num_experts = 16;
  int top_k = 4;
  int64_t max_row_bytes = 1024;
  int num_sms = 4;
  bool zero_copy = true;
  double deadline_s = 20;
  uint64_t pool_bytes = 64 << 20;
  int64_t chunk = 0;  // of low-latency calls
  bool once_per_rank = true;
};

template <typename Machine>
class VirtualRanks {
 public:
  explicit VirtualRanks(const GroupSettings& settings, uint64_t seed = 1)
      : machine_(settings.num_ranks, seed), settings_(settings), pool_used_(settings.num_ranks, 0) {
    const ArenaLayout layout(ArenaConfig{settings.num_ranks, settings.num_experts, settings.top_k,
                                         settings.max_row_bytes, settings.num_sms, settings.chunk,
                                         settings.once_per_rank});
    for (int rank = 0; rank < settings.num_ranks; ++rank) {
      PeerContext context;
      context.arena = static_cast<char*>(machine_.Allocate(rank, layout.num_bytes));
      machine_.Fill(context.arena, 0, layout.num_bytes);
      context.layout = layout;
      context.record = machine_.template PinnedRecord<ErrorRecord>();
      context.deadline_ns = static_cast<uint64_t>(settings.deadline_s * 1e9);
      context.rank = rank;
      context.num_ranks = settings.num_ranks;
      context.num_sms = settings.num_sms;
      context.zero_copy = settings.zero_copy;
      contexts_.push_back(context);
      pools_.push_back(static_cast<char*>(machine_.Allocate(rank, settings.pool_bytes)));
    }
    PeerTable table{};
    for (int rank = 0; rank < settings.num_ranks; ++rank) {
      table.arena[rank] = contexts_[rank].arena;
      table.num_regions[rank] = 1;
      table.regions[rank][0] = {reinterpret_cast<uint64_t>(pools_[rank]), settings.pool_bytes,
                                pools_[rank]};
    }
    for (const PeerContext& context : contexts_) {
      machine_.CopyIn(context.arena + layout.peer_table, &table, sizeof(table));
    }
  }

  /// From now on, ranks whose bit is set are masked: what PeerGroup::Reset does on every rank. No
  /// kernel runs.
  void Mask(uint32_t masked) {
    masked_ = masked;
    for (const PeerContext& context : contexts_) {
      const ArenaLayout& layout = context.layout;
      machine_.Fill(context.arena, 0, sizeof(Control));
      machine_.Fill(context.arena + layout.after_peer_table(), 0,
                    layout.num_bytes - layout.after_peer_table());
      machine_.CopyIn(context.arena + offsetof(Control, masked), &masked, sizeof(masked));
      *context.record = ErrorRecord{};
    }
  }
  uint32_t masked() const { return masked_; }

  /// Fills the masked ranks' arenas with a pattern, for ArenasUntouched; such a rank still finds
  /// that it is masked.
  void PoisonMaskedArenas() {
    for (const PeerContext& context : contexts_) {
      if ((masked_ >> context.rank & 1) == 0) continue;
      for (const auto& [begin, end] : PoisonedParts(context.layout)) {
        machine_.Fill(context.arena + begin, kPoison, end - begin);
      }
    }
  }
  /// Whether nobody has written to a poisoned arena.
  bool ArenasUntouched() {
    for (const PeerContext& context : contexts_) {
      if ((masked_ >> context.rank & 1) == 0) continue;
      for (const auto& [begin, end] : PoisonedParts(context.layout)) {
        const std::vector<char> bytes = Read<char>(context.arena + begin, end - begin);
        const bool untouched =
            std::all_of(bytes.begin(), bytes.end(), [](char byte) { return byte == kPoison; });
        if (!untouched) return false;
      }
    }
    return true;
  }

  int num_ranks() const { return settings_.num_ranks; }
  const GroupSettings& settings() const { return settings_; }
  const PeerContext& context(int rank) const { return contexts_[rank]; }
  Machine& machine() { return machine_; }
  cudaStream_t stream(int rank) { return machine_.Stream(rank); }
  const ErrorRecord& record(int rank) const { return *contexts_[rank].record; }

  /// Memory of the rank's pool, filled with a pattern, or with `contents`.
  template <typename T>
  T* Take(int rank, int64_t count) {
    return reinterpret_cast<T*>(TakeBytes(rank, count * static_cast<int64_t>(sizeof(T)), nullptr));
  }
  char* TakeBytes(int rank, int64_t num_bytes, const void* contents) {
    char* at = pools_[rank] + pool_used_[rank];
    pool_used_[rank] += (num_bytes + 511) / 256 * 256;  // at least 256 bytes between two buffers
    if (pool_used_[rank] > settings_.pool_bytes) {
      std::fprintf(stderr, "the pool of rank %d is too small\n", rank);
      std::exit(2);
    }
    if (contents != nullptr) {
      machine_.CopyIn(at, contents, num_bytes);
    } else if (num_bytes > 0) {
      machine_.Fill(at, 0xa5, num_bytes);
    }
    return at;
  }
  template <typename T>
  T* TakeCopy(int rank, const std::vector<T>& values) {
    return reinterpret_cast<T*>(
        TakeBytes(rank, static_cast<int64_t>(values.size() * sizeof(T)), values.data()));
  }
  void ReleaseAll() { pool_used_.assign(num_ranks(), 0); }

  template <typename T>
  std::vector<T> Read(const T* device, int64_t count) {
    std::vector<T> values(count);
    if (count > 0) machine_.CopyOut(values.data(), device, count * static_cast<int64_t>(sizeof(T)));
    return values;
  }

 private:
  static constexpr char kPoison = 0x5c;

  /// All but the mask and the peer table.
  static std::vector<std::pair<int64_t, int64_t>> PoisonedParts(const ArenaLayout& layout) {
    constexpr int64_t kMask = offsetof(Control, masked);
    return {{0, kMask},
            {kMask + 4, static_cast<int64_t>(sizeof(Control))},
            {layout.after_peer_table(), layout.num_bytes}};
  }

  Machine machine_;
  GroupSettings settings_;
  std::vector<PeerContext> contexts_;
  std::vector<char*> pools_;
  std::vector<uint64_t> pool_used_;
  uint32_t masked_ = 0;
};

/// One rank's plan over fresh memory, ready to launch. `capacity` 0: the worst case.
template <typename Machine>
PlanParams TakePlan(VirtualRanks<Machine>& ranks, int rank, const std::vector<int32_t>& topk_idx,
                    int64_t capacity = 0) {
  const GroupSettings& group = ranks.settings();
  const auto selections = static_cast<int64_t>(topk_idx.size());
  PlanParams p;
  p.peers = ranks.context(rank);
  p.num_tokens = selections / group.top_k;
  p.top_k = group.top_k;
  p.num_experts = group.num_experts;
  p.capacity = capacity > 0 ? capacity : group.num_ranks * selections;
  p.topk_idx = ranks.TakeCopy(rank, topk_idx);
  p.group_sizes = ranks.template Take<int32_t>(rank, group.num_experts / group.num_ranks);
  p.num_rows = ranks.template Take<int32_t>(rank, 1);
  p.overflow = ranks.template Take<int32_t>(rank, 1);
  p.tokens_per_expert = ranks.template Take<int32_t>(rank, group.num_experts);
  p.dest_rank = ranks.template Take<int32_t>(rank, selections);
  p.dest_row = ranks.template Take<int32_t>(rank, selections);
  p.row_source = ranks.template Take<int32_t>(rank, p.capacity);
  p.arrival_rows = ranks.template Take<int32_t>(rank, p.capacity);
  p.rows_per_source = ranks.template Take<int32_t>(rank, group.num_ranks);
  return p;
}

}  // namespace testing
}  // namespace wideep
