// Ranks in nodes on the threads of one process: registered memory, a network between nodes that
// delivers in any order and late, and the stages of csrc/ep/two_hop_protocol.h over both.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "csrc/ep/two_hop_layout.h"
#include "csrc/ep/two_hop_protocol.h"
#include "tests/cpp/two_hop_plan.h"

namespace wideep::two_hop {

/// Whether the calling thread should lose its turn now; makes interleavings uneven.
inline void MaybeDelay(std::minstd_rand& random, bool delays) {
  if (!delays) return;
  const auto draw = random() % 64;
  if (draw < 6) std::this_thread::yield();
  if (draw == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
}

/// Messages between nodes: each is done by one of a few threads, whichever it draws first.
class Network {
 public:
  Network(int num_threads, bool delays, uint32_t seed) : delays_(delays) {
    for (int i = 0; i < num_threads; ++i) {
      threads_.emplace_back([this, seed, i] { Run(seed + i); });
    }
  }
  ~Network() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void Post(std::function<void()> message) {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(std::move(message));
    changed_.notify_one();
  }

 private:
  void Run(uint32_t seed) {
    std::minstd_rand random(seed);
    for (;;) {
      std::function<void()> message;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return ended_ || !messages_.empty(); });
        if (messages_.empty()) return;
        std::swap(messages_[random() % messages_.size()], messages_.back());
        message = std::move(messages_.back());
        messages_.pop_back();
      }
      MaybeDelay(random, delays_);
      message();
    }
  }

  const bool delays_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  std::vector<std::function<void()>> messages_;
  std::vector<std::thread> threads_;
};

/// All ranks' registered memory.
class World {
 public:
  World(const Config& config, bool delays, uint32_t seed)
      : layout(config), delays(delays), network_(3, delays, seed) {
    for (int rank = 0; rank < config.nodes.num_ranks; ++rank) {
      arenas_.emplace_back(layout.num_bytes() / 8 + 1, 0);
    }
  }

  const Nodes& nodes() const { return layout.config().nodes; }
  char* At(int rank, int64_t offset) {
    return reinterpret_cast<char*>(arenas_[rank].data()) + offset;
  }
  uint64_t* Word(int rank, int64_t offset) { return reinterpret_cast<uint64_t*>(At(rank, offset)); }
  uint64_t Load(int rank, int64_t offset) {
    return __atomic_load_n(Word(rank, offset), __ATOMIC_ACQUIRE);
  }
  void Store(int rank, int64_t offset, uint64_t value) {
    __atomic_store_n(Word(rank, offset), value, __ATOMIC_RELEASE);
  }
  /// Now within a node, some time between nodes.
  void Send(int from, int to, std::function<void()> message) {
    if (nodes().NodeOf(from) == nodes().NodeOf(to)) {
      message();
    } else {
      network_.Post(std::move(message));
    }
  }

  const Layout layout;
  const bool delays;
  /// Tokens with a row that crossed, by direction.
  std::atomic<int64_t> rows_crossed[2] = {{0}, {0}};
  std::atomic<int64_t> puts[2] = {{0}, {0}};
  /// What forwarders learn from dispatch: [rank][input][token] hosts.
  std::vector<std::vector<std::vector<uint32_t>>> hosts_seen;

 private:
  std::vector<std::vector<uint64_t>> arenas_;
  Network network_;  // ends before the arenas do
};

constexpr int kTestInputs = 24;
constexpr int kTestOutputs = kMaxNodeRanks;

/// One stage of one rank: the rings' operations over World. What it does with tokens is in derived
/// classes.
class StageRunner {
 public:
  StageRunner(World& world, int rank) : world_(world), rank_(rank) {}
  virtual ~StageRunner() = default;
  Progress Step() {
    if (!begun_) Begin();
    const Progress progress = stage_.Step(*this);
    if (progress == Progress::kDone && !ended_) End();
    return progress;
  }

