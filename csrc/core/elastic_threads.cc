#include "csrc/core/elastic_threads.h"

#include <chrono>
#include <thread>
#include <utility>

namespace wideep {
namespace {

constexpr std::chrono::seconds kIdleLifetime(30);

}  // namespace

ElasticThreads& ElasticThreads::Global() {
  static ElasticThreads* const threads = new ElasticThreads();
  return *threads;
}

void ElasticThreads::Run(std::function<void()> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  waiting_.push_back(std::move(work));
  if (waiting_.size() <= num_idle_) {
    wake_.notify_one();
  } else {
    // Counted as idle at once, so that the next call does not rely on this thread as well.
    ++num_idle_;
    std::thread([this] { ThreadLoop(); }).detach();
  }
}

void ElasticThreads::ThreadLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const bool found = wake_.wait_for(lock, kIdleLifetime, [this] { return !waiting_.empty(); });
    --num_idle_;
    if (!found) return;
    std::function<void()> work = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    work();
    work = nullptr;  // what it owns goes before the thread waits again
    lock.lock();
    ++num_idle_;
  }
}

}  // namespace wideep
