// The emulator's inside: threads, blocks, streams, memory, and who runs next.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/simt/context.h"
#include "tests/simt/device.h"
#include "tests/simt/kernel_api.h"
#include "tests/simt/order.h"

namespace simt {

struct Block;
struct KernelRun;

constexpr int kWarpLanes = 32;
constexpr uint32_t kSharedStart = 1024;          // shared addresses begin here, as on hardware
constexpr int64_t kMaxSharedBytes = 227 * 1024;  // of a block
constexpr int kMaxBlocks = 64;                   // of a kernel
constexpr int kMaxRanks = 16;
constexpr int kNamedBarriers = 16;

/// Small and fast; the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567) {}
  uint32_t Next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  uint32_t Below(uint32_t bound) { return static_cast<uint32_t>((uint64_t{Next()} * bound) >> 32); }
  bool OneIn(uint32_t n) { return Below(n) == 0; }

 private:
  uint64_t state_;
};

/// Bulk stores that were committed together.
struct CopyGroup {
  int unread = 0;
  int unwritten = 0;
  std::vector<std::pair<uint32_t, uint32_t>> clocks;  // slot and clock of each copy's reads
};

/// A write that races: let pass if it turns out to write what is there already.
struct DoubtfulWrite {
  const char* pointer = nullptr;  // null: none
  int num_bytes = 0;
  char before[16];
  std::string report;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  uint32_t thread = 0;
  int runnable_at = -1;  // place in Runtime::runnable, or -1
  bool finished = false;

  // Where it is, for reports.
  const char* doing = "not started";
  Site site = {"", 0};
  uint32_t mask = 0;  // of a warp collective

  uint64_t result = 0;                            // of the last collective
  std::deque<std::shared_ptr<CopyGroup>> groups;  // committed, oldest first
  int64_t num_read = 0;                           // of them, at the front, that were waited for
  std::shared_ptr<CopyGroup> open_group;

  DoubtfulWrite doubtful;
  Knowledge knowledge;
  Snapshot at_fence;  // what a later relaxed store publishes
  bool has_fence = false;
  std::vector<Snapshot> relaxed_loads;  // what a later fence acquires
};

struct WarpMeeting {
  WarpOp op;
  uint32_t mask;
  Site site;
  int width;
  uint32_t arrived = 0;
  uint64_t values[kWarpLanes];
  uint32_t lanes[kWarpLanes];
};

struct Warp {
  uint32_t live = ~0u;
  std::vector<WarpMeeting> meetings;
};

struct NamedBarrier {
  uint32_t expected = 0;
  bool whole_block = false;
  Site site = {"", 0};
  std::vector<Fiber*> waiting;
};

struct Mbarrier {
  uint32_t count = 0;
  uint32_t pending = 0;
  int64_t tx_bytes = 0;
  uint32_t phase = 0;
  std::vector<Snapshot> arrivals;                     // of the current phase
  std::vector<std::pair<uint32_t, uint32_t>> copies;  // likewise: slot and clock
  std::vector<Snapshot> done_arrivals;                // of the phase before
  std::vector<std::pair<uint32_t, uint32_t>> done_copies;
};

struct Block {
  KernelRun* kernel = nullptr;
  int index = 0;
  char* shared = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  int live = 0;
  NamedBarrier barriers[kNamedBarriers];
  std::map<uint32_t, Mbarrier> mbarriers;
  int pending_copies = 0;  // that still touch shared memory
};

struct KernelRun {
  int rank = 0;
  std::string name;
  int grid_blocks = 0;
  int block_threads = 0;
  int64_t shared_bytes = 0;
  std::function<void()> body;
  std::vector<std::unique_ptr<Block>> blocks;
  int live_blocks = 0;
  int pending_copies = 0;
  Clocks after;
};

struct Stream {
  int rank = 0;
  std::deque<std::unique_ptr<KernelRun>> queue;
  std::unique_ptr<KernelRun> running;
  ClocksPtr before;  // what its next kernel knows
  uint64_t start_ns = 0;
  uint64_t kill_ns = ~uint64_t{0};
  bool killed = false;
};

struct BulkCopy {
  bool is_load = false;
  bool read_done = false;
  int64_t not_before = 0;  // step
  Block* block = nullptr;
  Site site = {"", 0};
  char* to = nullptr;
  const char* from = nullptr;
  uint32_t bytes = 0;
  uint32_t mbarrier = 0;
  std::shared_ptr<CopyGroup> group;
  std::vector<char> staged;
  uint32_t slot = 0;
  uint32_t clock = 0;  // of its reads; its writes are one later
};

struct Allocation {
  char* begin;
  int64_t num_bytes;
  int rank;
  std::string name;
  bool freed = false;
};

/// What a flag carries to those who acquire it.
struct FlagState {
  struct Released {
    Snapshot snapshot;
    Scope scope;
    int rank;
  };
  /// A store ends what came before it; updates go on with it.
  std::vector<Released> releases;
};

class Runtime {
 public:
  Runtime(int num_ranks, const Options& options);
  ~Runtime();
  static Runtime* Get();
  static Fiber* Current();

