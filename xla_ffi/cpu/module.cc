// _wideep_cpu: the handlers of the CPU backend and the set-up of its groups.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "csrc/ep/row_kernels.h"
#include "csrc/transport/host_rendezvous.h"
#include "xla_ffi/cpu/group_registry.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet.h"

namespace nb = nanobind;

namespace wideep {

ffi::TypeId OpInstance::id = {};
ffi::TypeInfo OpInstance::info = ffi::MakeTypeInfo<OpInstance>();

ffi::ErrorOr<std::unique_ptr<OpInstance>> InstantiateOp() {
  static std::atomic<int64_t> next_number{1};
  auto instance = std::make_unique<OpInstance>();
  instance->number = next_number.fetch_add(1, std::memory_order_relaxed);
  return instance;
}

namespace {

// (JAX device id, subgroup, rank)
using DevicePlace = std::tuple<int64_t, int32_t, int32_t>;

int64_t OpenGroup(int num_ranks, double deadline_s, const std::vector<DevicePlace>& places) {
  HostGroup group;
  group.num_ranks = num_ranks;
  group.deadline = std::chrono::milliseconds(static_cast<int64_t>(deadline_s * 1e3));
  for (const auto& [device, subgroup, rank] : places)
    group.place_of_device[device] = {subgroup, rank};
  return GroupRegistry::Global().Add(std::move(group));
}

nb::dict ExchangeHandlers() {
  nb::dict handlers;
  const auto add = [&](const char* target, auto* execute) {
    nb::dict stages;
    stages["instantiate"] = HandlerCapsule(WideepInstantiateOp);
    stages["execute"] = HandlerCapsule(execute);
    handlers[target] = stages;
  };
  add("wideep_plan", WideepPlan);
  add("wideep_dispatch", WideepDispatch);
  add("wideep_dispatch_grad", WideepDispatchGrad);
  add("wideep_combine", WideepCombine);
  add("wideep_combine_grad", WideepCombineGrad);
  add("wideep_ll_dispatch", WideepLowLatencyDispatch);
  add("wideep_ll_combine", WideepLowLatencyCombine);
  add("wideep_ll_combine_grad", WideepLowLatencyCombineGrad);
  handlers["wideep_quantize"] = HandlerCapsule(WideepQuantize);
  return handlers;
}

nb::dict OpInstanceType() {
  nb::dict type;
  type["type_id"] = nb::capsule(reinterpret_cast<void*>(&OpInstance::id));
  type["type_info"] = nb::capsule(reinterpret_cast<void*>(&OpInstance::info));
  return type;
}

}  // namespace
}  // namespace wideep

XLA_FFI_DEFINE_HANDLER_SYMBOL(WideepInstantiateOp, wideep::InstantiateOp,
                              xla::ffi::Ffi::BindInstantiate());

NB_MODULE(_wideep_cpu, m) {
  m.doc() = "Handlers of the CPU backend. Private: use the functions of jax_wideep.";
  m.def(
      "ffi_api_version", [] { return std::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The FFI version this module was built against.");
  m.def("handlers", wideep::ExchangeHandlers, "target name -> capsule, or stage -> capsule");
  m.def("op_instance_type", wideep::OpInstanceType, "the state type of the handlers");
  m.def("open_group", wideep::OpenGroup, nb::arg("num_ranks"), nb::arg("deadline_s"),
        nb::arg("places"),
        "places: (device id, subgroup, rank) of every device; returns the group's id");
  m.def(
      "close_group", [](int64_t id) { wideep::GroupRegistry::Global().Close(id); }, nb::arg("id"));
  m.def("isa", [] { return wideep::SelectRowKernels().isa; }, "instruction set of the row kernels");
}
