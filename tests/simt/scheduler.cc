// Who runs next, and the report when nobody can.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <sstream>

#include "tests/simt/runtime.h"

// Of the thread that runs.
uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace simt {
namespace {

Fiber* current = nullptr;
StackPool stacks;

// Time doubles its speed every 1024 steps: enough to get past deadlines of hours.
constexpr int64_t kStepsToDeadlock = 200'000;

}  // namespace

Fiber* Runtime::Current() { return current; }

std::string NameOf(Site site) {
  const char* name = std::strstr(site.file, "csrc/");
  return std::string(name ? name : site.file) + ":" + std::to_string(site.line);
}

std::string Hex(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

void Runtime::Yield() {
  Fiber* const fiber = current;
  SwitchTo(fiber->context, scheduler);
}

void Runtime::Suspend() {
  Fiber* const fiber = current;
  Fiber* const moved = runnable.back();
  runnable[fiber->runnable_at] = moved;
  moved->runnable_at = fiber->runnable_at;
  runnable.pop_back();
  fiber->runnable_at = -1;
  SwitchTo(fiber->context, scheduler);
}

void Runtime::Wake(Fiber* fiber) {
  if (fiber->runnable_at >= 0) return;
  fiber->runnable_at = static_cast<int>(runnable.size());
  runnable.push_back(fiber);
}

void Runtime::Fail(Site site, const std::string& text) {
  if (current) current->site = site;
  Fail(text);
}

void Runtime::Fail(const std::string& text) {
  if (failure.empty()) {
    std::ostringstream out;
    out << text;
    if (current) {
      out << "\n  in " << current->block->kernel->name << ", rank " << current->block->kernel->rank
          << ", block " << current->block->index << ", thread " << current->thread
          << ", at or after " << NameOf(current->site);
    }
    out << "\n  seed " << options.seed << ", step " << stats.steps;
    failure = out.str();
  }
  if (current) SwitchTo(current->context, scheduler);
}

void Runtime::FiberMain() {
  Fiber* const fiber = current;
  fiber->block->kernel->body();
  Get()->FinishFiber(fiber);
  fiber->finished = true;
  Get()->Suspend();
}

void Runtime::FinishFiber(Fiber* fiber) {
  SettleDoubt();
  if (fiber->open_group) {
    Fail("a thread ended with bulk stores that it did not commit to a group");
  }
  Progress();
  fiber->doing = "ended";
  Block& block = *fiber->block;
  fiber->knowledge.AddTo(block.kernel->after);
  --block.live;
  LeaveBarriers(fiber);
  if (block.live > 0) return;
  if (block.pending_copies > 0) {
    Fail("the block ended while " + std::to_string(block.pending_copies) +
         " bulk copies still use its shared memory: wait for them");
  }
  --block.kernel->live_blocks;
}

void Runtime::StartKernels() {
  for (Stream& stream : streams) {
    if (stream.running || stream.queue.empty() || stream.killed) continue;
    if (stats.now_ns < stream.start_ns) continue;
    stream.running = std::move(stream.queue.front());
    stream.queue.pop_front();
    KernelRun& kernel = *stream.running;
    kernel.live_blocks = kernel.grid_blocks;
    if (stream.before) kernel.after = *stream.before;
    ++stats.kernels;
    for (int b = 0; b < kernel.grid_blocks; ++b) {
      auto block = std::make_unique<Block>();
      block->kernel = &kernel;
      block->index = b;
      block->shared = shared_begin + (int64_t{stream.rank} * kMaxBlocks + b) * kSharedStride;
      std::memset(block->shared, Device::kPoison, kernel.shared_bytes);
      block->live = kernel.block_threads;
      block->warps.resize(kernel.block_threads / kWarpLanes);
      const uint32_t first_slot = FirstSlot(stream.rank, b, kernel.block_threads);
      for (int t = 0; t < kernel.block_threads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = block.get();
        fiber->thread = t;
        fiber->stack = stacks.Take();
        const uint32_t slot = first_slot + t;
        fiber->knowledge.Start(slot, ++clocks[slot], stream.before);
        Prepare(fiber->context, fiber->stack, StackPool::kStackBytes, FiberMain);
        Wake(fiber.get());
        block->fibers.push_back(std::move(fiber));
      }
      kernel.blocks.push_back(std::move(block));
    }
    Progress();
  }
}

void Runtime::ReturnFibers(Stream& stream) {
  for (const auto& block : stream.running->blocks) {
    for (const auto& fiber : block->fibers) {
      stacks.Return(fiber->stack);
      clocks[fiber->knowledge.slot()] = fiber->knowledge.own();
    }
  }
}

void Runtime::FinishKernel(Stream& stream) {
  last = nullptr;
  ReturnFibers(stream);
  stream.before = std::make_shared<Clocks>(std::move(stream.running->after));
  stream.running.reset();
  Progress();
}

void Runtime::Kill(Stream& stream) {
  stream.killed = true;
  stream.queue.clear();
  if (!stream.running) return;
  DropCopies(stream.running.get());
  for (const auto& block : stream.running->blocks) {
    for (const auto& fiber : block->fibers) {
      if (fiber->runnable_at < 0) continue;
      Fiber* const moved = runnable.back();
      runnable[fiber->runnable_at] = moved;
      moved->runnable_at = fiber->runnable_at;
      runnable.pop_back();
    }
  }
  FinishKernel(stream);
}

bool Runtime::StandsStill(const Fiber* fiber) {
  const Block& block = *fiber->block;
  if (block.kernel->rank == options.slow_rank && !random.OneIn(16)) return true;
  return block.kernel->rank == still_rank && (still_block < 0 || block.index == still_block) &&
         (still_warp < 0 || static_cast<int>(fiber->thread / kWarpLanes) == still_warp) &&
         (still_thread < 0 || static_cast<int>(fiber->thread) == still_thread);
}

void Runtime::ChooseWhoStandsStill() {
  if (stats.steps < still_until || idle_steps >= StepsUntilIdle()) return;
  still_rank = still_block = still_warp = still_thread = -1;
  const auto num_threads = static_cast<uint32_t>(runnable.size());
  still_until = stats.steps + 200 + random.Below(20 * num_threads);
  if (!options.starve || num_threads == 0 || random.OneIn(2)) return;
  const Fiber* victim = runnable[random.Below(num_threads)];
  const uint32_t how = random.Below(4);
  still_rank = victim->block->kernel->rank;
  if (how >= 1) still_block = victim->block->index;
  if (how >= 2) still_warp = static_cast<int>(victim->thread / kWarpLanes);
  if (how >= 3) still_thread = static_cast<int>(victim->thread);
}

/// By then every thread that can run has had its turns, also one that runs rarely.
int64_t Runtime::StepsUntilIdle() const {
  return 20'000 + 400 * static_cast<int64_t>(runnable.size());
}

/// Nothing but polling: time runs faster and faster, until deadlines pass.
void Runtime::HurryIfIdle() {
  if (idle_steps % 1024 != 0 || idle_steps < StepsUntilIdle()) return;
  still_rank = still_block = still_warp = still_thread = -1;
  if (time_step < 1'000'000'000) time_step *= 2;
}

Fiber* Runtime::Pick() {
  // Lanes of a warp mostly go together, as on hardware; how much so differs between seeds.
  if (last && last->runnable_at < 0 && random.Below(8) < same_warp_odds) {
    const Block& block = *last->block;
    const uint32_t lane = last->thread % kWarpLanes;
    Fiber* next = block.fibers[last->thread - lane + (lane + 1) % kWarpLanes].get();
    if (next->runnable_at >= 0 && !StandsStill(next)) return next;
  }
  Fiber* fiber = nullptr;
  for (int tries = 0; tries < 16; ++tries) {
    fiber = runnable[random.Below(static_cast<uint32_t>(runnable.size()))];
    if (!StandsStill(fiber)) break;
  }
  return fiber;
}

std::string Runtime::RunAll() {
  if (!failure.empty()) return "this device has failed before: " + failure;
  // The host has waited for everything.
  auto before = std::make_shared<Clocks>();
  for (const Stream& stream : streams) {
    if (stream.before) Join(*before, *stream.before);
  }
  for (Stream& stream : streams) stream.before = before;
  const int64_t last_step = stats.steps + options.max_steps;
  Progress();
  while (failure.empty()) {
    bool anything = false;
    for (Stream& stream : streams) {
      if (stream.running && stream.running->live_blocks == 0 &&
          stream.running->pending_copies == 0) {
        FinishKernel(stream);
      }
      if (!stream.killed && stats.now_ns >= stream.kill_ns) Kill(stream);
      anything = anything || stream.running || !stream.queue.empty();
    }
    if (!anything) break;
    StartKernels();

    // A burst without looking at the streams again, unless a block ends.
    for (int burst = 0; burst < 64 && failure.empty(); ++burst) {
      stats.now_ns += time_step;
      ++stats.steps;
      ++idle_steps;
      ChooseWhoStandsStill();
      HurryIfIdle();
      if (!copies.empty() && random.OneIn(runnable.size() < 4 ? 2 : 8)) {
        StepSomeCopy(/*nothing_else=*/idle_steps > 20'000);
      }
      if (runnable.empty()) {
        if (StepSomeCopy(/*nothing_else=*/true)) continue;
        break;
      }
      current = last = Pick();
      const Block& block = *current->block;
      threadIdx.x = current->thread;
      blockIdx.x = block.index;
      blockDim.x = block.kernel->block_threads;
      gridDim.x = block.kernel->grid_blocks;
      SwitchTo(scheduler, current->context);
      current = nullptr;
      if (last->finished && block.live == 0) break;
    }
    if (!failure.empty()) break;

    if (runnable.empty()) {
      bool stuck = true;  // unless a kernel is about to end, start, or be killed
      uint64_t next_ns = ~uint64_t{0};
      for (const Stream& stream : streams) {
        if (stream.running && stream.running->live_blocks == 0) stuck = false;
        if (stream.running && !stream.killed) next_ns = std::min(next_ns, stream.kill_ns);
        if (!stream.running && !stream.queue.empty()) next_ns = std::min(next_ns, stream.start_ns);
      }
      if (stuck && next_ns == ~uint64_t{0}) Deadlock("no thread can run");
      if (stuck) stats.now_ns = std::max(stats.now_ns, next_ns);
    }
    const int64_t allowed =
        options.max_idle_steps > 0 ? options.max_idle_steps : StepsUntilIdle() + kStepsToDeadlock;
    if (idle_steps > allowed) Deadlock("threads poll, and nothing changes");
    if (stats.steps > last_step) Deadlock("max_steps are over");
  }
  if (failure.empty()) CheckGuards();
  return failure;
}

void Runtime::Deadlock(const char* why) {
  std::ostringstream out;
  out << "deadlock: " << why;
  for (const Stream& stream : streams) {
    if (!stream.running) {
      out << "\n  rank " << stream.rank << ": no kernel runs, " << stream.queue.size() << " queued";
      continue;
    }
    for (const auto& block : stream.running->blocks) {
      // Threads that do the same, as ranges.
      const auto text_of = [](const Fiber& f) {
        return std::string(f.doing) + (f.site.line ? " at " + NameOf(f.site) : "") +
               (f.mask == 0 ? "" : " with mask " + Hex(f.mask));
      };
      const auto& fibers = block->fibers;
      for (size_t t = 0; t < fibers.size();) {
        const std::string text = text_of(*fibers[t]);
        size_t end = t + 1;
        while (end < fibers.size() && text_of(*fibers[end]) == text) ++end;
        out << "\n  rank " << stream.rank << ", " << stream.running->name << ", block "
            << block->index << ", thread" << (end - t > 1 ? "s " : " ") << t;
        if (end - t > 1) out << " to " << end - 1;
        out << ": " << text;
        t = end;
      }
    }
  }
  Fail(out.str());
}

}  // namespace simt
