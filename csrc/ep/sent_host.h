// What ranks of other processes read of a rank's buffers, op by op; outputs and the rest stay null
// there. Sent(shape, buffers, elsewhere, visitor) names the arrays, in a fixed order
// (csrc/transport/host_staging.h); `elsewhere(rank)` is whether a rank lives in another process.
#pragma once

#include <cstdint>

#include "csrc/ep/combine_host.h"
#include "csrc/ep/dispatch_host.h"
#include "csrc/ep/low_latency_host.h"
#include "csrc/ep/plan_host.h"
#include "csrc/ep/row_kernels.h"

namespace wideep {

template <typename Elsewhere, typename Visitor>
void Sent(const PlanShape& shape, PlanBuffers& rank, const Elsewhere&, Visitor& visitor) {
  visitor.Array(rank.topk_idx,
                [&] { return shape.num_tokens * shape.top_k * int64_t{sizeof(int32_t)}; });
}

namespace internal {

template <typename Shape>
int64_t RowBytes(const Shape& shape) {
  return shape.hidden * static_cast<int64_t>(SizeOf(shape.dtype));
}

// Tokens and where their selections go.
template <typename Shape, typename Buffers, typename Visitor>
void SentTokens(const Shape& shape, const void*& tokens, Buffers& rank, Visitor& visitor) {
  const auto indices = [&] { return shape.num_tokens * shape.top_k * int64_t{sizeof(int32_t)}; };
  visitor.Array(tokens, [&] { return shape.num_tokens * RowBytes(shape); });
  visitor.Array(rank.dest_rank, indices);
  visitor.Array(rank.dest_row, indices);
}

// Rows on their way home, and a number for each.
template <typename Buffers, typename Elsewhere, typename Visitor>
void SentRows(const CombineShape& shape, const void*& rows, const float*& scalars, Buffers& rank,
              const Elsewhere& elsewhere, Visitor& visitor) {
  const int32_t* row_source = rank.row_source;
  const int64_t selections = shape.num_tokens * shape.top_k;
  visitor.Rows(
      rows, RowBytes(shape), [&] { return int64_t{*rank.num_rows}; },
      [=](int64_t row) { return elsewhere(row_source[row] / selections); });
  visitor.Array(scalars, [&] { return *rank.num_rows * int64_t{sizeof(float)}; });
}

}  // namespace internal

template <typename Elsewhere, typename Visitor>
void Sent(const DispatchShape& shape, DispatchBuffers& rank, const Elsewhere&, Visitor& visitor) {
  internal::SentTokens(shape, rank.x, rank, visitor);
  visitor.Array(rank.weights,
                [&] { return shape.num_tokens * shape.top_k * int64_t{sizeof(float)}; });
}

template <typename Elsewhere, typename Visitor>
void Sent(const DispatchShape& shape, CombineGradBuffers& rank, const Elsewhere&,
          Visitor& visitor) {
  internal::SentTokens(shape, rank.dout, rank, visitor);
}

template <typename Elsewhere, typename Visitor>
void Sent(const CombineShape& shape, CombineBuffers& rank, const Elsewhere& elsewhere,
          Visitor& visitor) {
  internal::SentRows(shape, rank.y, rank.row_weights, rank, elsewhere, visitor);
}

template <typename Elsewhere, typename Visitor>
void Sent(const CombineShape& shape, DispatchGradBuffers& rank, const Elsewhere& elsewhere,
          Visitor& visitor) {
  internal::SentRows(shape, rank.drows, rank.drow_weights, rank, elsewhere, visitor);
}

template <typename Elsewhere, typename Visitor>
void Sent(const LowLatencyShape& shape, LowLatencyDispatchBuffers& rank, const Elsewhere&,
          Visitor& visitor) {
  const DType wire = shape.quantized ? DType::kF8E4M3 : shape.dtype;
  visitor.Array(rank.payload, [&] {
    return shape.num_tokens * shape.hidden * static_cast<int64_t>(SizeOf(wire));
  });
  visitor.Array(rank.scales, [&] {
    return shape.num_tokens * (shape.hidden / kQuantBlock) * int64_t{sizeof(float)};
  });
  visitor.Array(rank.topk_idx,
                [&] { return shape.num_tokens * shape.top_k * int64_t{sizeof(int32_t)}; });
}

/// Forward, and backward where dout is not null: the home rank then makes the gate weights'
/// gradients from the rows of y, and the expert's rank the rows' gradients from dout.
template <typename Elsewhere, typename Visitor>
void Sent(const LowLatencyShape& shape, LowLatencyCombineBuffers& rank, const Elsewhere& elsewhere,
          Visitor& visitor) {
  const int64_t num_rows = shape.local_experts() * shape.rows_per_expert();
  const int64_t selections = shape.num_tokens * shape.top_k;
  const int32_t* row_source = rank.row_source;
  const int num_ranks = shape.num_ranks;
  visitor.Rows(
      rank.y, internal::RowBytes(shape), [&] { return num_rows; },
      [=](int64_t row) {  // garbage is sent nowhere; it is an error when the rows are looked for
        const int64_t source = row_source[row];
        return source >= 0 && source < num_ranks * selections && elsewhere(source / selections);
      });
  visitor.Array(rank.counts, [&] { return shape.local_experts() * int64_t{sizeof(int32_t)}; });
  visitor.Array(rank.row_source, [&] { return num_rows * int64_t{sizeof(int32_t)}; });
  visitor.Array(rank.dout, [&] { return shape.num_tokens * internal::RowBytes(shape); });
  visitor.Array(rank.topk_weights, [&] { return selections * int64_t{sizeof(float)}; });
}

}  // namespace wideep
