// _wideep_cpu: the handlers of the CPU backend and the set-up of its groups.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/ep/row_kernels.h"
#include "csrc/transport/host_rendezvous.h"
#include "xla_ffi/cpu/call_sites.h"
#include "xla_ffi/cpu/group_registry.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet.h"

namespace nb = nanobind;

namespace wideep {

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

// (process, connected socket, descriptor of its arena, its (subgroup, rank)s)
using PeerProcess = std::tuple<int, int, int, std::vector<std::pair<int32_t, int>>>;

void RaiseIfFailed(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

// An arena on its way into a group.
struct Arena {
  std::unique_ptr<HostArena> memory;
};

std::unique_ptr<Arena> MakeArena() {
  auto arena = std::make_unique<Arena>();
  RaiseIfFailed(HostArena::Make(arena->memory));
  return arena;
}

// `places` are of this process's devices, `processes` [subgroups][ranks] of all.
void OpenSharedGroup(int64_t id, int process, int num_ranks, double deadline_s,
                     const std::vector<DevicePlace>& places,
                     const std::vector<std::vector<int>>& processes, Arena& arena,
                     const std::vector<PeerProcess>& peers) {
  HostGroup group;
  group.num_ranks = num_ranks;
  group.deadline = std::chrono::milliseconds(static_cast<int64_t>(deadline_s * 1e3));
  group.process = process;
  for (const auto& [device, subgroup, rank] : places)
    group.place_of_device[device] = {subgroup, rank};
  for (size_t subgroup = 0; subgroup < processes.size(); ++subgroup) {
    const std::vector<int>& of_rank = processes[subgroup];
    if (std::count(of_rank.begin(), of_rank.end(), process) == num_ranks) continue;
    group.process_of_rank[static_cast<int32_t>(subgroup)] =
        std::make_shared<const std::vector<int>>(of_rank);
  }
  std::vector<HostPeers::Peer> connections;
  for (const auto& [other, socket, descriptor, ranks] : peers)
    connections.push_back({other, socket, descriptor, ranks});
  RaiseIfFailed(HostPeers::Connect(id, num_ranks, std::move(arena.memory), std::move(connections),
                                   HostRendezvous::Global(), group.peers));
  GroupRegistry::Global().AddShared(id, std::move(group));
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
  nb::class_<wideep::Arena>(m, "Arena").def_prop_ro("descriptor", [](const wideep::Arena& arena) {
    return arena.memory->descriptor();
  });
  m.def("make_arena", wideep::MakeArena, "this process's memory of a group that spans processes");
  m.def("next_shared_id", [] { return wideep::GroupRegistry::Global().NextSharedId(); });
  m.def("open_shared_group", wideep::OpenSharedGroup, nb::arg("id"), nb::arg("process"),
        nb::arg("num_ranks"), nb::arg("deadline_s"), nb::arg("places"), nb::arg("processes"),
        nb::arg("arena"), nb::arg("peers"),
        "Takes the arena and the peers' descriptors. processes: of every rank, by subgroup; peers: "
        "(process, socket, arena, [(subgroup, rank)])");
  m.def("executable_done", wideep::ExecutableDone,
        "To be called after each compilation: call sites are counted anew.");
  m.def(
      "mask_group",
      [](int64_t id, const std::vector<int>& ranks) {
        wideep::GroupRegistry::Global().Mask(id, ranks);
      },
      nb::arg("id"), nb::arg("ranks"), nb::call_guard<nb::gil_scoped_release>(),
      "leaves these ranks out and takes the others back");
  m.def(
      "close_group", [](int64_t id) { wideep::GroupRegistry::Global().Close(id); }, nb::arg("id"),
      nb::call_guard<nb::gil_scoped_release>());
  m.def("isa", [] { return wideep::SelectRowKernels().isa; }, "instruction set of the row kernels");
}
