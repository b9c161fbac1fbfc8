// Handler of make_plan.
#include "csrc/ep/plan.h"

#include "xla_ffi/cuda/exchange.h"
#include "xla_ffi/cuda/handlers.h"

namespace wideep {
namespace {

ffi::Error PlanImpl(cudaStream_t stream, int32_t device, int64_t group, int64_t num_experts,
                    bool overflow_is_error, I32Matrix topk_idx, ffi::Result<I32Vector> group_sizes,
                    ffi::Result<I32Scalar> num_rows, ffi::Result<I32Scalar> overflow,
                    ffi::Result<I32Vector> tokens_per_expert, ffi::Result<I32Matrix> dest_rank,
                    ffi::Result<I32Matrix> dest_row, ffi::Result<I32Vector> row_source,
                    ffi::Result<I32Vector> arrival_rows, ffi::Result<I32Vector> rows_per_source) {
  constexpr char kOp[] = "make_plan";
  std::shared_ptr<const PeerRank> rank;
  Status status = PeerGroups::Global().Find(kOp, group, device, rank);
  if (!status.ok()) return ToFfiError(status);
  PlanParams p;
  p.peers = rank->context;
  p.num_tokens = topk_idx.dimensions()[0];
  p.top_k = static_cast<int32_t>(topk_idx.dimensions()[1]);
  p.num_experts = static_cast<int32_t>(num_experts);
  p.capacity = row_source->dimensions()[0];
  p.overflow_is_error = overflow_is_error;
  const ArenaLayout& layout = rank->context.layout;
  if (num_experts != layout.num_experts || p.top_k > rank->settings.top_k) {
    return ffi::Error::InvalidArgument(
        std::string(kOp) + ": the ExpertGroup was made for " + std::to_string(layout.num_experts) +
        " experts and top_k " + std::to_string(rank->settings.top_k) + ", got " +
        std::to_string(num_experts) + " and " + std::to_string(p.top_k));
  }
  status = CheckShapes(
      kOp, {{"group_sizes", group_sizes->dimensions(), {num_experts / layout.num_ranks}},
            {"tokens_per_expert", tokens_per_expert->dimensions(), {num_experts}},
            {"dest_rank", dest_rank->dimensions(), {p.num_tokens, p.top_k}},
            {"dest_row", dest_row->dimensions(), {p.num_tokens, p.top_k}},
            {"arrival_rows", arrival_rows->dimensions(), {p.capacity}},
            {"rows_per_source", rows_per_source->dimensions(), {layout.num_ranks}}});
  if (!status.ok()) return ToFfiError(status);
  p.topk_idx = topk_idx.typed_data();
  p.group_sizes = group_sizes->typed_data();
  p.num_rows = num_rows->typed_data();
  p.overflow = overflow->typed_data();
  p.tokens_per_expert = tokens_per_expert->typed_data();
  p.dest_rank = dest_rank->typed_data();
  p.dest_row = dest_row->typed_data();
  p.row_source = row_source->typed_data();
  p.arrival_rows = arrival_rows->typed_data();
  p.rows_per_source = rows_per_source->typed_data();
  return ToFfiError(rank->across.two_hop != nullptr ? rank->across.two_hop->Plan(p, stream)
                                                    : LaunchPlan(p, stream));
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepPlan, wideep::PlanImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("num_experts")
                                  .Attr<bool>("overflow_is_error")
                                  .Arg<wideep::I32Matrix>()   // topk_idx [tokens, k]
                                  .Ret<wideep::I32Vector>()   // group_sizes [local_experts]
                                  .Ret<wideep::I32Scalar>()   // num_rows
                                  .Ret<wideep::I32Scalar>()   // overflow
                                  .Ret<wideep::I32Vector>()   // tokens_per_expert [experts]
                                  .Ret<wideep::I32Matrix>()   // dest_rank [tokens, k]
                                  .Ret<wideep::I32Matrix>()   // dest_row [tokens, k]
                                  .Ret<wideep::I32Vector>()   // row_source [capacity]
                                  .Ret<wideep::I32Vector>()   // arrival_rows [capacity]
                                  .Ret<wideep::I32Vector>(),  // rows_per_source [ranks]
                              {xla::ffi::Traits::kCmdBufferCompatible});
