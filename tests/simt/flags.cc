// Flags, atomics, fences and time.
#include <algorithm>
#include <cstring>

#include "tests/simt/runtime.h"

namespace simt {
namespace {

uint64_t Read(const void* pointer, int bytes) {
  uint64_t value = 0;
  std::memcpy(&value, pointer, bytes);
  return value;
}

bool Acquires(Order order) { return order == Order::kAcquire || order == Order::kAcqRel; }
bool Releases(Order order) { return order == Order::kRelease || order == Order::kAcqRel; }

FlagState& StateOf(Runtime& rt, const void* pointer) {
  return rt.flags[reinterpret_cast<uint64_t>(pointer)];
}

void AcquireFrom(const FlagState& state, Order order, Scope scope) {
  Fiber& me = *Runtime::Current();
  for (const FlagState::Released& release : state.releases) {
    // A scope must reach both sides.
    const bool same_rank = release.rank == me.block->kernel->rank;
    if (!same_rank && (scope != Scope::kSys || release.scope != Scope::kSys)) continue;
    if (Acquires(order)) {
      me.knowledge.Acquire(release.snapshot);
    } else {
      if (!me.relaxed_loads.empty() && me.relaxed_loads.back().slot == release.snapshot.slot) {
        me.relaxed_loads.pop_back();
      }
      me.relaxed_loads.push_back(release.snapshot);
      if (me.relaxed_loads.size() > 64) me.relaxed_loads.erase(me.relaxed_loads.begin());
    }
  }
}

void ReleaseTo(FlagState& state, Order order, Scope scope) {
  Fiber& me = *Runtime::Current();
  if (!Releases(order) && !me.has_fence) return;
  const Snapshot mine = Releases(order) ? me.knowledge.Release() : me.at_fence;
  // Releases of one party: the last one has all.
  auto& releases = state.releases;
  releases.erase(std::remove_if(releases.begin(), releases.end(),
                                [&](const FlagState::Released& release) {
                                  return release.snapshot.slot == mine.slot;
                                }),
                 releases.end());
  releases.push_back({mine, scope, me.block->kernel->rank});
}

}  // namespace

uint64_t FlagLoad(const void* pointer, int bytes, Order order, Scope scope, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber& me = *Runtime::Current();
  rt.Doing("load of a flag", site);
  rt.CheckRange(pointer, bytes, bytes, "load of a flag", site);
  rt.Yield();
  rt.LogAccess(pointer, bytes, AccessLog::kRead | AccessLog::kAtomic, rt.PlaceOf(site));
  const auto found = rt.flags.find(reinterpret_cast<uint64_t>(pointer));
  if (found != rt.flags.end()) AcquireFrom(found->second, order, scope);
  const uint64_t value = Read(pointer, bytes);
  me.doing = "polls or runs on after the load of a flag";
  return value;
}

void FlagStore(void* pointer, int bytes, uint64_t value, Order order, Scope scope, Site site) {
  Runtime& rt = *Runtime::Get();
  rt.Doing("store to a flag", site);
  rt.CheckRange(pointer, bytes, bytes, "store to a flag", site);
  rt.MaybeYield(4);
  rt.LogAccess(pointer, bytes, AccessLog::kWrite | AccessLog::kAtomic, rt.PlaceOf(site));
  if (Read(pointer, bytes) != value) rt.Progress();
  std::memcpy(pointer, &value, bytes);
  FlagState& state = StateOf(rt, pointer);
  state.releases.clear();
  ReleaseTo(state, order, scope);
  rt.MaybeYield(2);
}

uint64_t FlagUpdate(Rmw kind, void* pointer, int bytes, uint64_t value, uint64_t expected,
                    Order order, Scope scope, Site site) {
  Runtime& rt = *Runtime::Get();
  rt.Doing("atomic", site);
  rt.CheckRange(pointer, bytes, bytes, "atomic", site);
  rt.MaybeYield(2);
  rt.LogAccess(pointer, bytes, AccessLog::kWrite | AccessLog::kAtomic, rt.PlaceOf(site));
  const uint64_t before = Read(pointer, bytes);
  const auto as_signed = [bytes](uint64_t v) {
    return bytes == 4 ? static_cast<int64_t>(static_cast<int32_t>(v)) : static_cast<int64_t>(v);
  };
  uint64_t after = before;
  switch (kind) {
    case Rmw::kAdd:
      after = before + value;
      break;
    case Rmw::kMaxU:
      after = before > value ? before : value;
      break;
    case Rmw::kMinU:
      after = before < value ? before : value;
      break;
    case Rmw::kMaxS:
      after = as_signed(before) > as_signed(value) ? before : value;
      break;
    case Rmw::kMinS:
      after = as_signed(before) < as_signed(value) ? before : value;
      break;
    case Rmw::kExchange:
      after = value;
      break;
    case Rmw::kCas:
      after = before == expected ? value : before;
      break;
    case Rmw::kOr:
      after = before | value;
      break;
    case Rmw::kAnd:
      after = before & value;
      break;
  }
  std::memcpy(pointer, &after, bytes);
  if (Read(pointer, bytes) != before) rt.Progress();
  FlagState& state = StateOf(rt, pointer);
  AcquireFrom(state, order, scope);
  ReleaseTo(state, order, scope);
  rt.MaybeYield(4);
  return before;
}

void Fence(Scope, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber& me = *Runtime::Current();
  rt.Doing("fence", site);
  for (const Snapshot& snapshot : me.relaxed_loads) me.knowledge.Acquire(snapshot);
  me.relaxed_loads.clear();
  me.at_fence = me.knowledge.Release();
  me.has_fence = true;
  rt.MaybeYield(4);
}

void ProxyFence(Site site) {
  Runtime::Get()->Doing("proxy fence", site);
  Runtime::Current()->knowledge.ProxyFence();
}

uint64_t Time(Site site) {
  Runtime& rt = *Runtime::Get();
  rt.Doing("globaltimer", site);
  rt.Yield();
  return rt.stats.now_ns;
}

}  // namespace simt
