// Barriers of a block, and collectives of a warp.
#include <algorithm>

#include "tests/simt/runtime.h"

namespace simt {
namespace {

const char* NameOf(WarpOp op) {
  switch (op) {
    case WarpOp::kSync:
      return "__syncwarp";
    case WarpOp::kShuffle:
      return "__shfl_sync";
    case WarpOp::kShuffleUp:
      return "__shfl_up_sync";
    case WarpOp::kShuffleDown:
      return "__shfl_down_sync";
    case WarpOp::kShuffleXor:
      return "__shfl_xor_sync";
    case WarpOp::kBallot:
      return "a vote";
    case WarpOp::kMatch:
      return "__match_any_sync";
    default:
      return "__reduce_*_sync";
  }
}

bool SameSite(Site a, Site b) { return a.line == b.line && std::string(a.file) == b.file; }

void Release(Runtime& rt, NamedBarrier& barrier) {
  rt.Progress();
  std::vector<Knowledge*> parties;
  for (Fiber* fiber : barrier.waiting) parties.push_back(&fiber->knowledge);
  Knowledge::Meet(parties);
  for (Fiber* fiber : barrier.waiting) rt.Wake(fiber);
  barrier.waiting.clear();
}

/// The lane that a shuffle reads; `lane` itself where that would leave the segment.
uint32_t SourceLane(const WarpMeeting& m, uint32_t lane) {
  const auto width = static_cast<uint32_t>(m.width);
  const uint32_t segment = lane / width * width;
  const uint32_t by = m.lanes[lane];
  switch (m.op) {
    case WarpOp::kShuffle:
      return segment + by % width;
    case WarpOp::kShuffleUp:
      return lane - segment >= by ? lane - by : lane;
    case WarpOp::kShuffleDown:
      return lane + by < segment + width ? lane + by : lane;
    default:
      return (lane ^ by) < segment + width ? lane ^ by : lane;
  }
}

uint64_t Reduce(const WarpMeeting& m) {
  uint32_t result = 0;
  bool first = true;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(m.arrived >> lane & 1)) continue;
    const auto v = static_cast<uint32_t>(m.values[lane]);
    const auto signed_max = [](uint32_t a, uint32_t b) {
      return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b;
    };
    const auto signed_min = [](uint32_t a, uint32_t b) {
      return static_cast<int32_t>(a) < static_cast<int32_t>(b) ? a : b;
    };
    if (first) {
      result = v;
    } else if (m.op == WarpOp::kAddU32) {
      result += v;
    } else if (m.op == WarpOp::kMaxU32) {
      result = std::max(result, v);
    } else if (m.op == WarpOp::kMinU32) {
      result = std::min(result, v);
    } else if (m.op == WarpOp::kMaxS32) {
      result = signed_max(result, v);
    } else if (m.op == WarpOp::kMinS32) {
      result = signed_min(result, v);
    } else if (m.op == WarpOp::kAnd) {
      result &= v;
    } else {
      result |= v;
    }
    first = false;
  }
  return result;
}

/// What `lane` gets; sets `bad_lane` where it reads a lane that does not take part.
uint64_t ResultOf(const WarpMeeting& m, uint32_t lane, int& bad_lane) {
  switch (m.op) {
    case WarpOp::kSync:
      return 0;
    case WarpOp::kShuffle:
    case WarpOp::kShuffleUp:
    case WarpOp::kShuffleDown:
    case WarpOp::kShuffleXor: {
      const uint32_t source = SourceLane(m, lane);
      if (!(m.arrived >> source & 1)) bad_lane = static_cast<int>(source);
      return m.values[source];
    }
    case WarpOp::kBallot:
    case WarpOp::kMatch: {
      uint32_t lanes = 0;
      for (int other = 0; other < kWarpLanes; ++other) {
        if (!(m.arrived >> other & 1)) continue;
        const bool yes =
            m.op == WarpOp::kBallot ? m.values[other] != 0 : m.values[other] == m.values[lane];
        if (yes) lanes |= 1u << other;
      }
      return lanes;
    }
    default:
      return Reduce(m);
  }
}

/// Gives everyone in meeting `i` of the warp their results. `me` is not woken.
void Complete(Runtime& rt, Block& block, int warp_index, size_t i, Fiber* me) {
  Warp& warp = block.warps[warp_index];
  const WarpMeeting m = warp.meetings[i];
  warp.meetings.erase(warp.meetings.begin() + static_cast<int64_t>(i));
  rt.Progress();
  std::vector<Knowledge*> parties;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(m.arrived >> lane & 1)) continue;
    Fiber* fiber = block.fibers[warp_index * kWarpLanes + lane].get();
    int bad_lane = -1;
    fiber->result = ResultOf(m, lane, bad_lane);
    if (bad_lane >= 0) {
      rt.Fail(m.site, std::string(NameOf(m.op)) + " with mask " + Hex(m.mask) + ": lane " +
                          std::to_string(lane) + " reads lane " + std::to_string(bad_lane) +
                          ", which does not take part");
    }
    parties.push_back(&fiber->knowledge);
    if (fiber != me) rt.Wake(fiber);
  }
  if (m.op == WarpOp::kSync) Knowledge::Meet(parties);
}

}  // namespace

