#include "csrc/ep/low_latency_host.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "csrc/ep/combine_host.h"
#include "csrc/ep/row_kernels.h"
#include "csrc/ep/token_tasks.h"

namespace wideep {
namespace {

// Where every selection's row lies: a selection is (rank * num_tokens + token) * top_k + k, a row
// counts through all experts of its rank.
struct SelectionRows {
  std::vector<int32_t> rank;  // -1 = masked
  std::vector<int32_t> row;
};

std::string Where(const LowLatencyShape& shape, int64_t selection) {
  return "rank " + std::to_string(selection / (shape.num_tokens * shape.top_k)) + ", token " +
         std::to_string(selection / shape.top_k % shape.num_tokens);
}

Status PlaceRows(const LowLatencyShape& shape, const std::vector<LowLatencyDispatchBuffers>& ranks,
                 SelectionRows& placed) {
  const int local_experts = shape.local_experts();
  const int64_t selections = shape.num_tokens * shape.top_k;
  placed.rank.assign(shape.num_ranks * selections, -1);
  placed.row.assign(shape.num_ranks * selections, -1);
  std::vector<int32_t> counts(shape.num_experts, 0);
  for (int64_t s = 0; s < shape.num_ranks * selections; ++s) {
    if (ranks[s / selections].masked) continue;
    const int32_t* idx = ranks[s / selections].topk_idx + s % selections;
    const int32_t expert = *idx;
    if (expert < -1 || expert >= shape.num_experts) {
      return Status::OutOfRange("ll_dispatch: topk_idx must lie in [-1, " +
                                std::to_string(shape.num_experts) + "), got " +
                                std::to_string(expert) + " on " + Where(shape, s) +
                                ". Use -1 for a masked selection");
    }
    if (expert == -1) continue;
    for (int64_t k = s % shape.top_k; k > 0; --k) {
      if (idx[-k] != expert) continue;
      return Status::OutOfRange("ll_dispatch: a token's experts must be distinct, got expert " +
                                std::to_string(expert) + " twice on " + Where(shape, s) +
                                ". Mask one of them with -1, or use make_plan and dispatch");
    }
    const int dst = expert / local_experts;
    if (ranks[dst].masked) continue;
    placed.rank[s] = dst;
    placed.row[s] =
        static_cast<int32_t>(expert % local_experts * shape.rows_per_expert() + counts[expert]++);
    if (ranks[dst].rows == nullptr) continue;
    ranks[dst].row_source[placed.row[s]] = static_cast<int32_t>(s);
  }
  for (int expert = 0; expert < shape.num_experts; ++expert) {
    const LowLatencyDispatchBuffers& rank = ranks[expert / local_experts];
    if (rank.masked || rank.rows == nullptr) continue;
    const int e = expert % local_experts;
    rank.counts[e] = counts[expert];
    int32_t* sources = rank.row_source + e * shape.rows_per_expert();
    std::fill(sources + counts[expert], sources + shape.rows_per_expert(), -1);
  }
  return Status();
}

Status ForeignRecv(const char* array, int64_t got, const std::string& expected) {
  return Status::InvalidArgument(
      "ll_combine: recv does not belong to this call: " + std::string(array) + " holds " +
      std::to_string(got) + ", expected " + expected);
}

Status FindRows(const LowLatencyShape& shape, const std::vector<LowLatencyCombineBuffers>& ranks,
                SelectionRows& placed) {
  const int64_t selections = shape.num_ranks * shape.num_tokens * shape.top_k;
  placed.rank.assign(selections, -1);
  placed.row.assign(selections, -1);
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    for (int e = 0; e < shape.local_experts() && !ranks[rank].masked; ++e) {
      const int64_t first = e * shape.rows_per_expert();
      const int64_t count = ranks[rank].counts[e];
      if (count < 0 || count > shape.rows_per_expert()) {
        return ForeignRecv("counts", count, "[0, " + std::to_string(shape.rows_per_expert()) + "]");
      }
      for (int64_t row = first; row < first + count; ++row) {
        const int32_t source = ranks[rank].row_source[row];
        if (source < 0 || source >= selections) {
          return ForeignRecv("row_source", source, "[0, " + std::to_string(selections) + ")");
        }
        placed.rank[source] = rank;
        placed.row[source] = static_cast<int32_t>(row);
      }
    }
  }
  return Status();
}

// The rows of each expert past its count.
void ZeroTails(const LowLatencyShape& shape, const LowLatencyDispatchBuffers& rank) {
  if (rank.rows == nullptr) return;
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const int64_t blocks = shape.hidden / kQuantBlock;
  for (int e = 0; e < shape.local_experts(); ++e) {
    const int64_t first = e * shape.rows_per_expert() + rank.counts[e];
    const int64_t tail = shape.rows_per_expert() - rank.counts[e];
    std::memset(static_cast<char*>(rank.rows) + first * row_bytes, 0, tail * row_bytes);
    if (rank.row_scales)
      std::memset(rank.row_scales + first * blocks, 0, tail * blocks * sizeof(float));
  }
}

}  // namespace

