// TwoHop over a network: the ops of a rank, for any `Net` (two_hop_rank.cuh).
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <vector>

#include "csrc/ep/two_hop.h"
#include "csrc/ep/two_hop_combine.cuh"
#include "csrc/ep/two_hop_combine_grad.cuh"
#include "csrc/ep/two_hop_dispatch.cuh"
#include "csrc/ep/two_hop_plan.cuh"
#include "csrc/ep/two_hop_rank.cuh"
#include "csrc/ep/two_hop_settings.h"

namespace wideep {

template <typename Net>
class TwoHopOverNet : public TwoHop {
 public:
  TwoHopOverNet(const TwoHopSettings& settings, const Net& net) : settings_(settings), net_(net) {}

  Status Plan(const PlanParams& params, cudaStream_t stream) override {
    return LaunchTwoHopPlan(ParamsOf(params), stream);
  }
  Status Dispatch(const DispatchParams& params, cudaStream_t stream) override {
    return LaunchTwoHopDispatch(ParamsOf(params), stream);
  }
  Status Combine(const CombineParams& params, cudaStream_t stream) override {
    return LaunchTwoHopCombine(ParamsOf(params), stream);
  }
  Status CombineGrad(const CombineGradParams& params, cudaStream_t stream) override {
    return LaunchTwoHopCombineGrad(ParamsOf(params), stream);
  }

  Status Crossed(CrossedNodes& crossed) override {
    two_hop::RankState state;
    if (Status status = Runtime("cudaDeviceSynchronize", cudaDeviceSynchronize()); !status.ok()) {
      return status;
    }
    const char* from = context_.memory + context_.layout.num_bytes();
    if (Status status =
            Runtime("cudaMemcpy", cudaMemcpy(&state, from, sizeof(state), cudaMemcpyDeviceToHost));
        !status.ok()) {
      return status;
    }
    constexpr int kOut = static_cast<int>(two_hop::Direction::kOut);
    constexpr int kBack = static_cast<int>(two_hop::Direction::kBack);
    crossed = {state.tokens_put[kOut], state.bytes_put[kOut], state.tokens_put[kBack],
               state.bytes_put[kBack]};
    return Status();
  }

  /// Clears this rank's memory, which no other rank may put to until it has returned.
  Status Reset(uint32_t masked) override {
    if (Status status = two_hop::MakeContext(settings_.shape, settings_.rank, masked,
                                             settings_.memory, settings_.memory_bytes, context_);
        !status.ok()) {
      return status;
    }
    Status status = Runtime(
        "cudaMemset", cudaMemset(settings_.memory, 0, static_cast<size_t>(settings_.memory_bytes)));
    if (status.ok()) {
      status = Runtime("cudaMemcpy", cudaMemcpy(ContextOnGpu(), &context_, sizeof(context_),
                                                cudaMemcpyHostToDevice));
    }
    if (status.ok()) status = Runtime("cudaDeviceSynchronize", cudaDeviceSynchronize());
    return status;
  }

 private:
  template <typename Op>
  two_hop::Params<Op, Net> ParamsOf(const Op& op) const {
    two_hop::Params<Op, Net> params{op, ContextOnGpu(), context_.layout.config().slot_bytes,
                                    settings_.shape.num_nodes(), net_};
    params.op.peers.node_ranks = context_.node_ranks;
    // For so many blocks the rings' ends were counted.
    params.op.peers.num_sms = settings_.shape.arena.num_sms;
    return params;
  }
  two_hop::Context* ContextOnGpu() const {
    return two_hop::ContextIn(settings_.memory, settings_.memory_bytes);
  }
  static Status Runtime(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return Status();
    return Status::Internal(std::string("exchange between nodes: ") + what + ": " +
                            cudaGetErrorString(error));
  }

  const TwoHopSettings settings_;
  const Net net_;
  two_hop::Context context_;
};

/// Ready for the first op once every rank has made its own. Loads the kernels.
template <typename Net>
Status MakeTwoHop(const TwoHopSettings& settings, const Net& net, std::shared_ptr<TwoHop>& out) {
  for (const auto load : {LoadTwoHopPlan<Net>, LoadTwoHopDispatch<Net>, LoadTwoHopCombine<Net>,
                          LoadTwoHopCombineGrad<Net>}) {
    if (Status status = load(); !status.ok()) return status;
  }
  auto two_hop = std::make_shared<TwoHopOverNet<Net>>(settings, net);
  if (Status status = two_hop->Reset(0); !status.ok()) return status;
  out = std::move(two_hop);
  return Status();
}

}  // namespace wideep
