// Threads for work that may block: no work waits for other work.
#include "csrc/core/elastic_threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/cpp/check.h"

namespace wideep {
namespace testing {
namespace {

using check::Counter;

// Every work waits until all of them have started: with one thread too few, nobody would get on.
TEST(WorkThatBlocksHoldsUpNobody) {
  for (const int num_works : {1, 2, 40}) {
    std::mutex mutex;
    std::condition_variable changed;
    int num_started = 0;
    Counter done;
    for (int i = 0; i < num_works; ++i) {
      ElasticThreads::Global().Run([&] {
        {
          std::unique_lock<std::mutex> lock(mutex);
          ++num_started;
          changed.notify_all();
          changed.wait_for(lock, std::chrono::seconds(60),
                           [&] { return num_started == num_works; });
        }
        done.Add();
      });
    }
    CHECK(done.WaitFor(num_works));
    CHECK_EQ(num_started, num_works);
    CHECK_EQ(done.count(), num_works);
  }
}

// Work that starts work and waits for it, from several threads, on threads that are used again.
TEST(WorkMayWaitForWorkThatItStarts) {
  std::atomic<int> num_runs{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 100; ++repeat) {
        Counter outer;
        ElasticThreads::Global().Run([&] {
          Counter inner;
          ElasticThreads::Global().Run([&] {
            ++num_runs;
            inner.Add();
          });
          CHECK(inner.WaitFor(1));
          ++num_runs;
          outer.Add();
        });
        CHECK(outer.WaitFor(1));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(num_runs.load(), 600);
}

TEST(WorkRunsOnAnotherThread) {
  std::thread::id ran_on;
  Counter done;
  ElasticThreads::Global().Run([&] {
    ran_on = std::this_thread::get_id();
    done.Add();
  });
  CHECK(done.WaitFor(1));
  CHECK(ran_on != std::thread::id());
  CHECK(ran_on != std::this_thread::get_id());
}

}  // namespace
}  // namespace testing
}  // namespace wideep
