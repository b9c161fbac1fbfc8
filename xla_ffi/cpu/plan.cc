// Handler of make_plan.
#include "csrc/ep/plan_host.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet.h"

namespace wideep {
namespace {

using I32Scalar = ffi::BufferR0<ffi::S32>;
using I32Vector = ffi::BufferR1<ffi::S32>;
using I32Matrix = ffi::BufferR2<ffi::S32>;

ffi::Future PlanImpl(int32_t device, ffi::RunId run_id, OpInstance* instance, int64_t group,
                     int64_t num_experts, bool overflow_is_error, I32Scalar rank,
                     I32Matrix topk_idx, ffi::Result<I32Vector> group_sizes,
                     ffi::Result<I32Scalar> num_rows, ffi::Result<I32Scalar> overflow,
                     ffi::Result<I32Vector> tokens_per_expert, ffi::Result<I32Matrix> dest_rank,
                     ffi::Result<I32Matrix> dest_row, ffi::Result<I32Vector> row_source,
                     ffi::Result<I32Vector> arrival_rows, ffi::Result<I32Vector> rows_per_source) {
  PlanShape shape;
  shape.num_ranks =
      static_cast<int>(num_experts / std::max<int64_t>(1, group_sizes->dimensions()[0]));
  shape.num_tokens = topk_idx.dimensions()[0];
  shape.top_k = static_cast<int>(topk_idx.dimensions()[1]);
  shape.num_experts = static_cast<int>(num_experts);
  shape.capacity = row_source->dimensions()[0];
  shape.overflow_is_error = overflow_is_error;
  const PlanBuffers buffers{topk_idx.typed_data(),           group_sizes->typed_data(),
                            num_rows->typed_data(),          overflow->typed_data(),
                            tokens_per_expert->typed_data(), dest_rank->typed_data(),
                            dest_row->typed_data(),          row_source->typed_data(),
                            arrival_rows->typed_data(),      rows_per_source->typed_data()};
  const int32_t mesh_rank = *rank.typed_data();
  const auto check = [&](const HostGroup& host_group, HostGroup::Place place) {
    if (host_group.num_ranks != shape.num_ranks) {
      return Status::InvalidArgument("make_plan: expected " + std::to_string(host_group.num_ranks) +
                                     " ranks, got " + std::to_string(shape.num_ranks));
    }
    if (place.rank == mesh_rank) return Status();
    return Status::FailedPrecondition(
        "make_plan: device " + std::to_string(device) + " is rank " + std::to_string(place.rank) +
        " of the ExpertGroup but rank " + std::to_string(mesh_rank) +
        " in this shard_map. Build the group from the same mesh that shard_map uses");
  };
  return Meet<PlanShape, PlanBuffers>(
      "make_plan", {device, run_id, instance, group}, shape, buffers, check,
      [](const PlanShape& agreed, std::vector<PlanBuffers> ranks, Completion finish) {
        finish(MakePlan(agreed, ranks));
      },
      MakeEmptyPlan);
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepPlan, wideep::PlanImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::RunId>()
                                  .Ctx<xla::ffi::State<wideep::OpInstance>>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("num_experts")
                                  .Attr<bool>("overflow_is_error")
                                  .Arg<wideep::I32Scalar>()    // rank
                                  .Arg<wideep::I32Matrix>()    // topk_idx [tokens, k]
                                  .Ret<wideep::I32Vector>()    // group_sizes [local_experts]
                                  .Ret<wideep::I32Scalar>()    // num_rows
                                  .Ret<wideep::I32Scalar>()    // overflow
                                  .Ret<wideep::I32Vector>()    // tokens_per_expert [experts]
                                  .Ret<wideep::I32Matrix>()    // dest_rank [tokens, k]
                                  .Ret<wideep::I32Matrix>()    // dest_row [tokens, k]
                                  .Ret<wideep::I32Vector>()    // row_source [capacity]
                                  .Ret<wideep::I32Vector>()    // arrival_rows [capacity]
                                  .Ret<wideep::I32Vector>());  // rows_per_source [ranks]
