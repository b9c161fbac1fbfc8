#include "csrc/core/worker_pool.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "csrc/core/float_env.h"

namespace wideep {

struct WorkerPool::Job {
  int64_t num_tasks;
  std::function<void(int64_t)> task;
  std::function<void()> done;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> finished{0};
};

WorkerPool::WorkerPool(int num_helpers) {
  for (int i = 0; i < num_helpers; ++i) helpers_.emplace_back([this] { HelperLoop(); });
}

WorkerPool::~WorkerPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

WorkerPool& WorkerPool::Global() {
  static WorkerPool* const pool =
      new WorkerPool(std::max(1, static_cast<int>(std::thread::hardware_concurrency())) - 1);
  return *pool;
}

void WorkerPool::Work(Job& job) {
  ScopedIeeeDenormals denormals;
  for (;;) {
    const int64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= job.num_tasks) return;
    job.task(index);
    // acq_rel: what every task wrote is visible to the continuation.
    if (job.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == job.num_tasks) job.done();
  }
}

void WorkerPool::Run(int64_t num_tasks, std::function<void(int64_t)> task,
                     std::function<void()> done) {
  if (num_tasks <= 1 || helpers_.empty()) {
    {
      ScopedIeeeDenormals denormals;
      for (int64_t i = 0; i < num_tasks; ++i) task(i);
    }
    done();
    return;
  }
  auto job = std::make_shared<Job>();
  job->num_tasks = num_tasks;
  job->task = std::move(task);
  job->done = std::move(done);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(job);
  }
  wake_.notify_all();
  Work(*job);
  std::lock_guard<std::mutex> lock(mutex_);
  jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
}

void WorkerPool::HelperLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    std::shared_ptr<Job> job = jobs_.front();
    lock.unlock();
    Work(*job);
    lock.lock();
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
  }
}

}  // namespace wideep
