// _wideep_cuda: the handlers of the CUDA backend and the set-up of its groups.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/peer_module.h"
#include "xla_ffi/ffi_util.h"

namespace nb = nanobind;

namespace wideep {
namespace {

nb::dict Handlers() {
  nb::dict handlers;
  handlers["wideep_plan"] = HandlerCapsule(WideepPlan);
  handlers["wideep_dispatch"] = HandlerCapsule(WideepDispatch);
  handlers["wideep_dispatch_grad"] = HandlerCapsule(WideepDispatchGrad);
  handlers["wideep_combine"] = HandlerCapsule(WideepCombine);
  handlers["wideep_combine_grad"] = HandlerCapsule(WideepCombineGrad);
  handlers["wideep_quantize_rows"] = HandlerCapsule(WideepQuantizeRows);
  handlers["wideep_ll_dispatch"] = HandlerCapsule(WideepLowLatencyDispatch);
  handlers["wideep_ll_dispatch_send"] = HandlerCapsule(WideepLowLatencyDispatchSend);
  handlers["wideep_ll_dispatch_recv"] = HandlerCapsule(WideepLowLatencyDispatchRecv);
  handlers["wideep_ll_combine"] = HandlerCapsule(WideepLowLatencyCombine);
  handlers["wideep_ll_combine_send"] = HandlerCapsule(WideepLowLatencyCombineSend);
  handlers["wideep_ll_combine_recv"] = HandlerCapsule(WideepLowLatencyCombineRecv);
  handlers["wideep_ll_combine_grad"] = HandlerCapsule(WideepLowLatencyCombineGrad);
  handlers["wideep_grouped_matmul"] = HandlerCapsule(WideepGroupedMatmul);
  handlers["wideep_grouped_matmul_weight_grad"] = HandlerCapsule(WideepGroupedMatmulWeightGrad);
  handlers["wideep_swiglu"] = HandlerCapsule(WideepSwiglu);
  handlers["wideep_swiglu_grad"] = HandlerCapsule(WideepSwigluGrad);
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
