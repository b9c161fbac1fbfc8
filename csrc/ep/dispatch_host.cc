#include "csrc/ep/dispatch_host.h"

#include <cstring>
#include <memory>
#include <utility>

#include "csrc/core/pages.h"
#include "csrc/ep/row_kernels.h"
#include "csrc/ep/token_tasks.h"

namespace wideep {
namespace {

// Tasks after those of the tokens: one per rank, which zeroes that rank's tail.
void ZeroTail(void* rows, float* row_scalars, int64_t num_rows, int64_t capacity,
              int64_t row_bytes) {
  std::memset(static_cast<char*>(rows) + num_rows * row_bytes, 0,
              (capacity - num_rows) * row_bytes);
  std::memset(row_scalars + num_rows, 0, (capacity - num_rows) * sizeof(float));
}

// Whether the rank takes part and its rows are in this process.
bool WritesRows(const DispatchBuffers& rank) { return !rank.masked && rank.rows != nullptr; }
bool WritesRows(const CombineGradBuffers& rank) { return !rank.masked && rank.dy != nullptr; }

// Calls visit(rank, row) for rows below num_rows that no selection fills: rows from a rank that was
// masked after the plan was made.
template <typename Buffers, typename Visit>
void ForEachUnfilledRow(const DispatchShape& shape, const std::vector<Buffers>& ranks,
                        Visit visit) {
  std::vector<std::vector<bool>> filled(ranks.size());
  bool any_masked = false;
  for (size_t r = 0; r < ranks.size(); ++r) {
    any_masked = any_masked || ranks[r].masked;
    if (WritesRows(ranks[r])) filled[r].resize(*ranks[r].num_rows);
  }
  if (!any_masked) return;
  for (const Buffers& src : ranks) {
    for (int64_t s = 0; !src.masked && s < shape.num_tokens * shape.top_k; ++s) {
      const int32_t dst = src.dest_rank[s];
      if (dst >= 0 && WritesRows(ranks[dst])) filled[dst][src.dest_row[s]] = true;
    }
  }
  for (size_t r = 0; r < ranks.size(); ++r) {
    for (size_t row = 0; row < filled[r].size(); ++row) {
      if (!filled[r][row]) visit(ranks[r], static_cast<int64_t>(row));
    }
  }
}

int64_t RowsWritten(const DispatchShape& shape, int64_t num_rows) {
  return shape.zero_tail ? shape.capacity : num_rows;
}

}  // namespace

void Dispatch(const DispatchShape& shape, std::vector<DispatchBuffers> buffers, WorkerPool& pool,
              std::function<void()> done) {
  const int num_ranks = static_cast<int>(buffers.size());
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(num_ranks, shape.num_tokens, row_bytes * shape.top_k);
  const bool stream = num_ranks * shape.num_tokens * shape.top_k * row_bytes > kStreamBytes;
  ForEachUnfilledRow(shape, buffers, [&](const DispatchBuffers& rank, int64_t row) {
    ZeroTail(rank.rows, rank.row_weights, row, row + 1, row_bytes);
  });
  for (const DispatchBuffers& rank : buffers) {
    if (!WritesRows(rank)) continue;
    AdviseHugePages(rank.rows, RowsWritten(shape, *rank.num_rows) * row_bytes);
  }
  auto ranks = std::make_shared<std::vector<DispatchBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();
  const auto task = [=, &kernels](int64_t index) {
    if (index >= tasks.num_tasks()) {
      const DispatchBuffers& rank = (*ranks)[index - tasks.num_tasks()];
      if (!WritesRows(rank)) return;
      ZeroTail(rank.rows, rank.row_weights, *rank.num_rows, shape.capacity, row_bytes);
      return;
    }
    const DispatchBuffers& src = (*ranks)[tasks.rank(index)];
    if (src.masked) return;
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const char* row = static_cast<const char*>(src.x) + token * row_bytes;
      for (int64_t s = token * shape.top_k; s < (token + 1) * shape.top_k; ++s) {
        if (src.dest_rank[s] < 0) continue;
        const DispatchBuffers& dst = (*ranks)[src.dest_rank[s]];
        if (!WritesRows(dst)) continue;
        kernels.copy(static_cast<char*>(dst.rows) + src.dest_row[s] * row_bytes, row, row_bytes,
                     stream);
        dst.row_weights[src.dest_row[s]] = src.weights[s];
      }
    }
    kernels.finish_streams();
  };
  pool.Run(tasks.num_tasks() + (shape.zero_tail ? num_ranks : 0), task, std::move(done));
}

void CombineGrad(const DispatchShape& shape, std::vector<CombineGradBuffers> buffers,
                 WorkerPool& pool, std::function<void()> done) {
  const int num_ranks = static_cast<int>(buffers.size());
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(num_ranks, shape.num_tokens, 2 * row_bytes * shape.top_k);
  ForEachUnfilledRow(shape, buffers, [&](const CombineGradBuffers& rank, int64_t row) {
    ZeroTail(rank.dy, rank.drow_weights, row, row + 1, row_bytes);
  });
  for (const CombineGradBuffers& rank : buffers) {
    if (!WritesRows(rank)) continue;
    AdviseHugePages(rank.dy, RowsWritten(shape, *rank.num_rows) * row_bytes);
  }
  auto ranks = std::make_shared<std::vector<CombineGradBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();
  const auto task = [=, &kernels](int64_t index) {
    if (index >= tasks.num_tasks()) {
      const CombineGradBuffers& rank = (*ranks)[index - tasks.num_tasks()];
      if (!WritesRows(rank)) return;
      ZeroTail(rank.dy, rank.drow_weights, *rank.num_rows, shape.capacity, row_bytes);
      return;
    }
    const CombineGradBuffers& src = (*ranks)[tasks.rank(index)];
    if (src.masked) return;
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const char* dout = static_cast<const char*>(src.dout) + token * row_bytes;
      for (int64_t s = token * shape.top_k; s < (token + 1) * shape.top_k; ++s) {
        if (src.dest_rank[s] < 0) continue;
        const CombineGradBuffers& dst = (*ranks)[src.dest_rank[s]];
        if (!WritesRows(dst)) continue;
        const int64_t row = src.dest_row[s];
        dst.drow_weights[row] = kernels.scale_and_dot(
            shape.dtype, static_cast<char*>(dst.dy) + row * row_bytes, dout, dst.row_weights[row],
            static_cast<const char*>(dst.y) + row * row_bytes, shape.hidden);
      }
    }
  };
  pool.Run(tasks.num_tasks() + (shape.zero_tail ? num_ranks : 0), task, std::move(done));
}

void EmptyDispatch(const DispatchShape& shape, const DispatchBuffers& rank) {
  ZeroTail(rank.rows, rank.row_weights, 0, RowsWritten(shape, *rank.num_rows),
           shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype)));
}

void EmptyCombineGrad(const DispatchShape& shape, const CombineGradBuffers& rank) {
  ZeroTail(rank.dy, rank.drow_weights, 0, RowsWritten(shape, *rank.num_rows),
           shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype)));
}

}  // namespace wideep
