// Allocations and what may be accessed; places and slots for the log of accesses; the public
// Device.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <sstream>

#include "tests/simt/runtime.h"

namespace simt {
namespace {

constexpr int64_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0x5a;
constexpr int64_t kMaxPoisoned = 4 << 20;

Runtime* runtime = nullptr;
uint32_t largest_clock = 0;  // of all devices so far

/// Kept for the whole process: pages that were touched are touched already.
struct Arenas {
  char* device;
  char* shared;
  AccessLog device_log;
  AccessLog shared_log;

  static char* Reserve(int64_t num_bytes) {
    void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }
  Arenas()
      : device(Reserve(Runtime::kDeviceBytes)),
        shared(Reserve(Runtime::kSharedArenaBytes)),
        device_log(device, Runtime::kDeviceBytes),
        shared_log(shared, Runtime::kSharedArenaBytes) {}

  static Arenas& Get() {
    static Arenas arenas;
    return arenas;
  }
};

/// The source line of an address in this program, if addr2line is there.
std::string FindLine(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info)) return "?";
  // A program that may lie anywhere counts its addresses from 0 (in the ELF header, type 3).
  uint16_t elf_type;
  std::memcpy(&elf_type, static_cast<char*>(info.dli_fbase) + 16, 2);
  const auto base = elf_type == 3 ? reinterpret_cast<uint64_t>(info.dli_fbase) : 0;
  const uint64_t offset = reinterpret_cast<uint64_t>(address) - base - 1;  // in the call before it
  char command[256];
  std::snprintf(command, sizeof(command), "addr2line -i -e /proc/%d/exe 0x%llx 2>/dev/null",
                static_cast<int>(getpid()), static_cast<unsigned long long>(offset));
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof(line), pipe)) {
      line[std::strcspn(line, " \n")] = 0;
      const char* name = std::strstr(line, "csrc/");
      text += (text.empty() ? "" : " from ") + std::string(name ? name : line);
    }
    pclose(pipe);
  }
  char number[64];
  std::snprintf(number, sizeof(number), "program offset 0x%llx",
                static_cast<unsigned long long>(offset));
  return text.empty() || text[0] == '?' ? number : text;
}

const std::string& LineOf(const void* address) {
  static std::map<const void*, std::string> lines;  // finding one takes long
  const auto [it, is_new] = lines.try_emplace(address);
  if (is_new) it->second = FindLine(address);
  return it->second;
}

}  // namespace

Runtime* Runtime::Get() { return runtime; }

Runtime::Runtime(int num_ranks, const Options& options_in)
    : options(options_in), random(options_in.seed), next_slot(1 + kCopySlots) {
  runtime = this;
  time_step = options.step_ns;
  streams.resize(num_ranks);
  for (int r = 0; r < num_ranks; ++r) streams[r].rank = r;
  device_begin = Arenas::Get().device;
  shared_begin = Arenas::Get().shared;
  clock_floor = largest_clock;
  clocks.assign(next_slot, clock_floor);
  same_warp_odds = random.Below(9);
}

Runtime::~Runtime() {
  for (Stream& stream : streams) {
    if (stream.running) ReturnFibers(stream);
  }
  for (const uint32_t clock : clocks) largest_clock = std::max(largest_clock, clock);
  runtime = nullptr;
}

char* Runtime::Allocate(int rank, int64_t num_bytes, const std::string& name) {
  const int64_t rounded = (num_bytes + 255) / 256 * 256 + kGuardBytes;
  if (device_used + rounded + kGuardBytes > kDeviceBytes) throw std::bad_alloc();
  char* const begin = device_begin + device_used + kGuardBytes;
  std::memset(begin - kGuardBytes, kGuard, kGuardBytes);
  if (num_bytes <= kMaxPoisoned) std::memset(begin, Device::kPoison, num_bytes);
  std::memset(begin + num_bytes, kGuard, rounded - num_bytes);
  device_used += rounded;
  allocations[begin] = {begin, num_bytes, rank, name};
  return begin;
}

void Runtime::Free(const void* pointer) {
  CheckGuards();
  allocations.at(static_cast<const char*>(pointer)).freed = true;
}

void Runtime::CheckGuards() {
  for (const auto& [begin, a] : allocations) {
    if (a.freed) continue;
    const int64_t after = (a.num_bytes + 255) / 256 * 256 - a.num_bytes + kGuardBytes;
    for (int64_t i = -kGuardBytes; i < a.num_bytes + after; ++i) {
      if (i == 0) i = a.num_bytes;
      if (static_cast<unsigned char>(begin[i]) == kGuard) continue;
      Fail("written outside of an allocation: " + Describe(begin + i));
      return;
    }
  }
}

