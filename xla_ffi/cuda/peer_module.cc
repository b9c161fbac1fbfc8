#include "xla_ffi/cuda/peer_module.h"

#include <cuda_runtime_api.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ep/load_kernels.h"
#include "csrc/ep/plan.h"
#include "csrc/transport/peer.h"
#include "xla_ffi/cuda/peer_groups.h"

namespace nb = nanobind;

namespace wideep {
namespace {

// (address, bytes)
using Range = std::pair<uint64_t, uint64_t>;

void ThrowIf(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

Range ToRange(const MemoryRange& range) { return {range.base, range.num_bytes}; }

nb::dict DeviceInfo(int device) {
  cudaDeviceProp prop;
  if (const cudaError_t error = cudaGetDeviceProperties(&prop, device); error != cudaSuccess) {
    throw std::runtime_error(std::string("cudaGetDeviceProperties: ") + cudaGetErrorString(error));
  }
  std::string uuid;
  for (const char byte : prop.uuid.bytes) {
    char text[3];
    std::snprintf(text, sizeof(text), "%02x", static_cast<unsigned char>(byte));
    uuid += text;
  }
  nb::dict info;
  info["uuid"] = uuid;
  info["num_sms"] = prop.multiProcessorCount;
  info["compute_capability"] = prop.major * 10 + prop.minor;
  return info;
}

nb::dict Limits() {
  nb::dict limits;
  limits["num_ranks"] = kMaxRanks;
  limits["num_experts"] = kMaxPlanExperts;
  limits["top_k"] = kMaxKernelTopK;
  return limits;
}

std::shared_ptr<PeerGroup> MakePeerGroup(int device, int rank, int num_ranks, int num_experts,
                                         int top_k, int64_t max_row_bytes, int num_sms,
                                         int64_t chunk, bool spans_processes,
                                         const std::vector<uint64_t>& buffer_addresses,
                                         uint64_t arena_address) {
  PeerGroup::Settings settings;
  settings.device = device;
  settings.rank = rank;
  settings.arena = {num_ranks, num_experts, top_k, max_row_bytes, num_sms, chunk};
  settings.spans_processes = spans_processes;
  settings.arena_memory = reinterpret_cast<char*>(arena_address);
  std::vector<const void*> pointers;
  for (const uint64_t address : buffer_addresses) {
    pointers.push_back(reinterpret_cast<const void*>(address));
  }
  std::unique_ptr<PeerGroup> group;
  ThrowIf(PeerGroup::Make(settings, pointers, group));
  const DeviceScope scope(device);
  ThrowIf(scope.status());
  ThrowIf(LoadExchangeKernels());
  return group;
}

void MapPeer(PeerGroup& self, int rank, const Range& arena, const std::vector<Range>& regions,
             const std::vector<int>& descriptors) {
  PeerMemory memory;
  memory.arena = {arena.first, arena.second};
  for (const Range& range : regions) memory.regions.push_back({range.first, range.second});
  ThrowIf(self.MapPeer(rank, memory, descriptors));
}

/// What a capsule of _wideep_nvshmem holds.
template <typename T>
std::shared_ptr<T> Held(const nb::capsule& capsule, const char* name) {
  return *static_cast<std::shared_ptr<T>*>(capsule.data(name));
}

int64_t OpenGroup(const std::vector<std::shared_ptr<PeerGroup>>& ranks, double deadline_s,
                  int top_k, bool zero_copy,
                  const std::vector<std::pair<nb::capsule, nb::capsule>>& across_nodes) {
  PeerSettings settings;
  settings.deadline_s = deadline_s;
  settings.top_k = top_k;
  settings.zero_copy = zero_copy;
  std::vector<AcrossNodes> across;
  for (const auto& [relay, two_hop] : across_nodes) {
    across.push_back({Held<Relay>(relay, "wideep_relay"), Held<TwoHop>(two_hop, "wideep_two_hop")});
  }
  return PeerGroups::Global().Open(ranks, settings, across);
}

void MaskGroup(int64_t id, const std::vector<int>& ranks) {
  uint32_t masked = 0;
  for (const int rank : ranks) masked |= 1u << rank;
  ThrowIf(PeerGroups::Global().Mask(id, masked));
}

nb::dict Crossed(int64_t id) {
  CrossedNodes crossed;
  {
    const nb::gil_scoped_release release;
    ThrowIf(PeerGroups::Global().Crossed(id, crossed));
  }
  nb::dict counts;
  counts["tokens_out"] = crossed.tokens_out;
  counts["bytes_out"] = crossed.bytes_out;
  counts["tokens_back"] = crossed.tokens_back;
  counts["bytes_back"] = crossed.bytes_back;
  return counts;
}

}  // namespace

void AddPeerGroups(nb::module_& m) {
  const auto without_gil = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<PeerGroup>(m, "PeerGroup",
                        "A rank's arena and its mappings of the peers' memory; see peer.h.")
      .def_prop_ro(
          "arena", [](const PeerGroup& self) { return ToRange(self.memory().arena); },
          "(address, bytes)")
      .def_prop_ro(
          "regions",
          [](const PeerGroup& self) {
            std::vector<Range> ranges;
            for (const MemoryRange& range : self.memory().regions) ranges.push_back(ToRange(range));
            return ranges;
          },
          "(address, bytes) of each allocation of XLA's that peers map")
      .def("take_descriptors", &PeerGroup::TakeDescriptors,
           "file descriptors of arena and regions; the caller closes them")
      .def("map_peer", MapPeer, nb::arg("rank"), nb::arg("arena"), nb::arg("regions"),
           nb::arg("descriptors"), "a rank of another process")
      .def(
          "map_local_peer",
          [](PeerGroup& self, const PeerGroup& peer) { ThrowIf(self.MapPeer(peer.rank(), peer)); },
          nb::arg("peer"), "a rank of this process")
      .def(
          "set_arena",
          [](PeerGroup& self, int rank, uint64_t address, bool mirror) {
            self.SetArena(rank, reinterpret_cast<char*>(address), mirror);
          },
          nb::arg("rank"), nb::arg("address"), nb::arg("mirror"),
          "where another transport has the arena of a rank, or this rank its mirror")
      .def("finish", [](PeerGroup& self) { ThrowIf(self.Finish()); });

  m.def("device_info", DeviceInfo, nb::arg("device"), "uuid, num_sms, compute_capability");
  m.def("exchange_limits", Limits, "most ranks, experts and top_k of a group");
  m.def("make_peer_group", MakePeerGroup, nb::arg("device"), nb::arg("rank"), nb::arg("num_ranks"),
        nb::arg("num_experts"), nb::arg("top_k"), nb::arg("max_row_bytes"), nb::arg("num_sms"),
        nb::arg("chunk"), nb::arg("spans_processes"), nb::arg("buffer_addresses"),
        nb::arg("arena_address") = 0, without_gil,
        "allocates one rank's part of a group; arena_address: zeroed memory of another transport");
  m.def(
      "arena_bytes",
      [](int num_ranks, int num_experts, int top_k, int64_t max_row_bytes, int num_sms,
         int64_t chunk) {
        return ArenaLayout({num_ranks, num_experts, top_k, max_row_bytes, num_sms, chunk})
            .num_bytes;
      },
      nb::arg("num_ranks"), nb::arg("num_experts"), nb::arg("top_k"), nb::arg("max_row_bytes"),
      nb::arg("num_sms"), nb::arg("chunk"), "what make_peer_group's arena takes");
  m.def(
      "open_group", OpenGroup, nb::arg("ranks"), nb::arg("deadline_s"), nb::arg("top_k"),
      nb::arg("zero_copy"), nb::arg("across_nodes") = nb::list(),
      "lets the handlers find the ranks; across_nodes: of each, a relay and a two-hop exchange, if "
      "the group has several nodes; returns the group's id");
  m.def(
      "close_group", [](int64_t id) { PeerGroups::Global().Close(id); }, nb::arg("id"),
      without_gil);
  m.def(
      "wait_for_group", [](int64_t id) { PeerGroups::Global().Wait(id); }, nb::arg("id"),
      without_gil, "until this process's devices are idle");
  m.def("mask_group", MaskGroup, nb::arg("id"), nb::arg("ranks"), without_gil,
        "leaves these ranks out, takes the others back, and forgets errors; every process that "
        "takes part has waited for the group, and launches nothing until all have returned");
  m.def("group_crossed", Crossed, nb::arg("id"),
        "what this process's ranks have sent between nodes since the group was made, or its mask "
        "changed: tokens and bytes, out (dispatch, combine's gradient) and back");
  m.def(
      "group_error",
      [](int64_t id) -> std::optional<std::string> {
        const Status status = PeerGroups::Global().Check(id);
        if (status.ok()) return std::nullopt;
        return status.message();
      },
      nb::arg("id"), "what made a rank of this process give up, or None");
}

}  // namespace wideep
