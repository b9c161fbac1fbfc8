// _wideep_nvshmem: NVSHMEM's memory, and what reaches ranks that have no address here: the relay
// and the two-hop exchange. Imported only when a group asks for it, after the library itself has
// been loaded.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/ep/two_hop_nvshmem.h"
#include "csrc/transport/nvshmem.h"

namespace nb = nanobind;

namespace wideep {
namespace {

void ThrowIf(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

/// Memory of this PE; see Nvshmem::Allocate.
struct Memory {
  char* data = nullptr;
  int64_t num_bytes = 0;
};

std::shared_ptr<Memory> Allocate(int device, int64_t num_bytes) {
  auto memory = std::make_shared<Memory>();
  memory->num_bytes = num_bytes;
  ThrowIf(Nvshmem::Allocate(device, num_bytes, memory->data));
  return memory;
}

/// Owned by Python; _wideep_cuda takes a reference out of the capsule.
template <typename T>
nb::capsule Capsule(std::shared_ptr<T> held, const char* name) {
  return nb::capsule(new std::shared_ptr<T>(std::move(held)), name, [](void* pointer) noexcept {
    delete static_cast<std::shared_ptr<T>*>(pointer);
  });
}

nb::capsule MakeRelay(const Memory& memory, int rank, int num_ranks, int num_experts, int top_k,
                      int64_t max_row_bytes, int num_sms, int64_t chunk,
                      const std::vector<int>& pe_of_rank, const std::vector<int>& mirror_of_rank) {
  NvshmemRelaySettings settings;
  settings.arena = {num_ranks, num_experts, top_k, max_row_bytes, num_sms, chunk};
  const int64_t arena_bytes = ArenaLayout(settings.arena).num_bytes;
  settings.rank = rank;
  settings.arena_memory = memory.data;
  settings.pe_of_rank = pe_of_rank;
  int num_mirrors = 0;
  for (const int mirror : mirror_of_rank) {
    settings.mirrors.push_back(mirror < 0 ? nullptr : memory.data + (1 + mirror) * arena_bytes);
    if (mirror >= num_mirrors) num_mirrors = mirror + 1;
  }
  settings.num_blocks = num_sms;
  const int64_t tickets = (1 + num_mirrors) * arena_bytes;
  if (tickets + 8 > memory.num_bytes || static_cast<int>(pe_of_rank.size()) != num_ranks ||
      static_cast<int>(mirror_of_rank.size()) != num_ranks) {
    throw std::runtime_error("nvshmem transport: memory for " + std::to_string(num_mirrors) +
                             " mirrors is needed");
  }
  settings.tickets = reinterpret_cast<uint32_t*>(memory.data + tickets);
  std::shared_ptr<Relay> relay;
  ThrowIf(MakeNvshmemRelay(settings, relay));
  return Capsule(std::move(relay), "wideep_relay");
}

int64_t TwoHopBytes(const std::vector<int>& node_of_rank, int num_experts, int top_k,
                    int64_t max_row_bytes, int num_sms, int64_t chunk) {
  const ArenaConfig arena{
      static_cast<int>(node_of_rank.size()), num_experts, top_k, max_row_bytes, num_sms, chunk};
  int64_t num_bytes = 0;
  ThrowIf(NvshmemTwoHopBytes(arena, node_of_rank, num_bytes));
  return num_bytes;
}

nb::capsule MakeTwoHop(const Memory& arena, const Memory& rings, int rank,
                       const std::vector<int>& node_of_rank, int num_experts, int top_k,
                       int64_t max_row_bytes, int num_sms, int64_t chunk,
                       const std::vector<int>& pe_of_rank, bool only_puts) {
  NvshmemTwoHopSettings settings;
  settings.arena = {
      static_cast<int>(node_of_rank.size()), num_experts, top_k, max_row_bytes, num_sms, chunk};
  settings.rank = rank;
  settings.node_of_rank = node_of_rank;
  settings.pe_of_rank = pe_of_rank;
  settings.arena_memory = arena.data;
  settings.ring_memory = rings.data;
  settings.ring_bytes = rings.num_bytes;
  settings.only_puts = only_puts;
  if (pe_of_rank.size() != node_of_rank.size()) {
    throw std::runtime_error("nvshmem transport: a PE and a node for each rank are needed");
  }
  std::shared_ptr<TwoHop> two_hop;
  ThrowIf(MakeNvshmemTwoHop(settings, two_hop));
  return Capsule(std::move(two_hop), "wideep_two_hop");
}

}  // namespace
}  // namespace wideep

NB_MODULE(_wideep_nvshmem, m) {
  using namespace wideep;  // NOLINT
  const auto without_gil = nb::call_guard<nb::gil_scoped_release>();
  m.doc() = "NVSHMEM for the backend \"cuda\". Private: use ExpertGroup(transport=\"nvshmem\").";
  nb::class_<Memory>(m, "Memory", "Zeroed memory, at the same place on every PE.")
      .def_prop_ro("address", [](const Memory& self) { return uint64_t(self.data); })
      .def(
          "address_on",
          [](const Memory& self, int pe) { return uint64_t(Nvshmem::PointerTo(self.data, pe)); },
          nb::arg("pe"), "where it lies on another PE as seen here, or 0");
  m.def("version", [] { return nb::str(Nvshmem::Version().c_str()); });
  m.def("unique_id", [] {
    std::string id;
    ThrowIf(Nvshmem::UniqueId(id));
    return nb::bytes(id.data(), id.size());
  });
  m.def(
      "start",
      [](int device, int pe, int num_pes, const nb::bytes& id) {
        const std::string text(id.c_str(), id.size());
        const nb::gil_scoped_release release;
        ThrowIf(Nvshmem::Start(device, pe, num_pes, text));
      },
      nb::arg("device"), nb::arg("pe"), nb::arg("num_pes"), nb::arg("id"),
      "joins, all processes at once; once in a process");
  m.def("allocate", Allocate, nb::arg("device"), nb::arg("num_bytes"), without_gil,
        "collective; kept until the process ends");
  m.def("make_relay", MakeRelay, nb::arg("memory"), nb::arg("rank"), nb::arg("num_ranks"),
        nb::arg("num_experts"), nb::arg("top_k"), nb::arg("max_row_bytes"), nb::arg("num_sms"),
        nb::arg("chunk"), nb::arg("pe_of_rank"), nb::arg("mirror_of_rank"),
        "memory: the arena, then mirrors of the same size, then two words; mirror_of_rank: which "
        "one, or -1");
  m.def("two_hop_bytes", TwoHopBytes, nb::arg("node_of_rank"), nb::arg("num_experts"),
        nb::arg("top_k"), nb::arg("max_row_bytes"), nb::arg("num_sms"), nb::arg("chunk"),
        "what make_two_hop's rings take");
  m.def("make_two_hop", MakeTwoHop, nb::arg("arena"), nb::arg("rings"), nb::arg("rank"),
        nb::arg("node_of_rank"), nb::arg("num_experts"), nb::arg("top_k"), nb::arg("max_row_bytes"),
        nb::arg("num_sms"), nb::arg("chunk"), nb::arg("pe_of_rank"), nb::arg("only_puts"),
        "arena: memory that begins with the group's; rings: of two_hop_bytes");
}
