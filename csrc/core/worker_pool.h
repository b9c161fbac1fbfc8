// Fork without join: a few threads share the tasks of an exchange, and whoever finishes the last
// task runs the continuation. Nobody waits, so a pool of any size cannot deadlock.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace wideep {

class WorkerPool {
 public:
  /// `num_helpers` threads beside the calling one; 0 makes every Run sequential in its caller.
  explicit WorkerPool(int num_helpers);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  /// The pool of this process: one helper fewer than there are processors. Never destroyed, so that
  /// threads of the host program may still use it while the process exits.
  static WorkerPool& Global();

  /// Calls task(0) .. task(num_tasks - 1), in any order and on several threads, then `done` once,
  /// on the thread that finished last. The caller takes part and returns when no task is left to
  /// start, which may be before `done` has run. Tasks see IEEE denormals, whatever the caller's
  /// thread has set.
  void Run(int64_t num_tasks, std::function<void(int64_t)> task, std::function<void()> done);

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

 private:
  struct Job;
  static void Work(Job& job);
  void HelperLoop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;  // jobs with tasks left to start
  bool stopping_ = false;
  std::vector<std::thread> helpers_;
};

}  // namespace wideep
