#include "csrc/ep/combine_host.h"

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
    for (; place > 0 && dest_rank[order[place - 1]] > dest_rank[k]; --place) order[place] = order[place - 1];
    order[place] = k;
  }
  return count;
}

void Combine(const CombineShape& shape, std::vector<CombineBuffers> buffers, WorkerPool& pool,
             std::function<void()> done) {
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(static_cast<int>(buffers.size()), shape.num_tokens, row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<CombineBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();
  const auto task = [=, &kernels](int64_t index) {
    const CombineBuffers& home = (*ranks)[tasks.rank(index)];
    const void* rows[kMaxTopK];
    float weights[kMaxTopK];
    int order[kMaxTopK];
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const int64_t first = token * shape.top_k;
      const int count = OrderedSelections(home.dest_rank + first, shape.top_k, order);
      for (int i = 0; i < count; ++i) {
        const CombineBuffers& expert = (*ranks)[home.dest_rank[first + order[i]]];
        const int64_t row = home.dest_row[first + order[i]];
        rows[i] = static_cast<const char*>(expert.y) + row * row_bytes;
        weights[i] = expert.row_weights[row];
      }
      kernels.weighted_sum(shape.dtype, static_cast<char*>(home.out) + token * row_bytes, rows, weights,
                           count, shape.hidden);
    }
  };
  pool.Run(tasks.num_tasks(), task, std::move(done));
}

void DispatchGrad(const CombineShape& shape, std::vector<DispatchGradBuffers> buffers, WorkerPool& pool,
                  std::function<void()> done) {
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(static_cast<int>(buffers.size()), shape.num_tokens, row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<DispatchGradBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();
  const auto task = [=, &kernels](int64_t index) {
    const DispatchGradBuffers& home = (*ranks)[tasks.rank(index)];
    const void* rows[kMaxTopK];
    int order[kMaxTopK];
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const int64_t first = token * shape.top_k;
      for (int64_t s = first; s < first + shape.top_k; ++s) home.dweights[s] = 0;
      const int count = OrderedSelections(home.dest_rank + first, shape.top_k, order);
      for (int i = 0; i < count; ++i) {
        const int64_t s = first + order[i];
        const DispatchGradBuffers& expert = (*ranks)[home.dest_rank[s]];
        rows[i] = static_cast<const char*>(expert.drows) + home.dest_row[s] * row_bytes;
        home.dweights[s] = expert.drow_weights[home.dest_row[s]];
      }
      kernels.weighted_sum(shape.dtype, static_cast<char*>(home.dx) + token * row_bytes, rows,
                           /*weights=*/nullptr, count, shape.hidden);
    }
  };
  pool.Run(tasks.num_tasks(), task, std::move(done));
}

}  // namespace wideep