  // ---- scheduler.cc ----
  std::string RunAll();
  /// Lets others run; the fiber stays runnable.
  void Yield();
  /// A Yield now and then.
  void MaybeYield(uint32_t one_in) {
    if (random.OneIn(one_in)) Yield();
  }
  /// Until Wake.
  void Suspend();
  void Wake(Fiber* fiber);
  /// The test fails with this text, where the current fiber is. Does not return to it.
  void Fail(const std::string& text);
  void Fail(Site site, const std::string& text);
  void Progress() { idle_steps = 0, time_step = options.step_ns; }
  void Doing(const char* what, Site site) {
    SettleDoubt();
    Current()->doing = what;
    Current()->site = site;
  }

  // ---- memory.cc ----
  char* Allocate(int rank, int64_t num_bytes, const std::string& name);
  void Free(const void* pointer);
  bool CanAccess(const char* pointer, int64_t num_bytes) const;
  /// Fails unless all of it can be accessed by the current fiber.
  void CheckRange(const void* pointer, int64_t num_bytes, int64_t alignment, const char* what,
                  Site site);
  void CheckGuards();
  bool InDevice(const void* p) const {
    return static_cast<const char*>(p) >= device_begin &&
           static_cast<const char*>(p) < device_begin + kDeviceBytes;
  }
  bool InShared(const void* p) const {
    return static_cast<const char*>(p) >= shared_begin &&
           static_cast<const char*>(p) < shared_begin + kSharedArenaBytes;
  }
  std::string Describe(const void* pointer) const;
  /// Logs an access of the current fiber and fails if it races.
  void LogAccess(const void* pointer, int64_t num_bytes, uint8_t kind, uint32_t place);
  void LogAccess(const void* pointer, int64_t num_bytes, const AccessLog::Access& access);
  void LogCopyAccess(const void* pointer, int64_t num_bytes, bool write, uint32_t slot,
                     uint32_t clock, uint32_t place);
  /// Fails if the fiber's last write raced and changed something.
  void SettleDoubt();
  /// An ordinary access, told by access_hooks.cc.
  void OnAccess(const void* pointer, int64_t num_bytes, bool write, uint32_t place);
  uint32_t PlaceOf(Site site);
  uint32_t PlaceOf(const void* return_address);
  std::string PlaceName(uint32_t place) const;
  /// Slot of the block's thread 0; the others follow.
  uint32_t FirstSlot(int rank, int block, int num_threads);
  std::string NameOfSlot(uint32_t slot) const;

  // ---- barriers.cc ----
  void LeaveBarriers(Fiber* fiber);

  // ---- copies.cc ----
  /// Takes some copy one step further, if it is time or there is nothing else to do; false if there
  /// is no copy.
  bool StepSomeCopy(bool nothing_else);
  void DropCopies(KernelRun* kernel);

  static constexpr int64_t kDeviceBytes = int64_t{1} << 30;
  static constexpr int64_t kSharedStride = 256 * 1024;
  static constexpr int64_t kSharedArenaBytes = kSharedStride * kMaxBlocks * kMaxRanks;

  Options options;
  Stats stats;
  Random random;
  std::vector<Stream> streams;
  std::vector<Fiber*> runnable;
  std::vector<BulkCopy> copies;
  std::string failure;
  Context scheduler;
  Fiber* last = nullptr;  // ran last; of a kernel that still runs

  // Time, and since when nothing happened.
  int64_t idle_steps = 0;
  uint64_t time_step = 0;

  // Who stands still.
  int still_rank = -1;
  int still_block = -1;
  int still_warp = -1;
  int still_thread = -1;
  int64_t still_until = 0;
  uint32_t same_warp_odds = 0;  // of 8

  char* device_begin = nullptr;
  char* shared_begin = nullptr;
  int64_t device_used = 0;
  std::map<const char*, Allocation> allocations;
  std::unordered_map<uint64_t, FlagState> flags;

  uint32_t clock_floor = 0;      // clocks of earlier devices are no larger
  std::vector<uint32_t> clocks;  // of every slot: the last one used
  std::map<std::pair<int, int>, std::pair<uint32_t, int>> slots;  // (rank, block) -> first, count
  uint32_t next_slot;
  uint32_t next_copy_slot = 0;
  static constexpr uint32_t kCopySlots = 256;

  std::map<std::pair<const char*, int>, uint32_t> place_of_site;
  std::unordered_map<const void*, uint32_t> place_of_address;
  std::vector<Site> sites;
  std::vector<const void*> addresses;

 private:
  Fiber* Pick();
  bool StandsStill(const Fiber* fiber);
  void ChooseWhoStandsStill();
  int64_t StepsUntilIdle() const;
  void HurryIfIdle();
  void StartKernels();
  void FinishFiber(Fiber* fiber);
  void FinishKernel(Stream& stream);
  void Kill(Stream& stream);
  /// After the last step of the stream's kernel.
  void ReturnFibers(Stream& stream);

  void Deadlock(const char* why);
  static void FiberMain();
};

std::string NameOf(Site site);
std::string Hex(uint32_t mask);

}  // namespace simt
