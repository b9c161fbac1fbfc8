// _wideep_cuda: the handlers of the CUDA backend and the set-up of its groups.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/peer_module.h"
#include "xla_ffi/cuda/profile_range.h"
#include "xla_ffi/ffi_util.h"

namespace nb = nanobind;

namespace wideep {
namespace {

template <XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)>
void Add(nb::dict& handlers, const char* target) {
  Profiled<handler>::target = target;
  handlers[target] = HandlerCapsule(Profiled<handler>::Call);
}

nb::dict Handlers() {
  nb::dict handlers;
  Add<WideepPlan>(handlers, "wideep_plan");
  Add<WideepDispatch>(handlers, "wideep_dispatch");
  Add<WideepDispatchGrad>(handlers, "wideep_dispatch_grad");
  Add<WideepCombine>(handlers, "wideep_combine");
  Add<WideepCombineGrad>(handlers, "wideep_combine_grad");
  Add<WideepQuantizeRows>(handlers, "wideep_quantize_rows");
  Add<WideepLowLatencyDispatch>(handlers, "wideep_ll_dispatch");
  Add<WideepLowLatencyDispatchSend>(handlers, "wideep_ll_dispatch_send");
  Add<WideepLowLatencyDispatchRecv>(handlers, "wideep_ll_dispatch_recv");
  Add<WideepLowLatencyCombine>(handlers, "wideep_ll_combine");
  Add<WideepLowLatencyCombineSend>(handlers, "wideep_ll_combine_send");
  Add<WideepLowLatencyCombineRecv>(handlers, "wideep_ll_combine_recv");
  Add<WideepLowLatencyCombineGrad>(handlers, "wideep_ll_combine_grad");
  Add<WideepGroupedMatmul>(handlers, "wideep_grouped_matmul");
  Add<WideepGroupedMatmulWeightGrad>(handlers, "wideep_grouped_matmul_weight_grad");
  Add<WideepSwiglu>(handlers, "wideep_swiglu");
  Add<WideepSwigluGrad>(handlers, "wideep_swiglu_grad");
  return handlers;
}

}  // namespace
}  // namespace wideep

NB_MODULE(_wideep_cuda, m) {
  m.doc() = "Handlers of the CUDA backend. Private: use the functions of jax_wideep.";
  m.def(
      "ffi_api_version", [] { return std::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The FFI version this module was built against.");
  m.def("handlers", wideep::Handlers, "target name -> capsule, or stage -> capsule");
  wideep::AddPeerGroups(m);
}
