#include "xla_ffi/cpu/call_sites.h"

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

namespace wideep {
namespace {

// More than the call sites of all launches that are in flight at once.
constexpr size_t kRememberedPlaces = 16384;

std::atomic<int64_t> num_executables{0};

}  // namespace

xla::ffi::TypeId OpInstance::id = {};
xla::ffi::TypeInfo OpInstance::info = xla::ffi::MakeTypeInfo<OpInstance>();

xla::ffi::ErrorOr<std::unique_ptr<OpInstance>> InstantiateOp() {
  static std::atomic<int64_t> next_number{1};
  thread_local int64_t executable = -1, next_place = 0;
  if (const int64_t current = num_executables.load(); current != executable) {
    executable = current;
    next_place = 0;
  }
  auto instance = std::make_unique<OpInstance>();
  instance->number = next_number.fetch_add(1, std::memory_order_relaxed);
  instance->place = next_place++;
  return instance;
}

void ExecutableDone() { ++num_executables; }

Status CheckPlace(int64_t run_id, const OpInstance& instance) {
  using Place = std::pair<int64_t, int64_t>;
  static auto& mutex = *new std::mutex;
  static auto& number_at = *new std::map<Place, int64_t>;
  static auto& order = *new std::deque<Place>;
  const Place place{run_id, instance.place};
  std::lock_guard<std::mutex> lock(mutex);
  const auto [found, first] = number_at.try_emplace(place, instance.number);
  if (!first) {
    if (found->second == instance.number) return Status();
    return Status::FailedPrecondition(
        "this program was compiled while another thread compiled one too, so processes cannot tell "
        "its exchanges apart. Compile programs that exchange tokens across processes one after the "
        "other");
  }
  order.push_back(place);
  if (order.size() > kRememberedPlaces) {
    number_at.erase(order.front());
    order.pop_front();
  }
  return Status();
}

}  // namespace wideep
