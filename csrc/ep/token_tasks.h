// How an exchange over the tokens of all ranks is cut into tasks for the worker pool.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wideep {

class TokenTasks {
 public:
  /// Tasks of about kBytesPerTask each; a task never spans two ranks.
  TokenTasks(int num_ranks, int64_t num_tokens, int64_t bytes_per_token)
      : num_tokens_(num_tokens),
        tokens_per_task_(
            std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_token))),
        tasks_per_rank_((num_tokens + tokens_per_task_ - 1) / tokens_per_task_),
        num_tasks_(num_ranks * tasks_per_rank_) {}

  int64_t num_tasks() const { return num_tasks_; }
  int rank(int64_t task) const { return static_cast<int>(task / tasks_per_rank_); }
  int64_t begin(int64_t task) const { return task % tasks_per_rank_ * tokens_per_task_; }
  int64_t end(int64_t task) const { return std::min(num_tokens_, begin(task) + tokens_per_task_); }

 private:
  static constexpr int64_t kBytesPerTask = 1 << 20;
  int64_t num_tokens_;
  int64_t tokens_per_task_;
  int64_t tasks_per_rank_;
  int64_t num_tasks_;
};

/// Above this many bytes moved, rows are written past the cache: they would not stay in it.
constexpr int64_t kStreamBytes = 32 << 20;

}  // namespace wideep
