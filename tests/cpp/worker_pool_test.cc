// The pool: every task once, the continuation once and after all of them, and nobody waits.
#include "csrc/core/worker_pool.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "csrc/core/float_env.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using check::Counter;

TEST(PoolRunsEveryTaskOnce) {
  for (const int num_helpers : {0, 1, 3}) {
    WorkerPool pool(num_helpers);
    CHECK_EQ(pool.num_threads(), num_helpers + 1);
    for (const int64_t num_tasks : {0, 1, 2, 3, 100, 1000}) {
      const Context context(Labelled("helpers", num_helpers) + ", " + Labelled("tasks", num_tasks));
      std::vector<std::atomic<int>> runs(num_tasks);
      std::atomic<int64_t> finished{0};
      int64_t finished_at_done = -1;
      Counter done;
      pool.Run(
          num_tasks,
          [&](int64_t task) {
            ++runs[task];
            ++finished;
          },
          [&] {
            finished_at_done = finished;
            done.Add();
          });
      CHECK(done.WaitFor(1));
      CHECK_EQ(finished_at_done, num_tasks);
      for (const std::atomic<int>& count : runs) CHECK_EQ(count.load(), 1);
      CHECK_EQ(done.count(), 1);
    }
  }
}

// Plain memory: what the tasks wrote must be visible to the continuation without more
// synchronisation.
TEST(PoolServesSeveralCallers) {
  WorkerPool pool(2);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&pool] {
      for (int repeat = 0; repeat < 100; ++repeat) {
        std::vector<int64_t> squares(17, 0);
        int64_t sum = 0;
        Counter done;
        pool.Run(
            17, [&](int64_t task) { squares[task] = task * task; },
            [&] {
              sum = std::accumulate(squares.begin(), squares.end(), int64_t{0});
              done.Add();
            });
        CHECK(done.WaitFor(1));
        CHECK_EQ(sum, 1496);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// A task may start another job and a continuation too: an exchange runs where the last rank
// arrived, which can be a thread of the pool.
TEST(PoolRunsNestedJobs) {
  WorkerPool pool(2);
  std::atomic<int> inner{0};
  Counter done;
  pool.Run(
      8, [&](int64_t) { pool.Run(8, [&](int64_t) { ++inner; }, [&] { done.Add(); }); },
      [&] { pool.Run(8, [&](int64_t) { ++inner; }, [&] { done.Add(); }); });
  CHECK(done.WaitFor(9));
  CHECK_EQ(inner.load(), 72);
}

// XLA's threads flush denormals, and threads that they start inherit it: tasks must not see that,
// and the caller gets back what it had set.
TEST(TasksSeeIeeeDenormals) {
  const unsigned long saved = GetFloatEnv();
  for (const int num_helpers : {0, 2}) {
    SetFloatEnv(saved | kFlushDenormals);
    {
      WorkerPool pool(num_helpers);
      std::atomic<int> num_flushing{0};
      std::atomic<int> num_here{0};
      const std::thread::id caller = std::this_thread::get_id();
      Counter done;
      pool.Run(
          64,
          [&](int64_t) {
            if (GetFloatEnv() & kFlushDenormals) ++num_flushing;
            if (std::this_thread::get_id() == caller) ++num_here;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          },
          [&] { done.Add(); });
      CHECK_EQ(GetFloatEnv(), saved | kFlushDenormals);
      CHECK(done.WaitFor(1));
      CHECK_EQ(num_flushing.load(), 0);
      CHECK(num_here > 0);
      if (num_helpers > 0) CHECK(num_here < 64);
    }
    SetFloatEnv(saved);
  }
}

}  // namespace
}  // namespace testing
}  // namespace wideep