std::string Runtime::Describe(const void* pointer) const {
  const auto* p = static_cast<const char*>(pointer);
  std::ostringstream out;
  if (InShared(p)) {
    const int64_t at = p - shared_begin;
    out << "byte " << at % kSharedStride << " of the shared memory of rank "
        << at / kSharedStride / kMaxBlocks << ", block " << at / kSharedStride % kMaxBlocks;
    return out.str();
  }
  auto next = allocations.upper_bound(p);
  if (!InDevice(p) || next == allocations.begin()) {
    out << "address " << pointer << ", which is no device memory";
    return out.str();
  }
  const Allocation& a = std::prev(next)->second;
  out << "byte " << p - a.begin << " of \"" << a.name << "\" (" << a.num_bytes << " bytes, rank "
      << a.rank << (a.freed ? ", freed)" : ")");
  return out.str();
}

bool Runtime::CanAccess(const char* p, int64_t num_bytes) const {
  if (InShared(p)) {
    const Block& block = *Current()->block;
    return p >= block.shared && p + num_bytes <= block.shared + block.kernel->shared_bytes;
  }
  if (!InDevice(p)) return false;
  const auto next = allocations.upper_bound(p);
  if (next == allocations.begin()) return false;
  const Allocation& a = std::prev(next)->second;
  return !a.freed && p + num_bytes <= a.begin + a.num_bytes;
}

void Runtime::CheckRange(const void* pointer, int64_t num_bytes, int64_t alignment,
                         const char* what, Site site) {
  const auto* p = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    Fail(site, std::string(what) + ": not aligned to " + std::to_string(alignment) +
                   " bytes: " + Describe(p));
  }
  if (!CanAccess(p, num_bytes)) {
    Fail(site, std::string(what) + " of " + std::to_string(num_bytes) +
                   " bytes, outside of what this block may access: " + Describe(p));
  }
}

uint32_t Runtime::PlaceOf(Site site) {
  const auto [it, is_new] =
      place_of_site.try_emplace({site.file, site.line}, static_cast<uint32_t>(sites.size()) * 2);
  if (is_new) sites.push_back(site);
  return it->second;
}

uint32_t Runtime::PlaceOf(const void* return_address) {
  const auto [it, is_new] =
      place_of_address.try_emplace(return_address, static_cast<uint32_t>(addresses.size()) * 2 + 1);
  if (is_new) addresses.push_back(return_address);
  return it->second;
}

std::string Runtime::PlaceName(uint32_t place) const {
  return place % 2 == 0 ? NameOf(sites[place / 2]) : LineOf(addresses[place / 2]);
}

uint32_t Runtime::FirstSlot(int rank, int block, int num_threads) {
  auto& [first, count] = slots[{rank, block}];
  if (num_threads > count) {
    first = next_slot;
    count = num_threads;
    next_slot += num_threads;
    clocks.resize(next_slot, clock_floor);
  }
  return first;
}

std::string Runtime::NameOfSlot(uint32_t slot) const {
  if (slot >= 1 && slot <= kCopySlots) return "a bulk copy";
  for (const auto& [where, range] : slots) {
    if (slot < range.first || slot >= range.first + static_cast<uint32_t>(range.second)) continue;
    return "rank " + std::to_string(where.first) + ", block " + std::to_string(where.second) +
           ", thread " + std::to_string(slot - range.first);
  }
  return "a thread of an earlier kernel";
}

void Runtime::LogAccess(const void* pointer, int64_t num_bytes, uint8_t kind, uint32_t place) {
  const Fiber& fiber = *Current();
  LogAccess(pointer, num_bytes, {fiber.knowledge.slot(), fiber.knowledge.own(), place, 0, kind, 0});
}

void Runtime::OnAccess(const void* pointer, int64_t num_bytes, bool write, uint32_t place) {
  SettleDoubt();
  MaybeYield(64);
  if (write) Progress();
  const auto* p = static_cast<const char*>(pointer);
  const char* const what = write ? "write" : "read";
  // The source line is looked up only for a report.
  if (!CanAccess(p, num_bytes)) {
    Fail(std::string(what) + " of " + std::to_string(num_bytes) + " bytes at " + PlaceName(place) +
         ", outside of what this block may access: " + Describe(p));
  }
  LogAccess(p, num_bytes, write ? AccessLog::kWrite : AccessLog::kRead, place);
}

void Runtime::LogCopyAccess(const void* pointer, int64_t num_bytes, bool write, uint32_t slot,
                            uint32_t clock, uint32_t place) {
  const auto kind =
      static_cast<uint8_t>(AccessLog::kAsync | (write ? AccessLog::kWrite : AccessLog::kRead));
  LogAccess(pointer, num_bytes, {slot, clock, place, 0, kind, 0});
}

