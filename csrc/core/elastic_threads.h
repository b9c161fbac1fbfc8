// Threads for work that may block: a completion resumes whatever XLA scheduled behind it, up to and
// including its own collectives, which wait for the other ranks. Work never queues behind work: it
// goes to an idle thread, or to a new one. Idle threads end after a while.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>

namespace wideep {

class ElasticThreads {
 public:
  /// The threads of this process; never destroyed.
  static ElasticThreads& Global();

  /// Runs `work` soon, on a thread of its own.
  void Run(std::function<void()> work);

 private:
  void ThreadLoop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> waiting_;  // each has an idle thread on its way to it
  size_t num_idle_ = 0;
};

}  // namespace wideep
