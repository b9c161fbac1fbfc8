// mbarriers and bulk copies. A copy is made in two steps at random times: it reads, it writes.
#include <algorithm>
#include <cstring>

#include "tests/simt/runtime.h"

namespace simt {
namespace {

char* SharedPointer(Runtime& rt, uint32_t smem, int64_t num_bytes, int64_t alignment,
                    const char* what, Site site) {
  Block& block = *Runtime::Current()->block;
  if (smem < kSharedStart) {
    rt.Fail(site, std::string(what) + ": " + std::to_string(smem) + " is no shared address");
  }
  char* const pointer = block.shared + (smem - kSharedStart);
  rt.CheckRange(pointer, num_bytes, alignment, what, site);
  return pointer;
}

// An mbarrier's eight bytes hold this, so that a write over them is noticed.
constexpr uint64_t kMagic = 0x6d62617272696572;

Mbarrier& Find(Runtime& rt, Block& block, uint32_t smem, Site site) {
  const auto found = block.mbarriers.find(smem);
  uint64_t magic = 0;
  if (found != block.mbarriers.end()) {
    std::memcpy(&magic, block.shared + (smem - kSharedStart), 8);
  }
  if (magic != kMagic) {
    rt.Fail(site, found == block.mbarriers.end() ? "this mbarrier was not initialised"
                                                 : "something was written over this mbarrier");
  }
  return found->second;
}

void CompleteIfDone(Runtime& rt, Mbarrier& m) {
  if (m.pending != 0 || m.tx_bytes != 0) return;
  ++m.phase;
  m.pending = m.count;
  m.done_arrivals = std::move(m.arrivals);
  m.done_copies = std::move(m.copies);
  m.arrivals.clear();
  m.copies.clear();
  rt.Progress();
}

void CheckCopy(Runtime& rt, uint32_t bytes, const char* what, Site site) {
  if (bytes == 0 || bytes % 16 != 0) {
    rt.Fail(site, std::string(what) + ": size " + std::to_string(bytes) +
                      " is no positive multiple of 16");
  }
}

/// Steps until a copy goes on: often few, sometimes thousands.
int64_t CopyDelay(Runtime& rt) { return rt.random.Below(1u << rt.random.Below(13)); }

void Issue(Runtime& rt, BulkCopy copy) {
  Fiber& me = *Runtime::Current();
  copy.slot = 1 + rt.next_copy_slot++ % Runtime::kCopySlots;
  copy.clock = rt.clocks[copy.slot] + 1;
  rt.clocks[copy.slot] += 2;
  copy.block = me.block;
  copy.not_before = rt.stats.steps + CopyDelay(rt);
  const uint32_t place = rt.PlaceOf(copy.site);
  rt.LogCopyAccess(copy.from, copy.bytes, /*write=*/false, copy.slot, copy.clock, place);
  rt.LogCopyAccess(copy.to, copy.bytes, /*write=*/true, copy.slot, copy.clock + 1, place);
  ++me.block->pending_copies;
  ++me.block->kernel->pending_copies;
  rt.copies.push_back(std::move(copy));
  rt.MaybeYield(4);
}

}  // namespace

void MbarrierInit(uint32_t smem, uint32_t arrivals, Site site) {
  Runtime& rt = *Runtime::Get();
  Block& block = *Runtime::Current()->block;
  rt.Doing("mbarrier_init", site);
  char* pointer = SharedPointer(rt, smem, 8, 8, "mbarrier_init", site);
  if (block.mbarriers.count(smem)) rt.Fail("this mbarrier is initialised twice");
  if (arrivals == 0) rt.Fail("an mbarrier of 0 arrivals");
  rt.LogAccess(pointer, 8, AccessLog::kWrite, rt.PlaceOf(site));
  std::memcpy(pointer, &kMagic, 8);
  Mbarrier& m = block.mbarriers[smem];
  m.count = m.pending = arrivals;
}

void MbarrierArrive(uint32_t smem, uint32_t expect_bytes, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber& me = *Runtime::Current();
  rt.Doing("mbarrier_arrive", site);
  rt.MaybeYield(8);
  Mbarrier& m = Find(rt, *me.block, smem, site);
  rt.LogAccess(me.block->shared + (smem - kSharedStart), 8, AccessLog::kRead | AccessLog::kAtomic,
               rt.PlaceOf(site));
  if (m.pending == 0) rt.Fail("more arrivals at an mbarrier than its phase expects");
  m.tx_bytes += expect_bytes;
  --m.pending;
  m.arrivals.push_back(me.knowledge.Release());
  CompleteIfDone(rt, m);
  rt.MaybeYield(4);
}

bool MbarrierTryWait(uint32_t smem, uint32_t parity, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber& me = *Runtime::Current();
  rt.Doing("mbarrier_try_wait", site);
  if (parity > 1) rt.Fail("the parity of a wait must be 0 or 1, got " + std::to_string(parity));
  rt.Yield();
  Mbarrier& m = Find(rt, *me.block, smem, site);
  rt.LogAccess(me.block->shared + (smem - kSharedStart), 8, AccessLog::kRead | AccessLog::kAtomic,
               rt.PlaceOf(site));
  if ((m.phase & 1) == parity) return false;
  if (m.phase > 0) {
    for (const Snapshot& snapshot : m.done_arrivals) me.knowledge.Acquire(snapshot);
    for (const auto& [slot, clock] : m.done_copies) me.knowledge.AcquireCopy(slot, clock);
  }
  return true;
}

void BulkLoad(uint32_t smem, const void* pointer, uint32_t bytes, uint32_t mbarrier, Site site) {
  Runtime& rt = *Runtime::Get();
  rt.Doing("bulk load", site);
  CheckCopy(rt, bytes, "bulk load", site);
  BulkCopy copy;
  copy.is_load = true;
  copy.site = site;
  copy.to = SharedPointer(rt, smem, bytes, 16, "bulk load", site);
  rt.CheckRange(pointer, bytes, 16, "bulk load", site);
  if (!rt.InDevice(pointer)) rt.Fail("bulk load: not from global memory");
  Find(rt, *Runtime::Current()->block, mbarrier, site);
  copy.from = static_cast<const char*>(pointer);
  copy.bytes = bytes;
  copy.mbarrier = mbarrier;
  Issue(rt, std::move(copy));
}

void BulkStore(void* pointer, uint32_t smem, uint32_t bytes, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber& me = *Runtime::Current();
  rt.Doing("bulk store", site);
  CheckCopy(rt, bytes, "bulk store", site);
  BulkCopy copy;
  copy.site = site;
  copy.from = SharedPointer(rt, smem, bytes, 16, "bulk store", site);
  rt.CheckRange(pointer, bytes, 16, "bulk store", site);
  if (!rt.InDevice(pointer)) rt.Fail("bulk store: not to global memory");
  copy.to = static_cast<char*>(pointer);
  copy.bytes = bytes;
  if (!me.open_group) me.open_group = std::make_shared<CopyGroup>();
  copy.group = me.open_group;
  ++copy.group->unread;
  ++copy.group->unwritten;
  // As Issue will number it.
  const uint32_t slot = 1 + rt.next_copy_slot % Runtime::kCopySlots;
  copy.group->clocks.emplace_back(slot, rt.clocks[slot] + 1);
  Issue(rt, std::move(copy));
}

void BulkCommit() {
  Fiber& me = *Runtime::Current();
  if (!me.open_group) me.open_group = std::make_shared<CopyGroup>();
  me.groups.push_back(std::move(me.open_group));
  me.open_group.reset();
}

void BulkWait(int pending, bool read_only, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber& me = *Runtime::Current();
  rt.Doing(read_only ? "bulk wait_group.read" : "bulk wait_group", site);
  const int64_t num_groups = static_cast<int64_t>(me.groups.size()) - pending;
  for (int64_t i = read_only ? me.num_read : 0; i < num_groups; ++i) {
    const CopyGroup& group = *me.groups[i];
    while ((read_only ? group.unread : group.unwritten) > 0) rt.Yield();
    for (const auto& [slot, clock] : group.clocks) {
      me.knowledge.AcquireCopy(slot, read_only ? clock : clock + 1);
    }
  }
  me.num_read = std::max(me.num_read, num_groups);
  if (!read_only && num_groups > 0) {
    me.groups.erase(me.groups.begin(), me.groups.begin() + num_groups);
    me.num_read -= num_groups;
  }
}

bool Runtime::StepSomeCopy(bool nothing_else) {
  if (copies.empty()) return false;
  const uint32_t chosen = random.Below(static_cast<uint32_t>(copies.size()));
  BulkCopy& copy = copies[chosen];
  if (stats.steps < copy.not_before && !nothing_else) return true;
  Progress();
  if (!copy.read_done) {
    copy.not_before = stats.steps + CopyDelay(*this);
    copy.staged.assign(copy.from, copy.from + copy.bytes);
    copy.read_done = true;
    if (!copy.is_load) {
      --copy.block->pending_copies;
      --copy.group->unread;
    }
    return true;
  }
  std::memcpy(copy.to, copy.staged.data(), copy.bytes);
  KernelRun& kernel = *copy.block->kernel;
  if (copy.is_load) {
    Mbarrier& m = Find(*this, *copy.block, copy.mbarrier, copy.site);
    if (!failure.empty()) return true;
    m.tx_bytes -= copy.bytes;
    m.copies.emplace_back(copy.slot, copy.clock + 1);
    CompleteIfDone(*this, m);
    --copy.block->pending_copies;
  } else {
    --copy.group->unwritten;
  }
  Raise(kernel.after, copy.slot, copy.clock + 1);
  --kernel.pending_copies;
  ++stats.copies;
  std::swap(copies[chosen], copies.back());
  copies.pop_back();
  return true;
}

void Runtime::DropCopies(KernelRun* kernel) {
  copies.erase(std::remove_if(copies.begin(), copies.end(),
                              [kernel](const BulkCopy& c) { return c.block->kernel == kernel; }),
               copies.end());
}

}  // namespace simt