void Runtime::LogAccess(const void* pointer, int64_t num_bytes, const AccessLog::Access& access) {
  if (!options.check_races) return;
  AccessLog& log = InShared(pointer) ? Arenas::Get().shared_log : Arenas::Get().device_log;
  const AccessLog::Access* other =
      log.Add(static_cast<const char*>(pointer), num_bytes, Current()->knowledge, access,
              clock_floor, random.Next());
  if (!other) return;
  const auto name = [](uint8_t kind) {
    return std::string(kind & AccessLog::kAsync ? "bulk copy's " : "") +
           (kind & AccessLog::kAtomic ? "atomic " : "") +
           (kind & AccessLog::kWrite ? "write" : "read");
  };
  const std::string report = "race: " + name(access.kind) + " at " + PlaceName(access.place) +
                             "\n  of " + Describe(pointer) + ", " + std::to_string(num_bytes) +
                             " bytes\n  is not ordered after the " + name(other->kind) + " at " +
                             PlaceName(other->place) + "\n  by " + NameOfSlot(other->slot);
  if (access.kind == AccessLog::kWrite && !(other->kind & AccessLog::kAsync) && num_bytes <= 16) {
    DoubtfulWrite& doubtful = Current()->doubtful;
    doubtful.pointer = static_cast<const char*>(pointer);
    doubtful.num_bytes = static_cast<int>(num_bytes);
    std::memcpy(doubtful.before, pointer, num_bytes);
    doubtful.report = report;
    return;
  }
  Fail(report);
}

void Runtime::SettleDoubt() {
  DoubtfulWrite& doubtful = Current()->doubtful;
  if (!doubtful.pointer) return;
  const bool changed = std::memcmp(doubtful.pointer, doubtful.before, doubtful.num_bytes) != 0;
  doubtful.pointer = nullptr;
  if (changed) Fail(doubtful.report);
}

// ---- Device ----

Device::Device(int num_ranks, const Options& options)
    : runtime_(std::make_unique<Runtime>(num_ranks, options)) {}
Device::~Device() = default;

CUstream_st* Device::stream(int rank) const {
  return reinterpret_cast<CUstream_st*>(&runtime_->streams.at(rank));
}
char* Device::Allocate(int rank, int64_t num_bytes, const std::string& name) {
  return runtime_->Allocate(rank, num_bytes, name);
}
void Device::Free(const void* pointer) { runtime_->Free(pointer); }
std::string Device::RunAll() { return runtime_->RunAll(); }
void Device::StartAt(int rank, uint64_t ns) { runtime_->streams.at(rank).start_ns = ns; }
void Device::KillAt(int rank, uint64_t ns) { runtime_->streams.at(rank).kill_ns = ns; }
const Stats& Device::stats() const { return runtime_->stats; }

bool Enqueue(CUstream_st* stream, const char* name, int grid_blocks, int block_threads,
             int64_t shared_bytes, std::function<void()> body, std::string& reason) {
  if (grid_blocks < 1 || grid_blocks > kMaxBlocks) {
    reason = "grid_blocks must be 1 to " + std::to_string(kMaxBlocks) + " here, got " +
             std::to_string(grid_blocks);
  } else if (block_threads < kWarpLanes || block_threads > 1024 ||
             block_threads % kWarpLanes != 0) {
    reason =
        "block_threads must be a multiple of 32 up to 1024, got " + std::to_string(block_threads);
  } else if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    reason = "shared_bytes must be at most " + std::to_string(kMaxSharedBytes) + ", got " +
             std::to_string(shared_bytes);
  } else if (!stream) {
    reason = "no stream: use Device::stream(rank)";
  }
  if (!reason.empty()) return false;
  auto run = std::make_unique<KernelRun>();
  auto* queue = reinterpret_cast<Stream*>(stream);
  run->rank = queue->rank;
  run->name = name;
  run->grid_blocks = grid_blocks;
  run->block_threads = block_threads;
  run->shared_bytes = shared_bytes;
  run->body = std::move(body);
  queue->queue.push_back(std::move(run));
  return true;
}

// ---- kernel_api: memory ----

char* SharedBase() { return Runtime::Current()->block->shared; }

uint32_t SharedOffset(const void* pointer, Site site) {
  Runtime::Get()->CheckRange(pointer, 1, 1, "shared address", site);
  Runtime& rt = *Runtime::Get();
  if (!rt.InShared(pointer)) rt.Fail(site, "no shared address: " + rt.Describe(pointer));
  return kSharedStart + static_cast<uint32_t>(static_cast<const char*>(pointer) - SharedBase());
}

void Load16(void* to, const void* pointer, Site site) {
  Runtime& rt = *Runtime::Get();
  rt.Doing("16-byte load", site);
  rt.MaybeYield(32);
  rt.CheckRange(pointer, 16, 16, "16-byte load", site);
  rt.LogAccess(pointer, 16, AccessLog::kRead, rt.PlaceOf(site));
  std::memcpy(to, pointer, 16);
  rt.Progress();
}

void Store16(void* pointer, const void* from, Site site) {
  Runtime& rt = *Runtime::Get();
  rt.Doing("16-byte store", site);
  rt.CheckRange(pointer, 16, 16, "16-byte store", site);
  rt.LogAccess(pointer, 16, AccessLog::kWrite, rt.PlaceOf(site));
  std::memcpy(pointer, from, 16);
  rt.Progress();
  rt.MaybeYield(32);
}

}  // namespace simt
