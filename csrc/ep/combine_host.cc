#include "csrc/ep/combine_host.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "csrc/ep/row_kernels.h"
#include "csrc/ep/token_tasks.h"

namespace wideep {

int OrderedSelections(const int32_t* dest_rank, int top_k, int* order) {
  int count = 0;
  for (int k = 0; k < top_k; ++k) {
    if (dest_rank[k] < 0) continue;
    int place = count++;
    for (; place > 0 && dest_rank[order[place - 1]] > dest_rank[k]; --place)
      order[place] = order[place - 1];
    order[place] = k;
  }
  return count;
}

namespace {

constexpr int64_t kPrefetchBytes = 512;

// The rows of one token, to be summed.
struct TokenRows {
  const void* rows[kMaxTopK];
  float weights[kMaxTopK];
  int count;

  // The start of each row: the sum fetches the rest as it goes.
  void Prefetch(int64_t row_bytes) const {
    const int64_t bytes = std::min(row_bytes, kPrefetchBytes);
    for (int i = 0; i < count; ++i) {
      for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(static_cast<const char*>(rows[i]) + at);
    }
  }
};

// out[token] = weighted sum of the rows that find(token, rows) names, for tokens [begin, end). The
// next token's rows are on their way while one's are summed.
template <typename Find>
void SumTokens(const CombineShape& shape, bool weighted, int64_t begin, int64_t end, void* out,
               Find&& find) {
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const RowKernels& kernels = SelectRowKernels();
  TokenRows found[2];
  const auto fetch = [&](int64_t token) {
    TokenRows& next = found[token % 2];
    find(token, next);
    next.Prefetch(row_bytes);
  };
  fetch(begin);
  for (int64_t token = begin; token < end; ++token) {
    if (token + 1 < end) fetch(token + 1);
    const TokenRows& now = found[token % 2];
    kernels.weighted_sum(shape.dtype, static_cast<char*>(out) + token * row_bytes, now.rows,
                         weighted ? now.weights : nullptr, now.count, shape.hidden);
  }
}

}  // namespace

void Combine(const CombineShape& shape, std::vector<CombineBuffers> buffers, WorkerPool& pool,
             std::function<void()> done) {
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(static_cast<int>(buffers.size()), shape.num_tokens,
                         row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<CombineBuffers>>(std::move(buffers));
  const auto task = [=](int64_t index) {
    const CombineBuffers& home = (*ranks)[tasks.rank(index)];
    if (home.masked || home.out == nullptr) return;
    const auto find = [&](int64_t token, TokenRows& found) {
      int order[kMaxTopK];
      const int64_t first = token * shape.top_k;
      const int count = OrderedSelections(home.dest_rank + first, shape.top_k, order);
      found.count = 0;
      for (int i = 0; i < count; ++i) {
        const CombineBuffers& expert = (*ranks)[home.dest_rank[first + order[i]]];
        if (expert.masked) continue;
        const int64_t row = home.dest_row[first + order[i]];
        found.rows[found.count] = static_cast<const char*>(expert.y) + row * row_bytes;
        found.weights[found.count++] = expert.row_weights[row];
      }
    };
    SumTokens(shape, /*weighted=*/true, tasks.begin(index), tasks.end(index), home.out, find);
  };
  pool.Run(tasks.num_tasks(), task, std::move(done));
}

void DispatchGrad(const CombineShape& shape, std::vector<DispatchGradBuffers> buffers,
                  WorkerPool& pool, std::function<void()> done) {
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(static_cast<int>(buffers.size()), shape.num_tokens,
                         row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<DispatchGradBuffers>>(std::move(buffers));
  const auto task = [=](int64_t index) {
    const DispatchGradBuffers& home = (*ranks)[tasks.rank(index)];
    if (home.masked || home.dx == nullptr) return;
    const auto find = [&](int64_t token, TokenRows& found) {
      int order[kMaxTopK];
      const int64_t first = token * shape.top_k;
      for (int64_t s = first; s < first + shape.top_k; ++s) home.dweights[s] = 0;
      const int count = OrderedSelections(home.dest_rank + first, shape.top_k, order);
      found.count = 0;
      for (int i = 0; i < count; ++i) {
        const int64_t s = first + order[i];
        const DispatchGradBuffers& expert = (*ranks)[home.dest_rank[s]];
        if (expert.masked) continue;
        found.rows[found.count++] =
            static_cast<const char*>(expert.drows) + home.dest_row[s] * row_bytes;
        home.dweights[s] = expert.drow_weights[home.dest_row[s]];
      }
    };
    SumTokens(shape, /*weighted=*/false, tasks.begin(index), tasks.end(index), home.dx, find);
  };
  pool.Run(tasks.num_tasks(), task, std::move(done));
}

void EmptyCombine(const CombineShape& shape, const CombineBuffers& rank) {
  std::memset(rank.out, 0, shape.num_tokens * shape.hidden * SizeOf(shape.dtype));
}

void EmptyDispatchGrad(const CombineShape& shape, const DispatchGradBuffers& rank) {
  std::memset(rank.dx, 0, shape.num_tokens * shape.hidden * SizeOf(shape.dtype));
  std::fill_n(rank.dweights, shape.num_tokens * shape.top_k, 0.0f);
}

}  // namespace wideep