  // What the stage asks for.
  virtual bool Next(Bits<kTestInputs>& inputs) = 0;
  virtual void Outputs(Bits<kTestOutputs>&) {}
  virtual void Work() = 0;
  uint64_t Arrived(int i, uint32_t slot) {
    return world_.Load(rank_, in_rings_[i].arrived + int64_t{slot} * 8);
  }
  uint64_t Credits(int o) { return world_.Load(rank_, out_rings_[o].credits); }
  void Free(int i, uint64_t tokens) {
    const RingPlace ring = in_rings_[i];
    World& world = world_;
    world.Send(rank_, ring.sender, [&world, ring, tokens] {
      __atomic_fetch_add(world.Word(ring.sender, ring.credits), tokens, __ATOMIC_ACQ_REL);
    });
  }
  void HandOver(int o, uint64_t first, uint64_t end) {
    const RingPlace ring = out_rings_[o];
    World& world = world_;
    const int64_t slot = static_cast<int64_t>(first % ring.num_slots);
    if (ring.staging >= 0) ++world.puts[static_cast<int>(direction_)];
    world.Send(rank_, ring.receiver, [&world, ring, slot, first, end] {
      const int64_t slot_bytes = world.layout.config().slot_bytes;
      if (ring.staging >= 0) {
        std::memcpy(world.At(ring.receiver, ring.slots + slot * slot_bytes),
                    world.At(ring.sender, ring.staging + slot * slot_bytes),
                    (end - first) * slot_bytes);
      }
      world.Store(ring.receiver, ring.arrived + slot * 8, end);
    });
  }

 protected:
  int AddInput(const RingPlace& ring) { return Add(ring, in_rings_); }
  int AddOutput(const RingPlace& ring) { return Add(ring, out_rings_); }
  char* InputSlot(int i) {
    return world_.At(rank_, in_rings_[i].slots +
                                int64_t{stage_.InputSlot(i)} * world_.layout.config().slot_bytes);
  }
  char* OutputSlot(int o) {
    const RingPlace& ring = out_rings_[o];
    const int64_t offset = int64_t{stage_.OutputSlot(o)} * world_.layout.config().slot_bytes;
    return ring.staging >= 0 ? world_.At(rank_, ring.staging + offset)
                             : world_.At(ring.receiver, ring.slots + offset);
  }

  World& world_;
  const int rank_;
  Direction direction_ = Direction::kOut;

 private:
  static int Add(const RingPlace& ring, std::vector<RingPlace>& rings) {
    rings.push_back(ring);
    return static_cast<int>(rings.size()) - 1;
  }
  void Begin() {
    begun_ = true;
    for (size_t i = 0; i < in_rings_.size(); ++i) {
      const RingPlace& ring = in_rings_[i];
      stage_.in[i].Begin(*world_.Word(rank_, ring.taken), ring.num_slots);
    }
    for (size_t o = 0; o < out_rings_.size(); ++o) {
      const RingPlace& ring = out_rings_[o];
      stage_.out[o].Begin(*world_.Word(rank_, ring.sent), ring.num_slots, ring.batch);
    }
  }
  void End() {
    ended_ = true;
    for (size_t i = 0; i < in_rings_.size(); ++i) {
      *world_.Word(rank_, in_rings_[i].taken) = stage_.in[i].taken;
    }
    for (size_t o = 0; o < out_rings_.size(); ++o) {
      *world_.Word(rank_, out_rings_[o].sent) = stage_.out[o].sent;
    }
  }

  bool begun_ = false;
  bool ended_ = false;
  Stage<kTestInputs, kTestOutputs> stage_{};
  std::vector<RingPlace> in_rings_;
  std::vector<RingPlace> out_rings_;
};

/// Runs a rank's stages on `num_threads` threads, each stepping its share in turn. False: some made
/// no progress for a long time.
inline bool RunStages(World& world, std::vector<std::unique_ptr<StageRunner>>& stages,
                      int num_threads, uint32_t seed) {
  std::atomic<bool> ok{true};
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      std::minstd_rand random(seed * 31 + t + 1);
      auto last = std::chrono::steady_clock::now();
      for (bool open = true; open && ok;) {
        open = false;
        bool moved = false;
        for (size_t i = t; i < stages.size(); i += num_threads) {
          // Some steps of one, then of the next.
          Progress progress = Progress::kMoved;
          for (uint32_t n = random() % 16; n > 0 && progress == Progress::kMoved; --n) {
            progress = stages[i]->Step();
            moved |= progress == Progress::kMoved;
            MaybeDelay(random, world.delays);
          }
          open |= progress != Progress::kDone;
        }
        const auto now = std::chrono::steady_clock::now();
        if (moved || !open) {
          last = now;
        } else if (now - last > std::chrono::seconds(60)) {
          ok = false;
        } else {
          std::this_thread::yield();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ok;
}

}  // namespace wideep::two_hop
