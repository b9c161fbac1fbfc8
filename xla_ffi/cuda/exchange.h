// What the handlers of the exchange have in common.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

#include "csrc/ep/dispatch.h"
#include "xla_ffi/cuda/peer_groups.h"
#include "xla_ffi/ffi_util.h"

namespace wideep {

using I32Scalar = ffi::BufferR0<ffi::S32>;
using I32Vector = ffi::BufferR1<ffi::S32>;
using I32Matrix = ffi::BufferR2<ffi::S32>;
using F32Vector = ffi::BufferR1<ffi::F32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;

/// The arrays of a plan, in the order in which every op takes them.
struct PlanOperands {
  I32Matrix dest_rank;        // [tokens, k]
  I32Matrix dest_row;         // [tokens, k]
  I32Scalar num_rows;         // []
  I32Vector row_source;       // [capacity]
  I32Vector arrival_rows;     // [capacity]
  I32Vector rows_per_source;  // [ranks]

  int64_t num_tokens() const { return dest_rank.dimensions()[0]; }
  int32_t top_k() const { return static_cast<int32_t>(dest_rank.dimensions()[1]); }
  int64_t capacity() const { return row_source.dimensions()[0]; }
  PlanArrays arrays() const {
    return {dest_rank.typed_data(),  dest_row.typed_data(),     num_rows.typed_data(),
            row_source.typed_data(), arrival_rows.typed_data(), rows_per_source.typed_data()};
  }
};

/// `Binding` with the arrays of a plan after its other arguments.
template <typename Binding>
auto WithPlan(Binding binding) {
  return std::move(binding)
      .template Arg<I32Matrix>()   // dest_rank [tokens, k]
      .template Arg<I32Matrix>()   // dest_row [tokens, k]
      .template Arg<I32Scalar>()   // num_rows
      .template Arg<I32Vector>()   // row_source [capacity]
      .template Arg<I32Vector>()   // arrival_rows [capacity]
      .template Arg<I32Vector>();  // rows_per_source [ranks]
}

/// The dimensions that a buffer of an op has and must have, and its name.
struct Expected {
  const char* name;
  ffi::Span<const int64_t> got;
  std::initializer_list<int64_t> wanted;
};

template <typename Dims>
std::string ShapeText(const Dims& dims) {
  std::string text;
  for (const int64_t dim : dims) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + text + "]";
}

inline Status CheckShapes(const char* op, std::initializer_list<Expected> all) {
  for (const Expected& e : all) {
    if (std::equal(e.got.begin(), e.got.end(), e.wanted.begin(), e.wanted.end())) continue;
    return Status::InvalidArgument(std::string(op) + ": " + e.name + " must be " +
                                   ShapeText(e.wanted) + ", got " + ShapeText(e.got));
  }
  return Status();
}

/// The rank of this call, which must be able to carry rows of `row_bytes` for `plan`.
inline Status FindRank(const char* op, int64_t group, int32_t device, const PlanOperands& plan,
                       int64_t row_bytes, std::shared_ptr<const PeerRank>& rank) {
  Status status = PeerGroups::Global().Find(op, group, device, rank);
  if (!status.ok()) return status;
  status = CheckShapes(
      op, {{"dest_row", plan.dest_row.dimensions(), {plan.num_tokens(), plan.top_k()}},
           {"arrival_rows", plan.arrival_rows.dimensions(), {plan.capacity()}},
           {"rows_per_source", plan.rows_per_source.dimensions(), {rank->context.num_ranks}}});
  if (!status.ok()) return status;
  if (plan.top_k() <= rank->settings.top_k &&
      RingHeaderBytes(rank->settings.top_k) + row_bytes <= rank->context.layout.max_slot_bytes) {
    return Status();
  }
  return Status::InvalidArgument(
      std::string(op) + ": the ExpertGroup was made for top_k " +
      std::to_string(rank->settings.top_k) + " and rows of " +
      std::to_string(rank->context.layout.max_slot_bytes - RingHeaderBytes(rank->settings.top_k)) +
      " bytes, got top_k " + std::to_string(plan.top_k()) + " and " + std::to_string(row_bytes) +
      " bytes");
}

}  // namespace wideep