void BarSync(uint32_t id, uint32_t num_threads, const char* what, Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber* const me = Runtime::Current();
  Block& block = *me->block;
  rt.Doing(what, site);
  const bool whole_block = num_threads == 0;
  if (id >= kNamedBarriers || num_threads % kWarpLanes != 0 ||
      static_cast<int>(num_threads) > block.kernel->block_threads) {
    rt.Fail("bar_sync(" + std::to_string(id) + ", " + std::to_string(num_threads) +
            "): the number must be below 16, and the threads a multiple of 32 of the block's");
  }
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.waiting.empty()) {
    barrier.whole_block = whole_block;
    barrier.expected = num_threads;
    barrier.site = site;
  } else if (barrier.whole_block != whole_block || barrier.expected != num_threads) {
    rt.Fail("barrier " + std::to_string(id) + ": threads disagree on how many wait; thread " +
            std::to_string(barrier.waiting[0]->thread) + " at " + NameOf(barrier.site));
  } else if (whole_block && !SameSite(barrier.site, site)) {
    rt.Fail("divergent " + std::string(what) + ": thread " +
            std::to_string(barrier.waiting[0]->thread) + " waits at " + NameOf(barrier.site));
  }
  barrier.waiting.push_back(me);
  const auto arrived = static_cast<uint32_t>(barrier.waiting.size());
  if (arrived == (whole_block ? static_cast<uint32_t>(block.live) : num_threads)) {
    Release(rt, barrier);
    rt.Yield();
  } else {
    rt.Suspend();
  }
  me->doing = "runs after a barrier";
}

void SyncThreads(Site site) { BarSync(0, 0, "__syncthreads", site); }

uint64_t WarpMeet(WarpOp op, uint32_t mask, uint64_t value, uint32_t lane_arg, int width,
                  Site site) {
  Runtime& rt = *Runtime::Get();
  Fiber* const me = Runtime::Current();
  Block& block = *me->block;
  const auto warp_index = static_cast<int>(me->thread / kWarpLanes);
  const uint32_t lane = me->thread % kWarpLanes;
  Warp& warp = block.warps[warp_index];
  rt.Doing(NameOf(op), site);
  me->mask = mask;
  if (!(mask >> lane & 1)) {
    rt.Fail(std::string(NameOf(op)) + ": lane " + std::to_string(lane) + " is not in its mask " +
            Hex(mask));
  }
  if (width < 1 || width > kWarpLanes || (width & (width - 1)) != 0) {
    rt.Fail(std::string(NameOf(op)) + ": width " + std::to_string(width) +
            " is no power of two up to 32");
  }
  size_t i = 0;
  while (i < warp.meetings.size() && warp.meetings[i].mask != mask) {
    const WarpMeeting& other = warp.meetings[i];
    if ((other.mask >> lane & 1) && (other.arrived & mask)) {
      rt.Fail("masks of a warp disagree: " + std::string(NameOf(op)) + " with mask " + Hex(mask) +
              " while lanes " + Hex(other.arrived) + " wait in " + NameOf(other.op) +
              " with mask " + Hex(other.mask) + " at " + NameOf(other.site));
    }
    ++i;
  }
  if (i == warp.meetings.size()) {
    warp.meetings.emplace_back();
    warp.meetings[i].op = op;
    warp.meetings[i].mask = mask;
    warp.meetings[i].site = site;
    warp.meetings[i].width = width;
  }
  WarpMeeting& m = warp.meetings[i];
  if (m.op != op || m.width != width || (op != WarpOp::kSync && !SameSite(m.site, site))) {
    rt.Fail("divergent warp: " + std::string(NameOf(op)) + " while lanes " + Hex(m.arrived) +
            " wait in " + NameOf(m.op) + " at " + NameOf(m.site));
  }
  m.arrived |= 1u << lane;
  m.values[lane] = value;
  m.lanes[lane] = lane_arg;
  if (m.arrived == (mask & warp.live)) {
    Complete(rt, block, warp_index, i, me);
    rt.MaybeYield(2);
  } else {
    rt.Suspend();
  }
  me->doing = "runs after a warp collective";
  me->mask = 0;
  return me->result;
}

/// Those who wait for a thread that has ended wait no longer.
void Runtime::LeaveBarriers(Fiber* fiber) {
  Block& block = *fiber->block;
  const auto warp_index = static_cast<int>(fiber->thread / kWarpLanes);
  Warp& warp = block.warps[warp_index];
  warp.live &= ~(1u << fiber->thread % kWarpLanes);
  for (size_t i = 0; i < warp.meetings.size();) {
    const WarpMeeting& m = warp.meetings[i];
    if (m.arrived == (m.mask & warp.live)) {
      Complete(*this, block, warp_index, i, nullptr);
    } else {
      ++i;
    }
  }
  for (NamedBarrier& barrier : block.barriers) {
    if (barrier.whole_block && !barrier.waiting.empty() &&
        static_cast<int>(barrier.waiting.size()) == block.live) {
      Release(*this, barrier);
    }
  }
}

}  // namespace simt