void LowLatencyDispatch(const LowLatencyShape& shape,
                        std::vector<LowLatencyDispatchBuffers> buffers, WorkerPool& pool,
                        StatusCallback done) {
  auto placed = std::make_shared<SelectionRows>();
  if (Status status = PlaceRows(shape, buffers, *placed); !status.ok()) return done(status);

  const DType wire_dtype = shape.quantized ? DType::kF8E4M3 : shape.dtype;
  const bool dequantize = wire_dtype != shape.dtype;
  const int64_t wire_bytes = shape.hidden * static_cast<int64_t>(SizeOf(wire_dtype));
  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const int64_t blocks = shape.hidden / kQuantBlock;
  const TokenTasks tasks(shape.num_ranks, shape.num_tokens, row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<LowLatencyDispatchBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();

  const auto task = [=, &kernels](int64_t index) {
    if (index >= tasks.num_tasks()) {
      const LowLatencyDispatchBuffers& rank = (*ranks)[index - tasks.num_tasks()];
      if (!rank.masked) ZeroTails(shape, rank);
      return;
    }
    const int src = tasks.rank(index);
    const LowLatencyDispatchBuffers& home = (*ranks)[src];
    if (home.masked) return;
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const auto* sent = static_cast<const uint8_t*>(home.payload) + token * wire_bytes;
      const float* scales = shape.quantized ? home.scales + token * blocks : nullptr;
      const int64_t first = (src * shape.num_tokens + token) * shape.top_k;
      for (int64_t s = first; s < first + shape.top_k; ++s) {
        if (placed->rank[s] < 0) continue;
        const LowLatencyDispatchBuffers& expert = (*ranks)[placed->rank[s]];
        if (expert.rows == nullptr) continue;
        char* row = static_cast<char*>(expert.rows) + placed->row[s] * row_bytes;
        if (dequantize) {
          kernels.dequantize(shape.dtype, row, sent, scales, shape.hidden);
          continue;
        }
        kernels.copy(row, sent, row_bytes, /*stream=*/false);
        if (expert.row_scales) {
          std::memcpy(expert.row_scales + placed->row[s] * blocks, scales, blocks * sizeof(float));
        }
      }
    }
  };
  pool.Run(tasks.num_tasks() + (shape.zero_tail ? shape.num_ranks : 0), task,
           [done = std::move(done)] { done(Status()); });
}

void LowLatencyCombine(const LowLatencyShape& shape, std::vector<LowLatencyCombineBuffers> buffers,
                       WorkerPool& pool, StatusCallback done) {
  auto placed = std::make_shared<SelectionRows>();
  if (Status status = FindRows(shape, buffers, *placed); !status.ok()) return done(status);

  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(shape.num_ranks, shape.num_tokens, row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<LowLatencyCombineBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();
  const auto task = [=, &kernels](int64_t index) {
    const int rank = tasks.rank(index);
    const LowLatencyCombineBuffers& home = (*ranks)[rank];
    if (home.masked || home.out == nullptr) return;
    const void* rows[kMaxTopK];
    float weights[kMaxTopK];
    int order[kMaxTopK];
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const int64_t first = (rank * shape.num_tokens + token) * shape.top_k;
      const int count = OrderedSelections(&placed->rank[first], shape.top_k, order);
      for (int i = 0; i < count; ++i) {
        const int64_t s = first + order[i];
        rows[i] =
            static_cast<const char*>((*ranks)[placed->rank[s]].y) + placed->row[s] * row_bytes;
        weights[i] = home.topk_weights[token * shape.top_k + order[i]];
      }
      kernels.weighted_sum(shape.dtype, static_cast<char*>(home.out) + token * row_bytes, rows,
                           weights, count, shape.hidden);
    }
  };
  pool.Run(tasks.num_tasks(), task, [done = std::move(done)] { done(Status()); });
}

void LowLatencyCombineGrad(const LowLatencyShape& shape,
                           std::vector<LowLatencyCombineBuffers> buffers, WorkerPool& pool,
                           StatusCallback done) {
  auto placed = std::make_shared<SelectionRows>();
  if (Status status = FindRows(shape, buffers, *placed); !status.ok()) return done(status);

  const int64_t row_bytes = shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  const TokenTasks tasks(shape.num_ranks, shape.num_tokens, 2 * row_bytes * shape.top_k);
  auto ranks = std::make_shared<std::vector<LowLatencyCombineBuffers>>(std::move(buffers));
  const RowKernels& kernels = SelectRowKernels();
  const auto task = [=, &kernels](int64_t index) {
    if (index >= tasks.num_tasks()) {
      const LowLatencyCombineBuffers& rank = (*ranks)[index - tasks.num_tasks()];
      if (rank.masked || rank.dy == nullptr) return;
      for (int e = 0; e < shape.local_experts(); ++e) {
        const int64_t first = e * shape.rows_per_expert() + rank.counts[e];
        std::memset(static_cast<char*>(rank.dy) + first * row_bytes, 0,
                    (shape.rows_per_expert() - rank.counts[e]) * row_bytes);
      }
      return;
    }
    const int rank = tasks.rank(index);
    const LowLatencyCombineBuffers& home = (*ranks)[rank];
    if (home.masked) return;
    std::vector<char>
        nowhere;  // for the gradient of a row in another process, which makes it itself
    for (int64_t token = tasks.begin(index); token < tasks.end(index); ++token) {
      const char* dout = static_cast<const char*>(home.dout) + token * row_bytes;
      for (int64_t k = token * shape.top_k; k < (token + 1) * shape.top_k; ++k) {
        const int64_t s = rank * shape.num_tokens * shape.top_k + k;
        if (home.dtopk_weights != nullptr) home.dtopk_weights[k] = 0;
        if (placed->rank[s] < 0) continue;
        const LowLatencyCombineBuffers& expert = (*ranks)[placed->rank[s]];
        if (home.dtopk_weights == nullptr && expert.dy == nullptr) continue;
        const int64_t offset = placed->row[s] * row_bytes;
        if (expert.dy == nullptr) nowhere.resize(row_bytes);
        char* dy = expert.dy == nullptr ? nowhere.data() : static_cast<char*>(expert.dy) + offset;
        const float dot =
            kernels.scale_and_dot(shape.dtype, dy, dout, home.topk_weights[k],
                                  static_cast<const char*>(expert.y) + offset, shape.hidden);
        if (home.dtopk_weights != nullptr) home.dtopk_weights[k] = dot;
      }
    }
  };
  pool.Run(tasks.num_tasks() + (shape.zero_tail ? shape.num_ranks : 0), task,
           [done = std::move(done)] { done(Status()); });
}

void EmptyLowLatencyDispatch(const LowLatencyShape& shape, const LowLatencyDispatchBuffers& rank) {
  std::fill_n(rank.counts, shape.local_experts(), 0);
  std::fill_n(rank.row_source, shape.local_experts() * shape.rows_per_expert(), -1);
  if (shape.zero_tail) ZeroTails(shape, rank);
}

void EmptyLowLatencyCombine(const LowLatencyShape& shape, const LowLatencyCombineBuffers& rank) {
  std::memset(rank.out, 0, shape.num_tokens * shape.hidden * SizeOf(shape.dtype));
}

void EmptyLowLatencyCombineGrad(const LowLatencyShape& shape,
                                const LowLatencyCombineBuffers& rank) {
  const int64_t expert_bytes =
      shape.rows_per_expert() * shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
  std::memset(rank.dy, 0, shape.local_experts() * expert_bytes);
  std::fill_n(rank.dtopk_weights, shape.num_tokens * shape.top_k, 0.0f);
}

}  // namespace wideep
