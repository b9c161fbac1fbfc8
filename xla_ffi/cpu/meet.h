// What every CPU handler of an exchange does: bring this rank's buffers to the rendezvous and
// return a future that completes when the exchange is done.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/core/elastic_threads.h"
#include "csrc/core/float_env.h"
#include "csrc/transport/host_rendezvous.h"
#include "xla_ffi/cpu/group_registry.h"
#include "xla_ffi/ffi_util.h"

namespace wideep {

/// One call site of an executable. XLA instantiates it once and shares it among the devices, so its
/// number tells exchanges apart even where a traced function is called twice and its attributes are
/// equal.
struct OpInstance {
  static ffi::TypeId id;
  static ffi::TypeInfo info;
  int64_t number;
};

ffi::ErrorOr<std::unique_ptr<OpInstance>> InstantiateOp();

/// Where a handler runs.
struct CallSite {
  int32_t device;
  ffi::RunId run_id;
  OpInstance* instance;
  int64_t group;
};

/// Tells a completion whether it runs inside the handler call that it belongs to.
class HandlerScope {
 public:
  class Running {
   public:
    bool OnThisThread() const { return std::this_thread::get_id() == thread_ && *inside_; }

   private:
    friend class HandlerScope;
    std::thread::id thread_ = std::this_thread::get_id();
    std::shared_ptr<bool> inside_ = std::make_shared<bool>(true);  // touched by `thread_` only
  };

  HandlerScope() = default;
  ~HandlerScope() { *running_.inside_ = false; }
  HandlerScope(const HandlerScope&) = delete;
  HandlerScope& operator=(const HandlerScope&) = delete;
  const Running& running() const { return running_; }

 private:
  Running running_;
};

inline ffi::Future FailedFuture(const Status& status) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(ToFfiError(status));
  return future;
}

/// `Shape` is what all ranks must agree on, `Buffers` one rank's part. `check(place)` may refuse
/// the call; `run(shape, buffers of all ranks in rank order, finish)` does the exchange.
template <typename Shape, typename Buffers>
ffi::Future Meet(const char* op, const CallSite& site, const Shape& shape, const Buffers& buffers,
                 const std::function<Status(const HostGroup&, HostGroup::Place)>& check,
                 void (*run)(const Shape&, std::vector<Buffers>, Completion)) {
  struct Brought {
    Shape shape;
    Buffers buffers;
  };
  std::shared_ptr<const HostGroup> group = GroupRegistry::Global().Find(site.group);
  if (group == nullptr) {
    return FailedFuture(Status::FailedPrecondition(
        std::string(op) +
        ": the ExpertGroup was closed. Keep it open for as long as functions that use it run"));
  }
  auto place = group->place_of_device.find(site.device);
  if (place == group->place_of_device.end()) {
    return FailedFuture(Status::FailedPrecondition(std::string(op) + ": device " +
                                                   std::to_string(site.device) +
                                                   " is not in the ExpertGroup's mesh. Run the op "
                                                   "inside shard_map over the group's own mesh"));
  }
  if (Status status = check(*group, place->second); !status.ok()) return FailedFuture(status);

  ffi::Promise promise;
  ffi::Future future(promise);
  HostRendezvous::Arrival arrival;
  arrival.rank = place->second.rank;
  arrival.num_ranks = group->num_ranks;
  arrival.op = op;
  arrival.deadline = group->deadline;
  arrival.args = std::make_shared<Brought>(Brought{shape, buffers});
  HandlerScope handler;
  arrival.done = [promise, running = handler.running(), env = GetFloatEnv()](const Status& status) {
    const auto complete = [promise, status] {
      ffi::Promise handle = promise;
      if (status.ok()) {
        handle.SetAvailable();
      } else {
        handle.SetError(ToFfiError(status));
      }
    };
    // Completing a future runs what XLA scheduled behind it, and that may block: its own
    // collectives wait for the other ranks. Only while this rank's handler has not returned is
    // nothing behind it yet.
    if (running.OnThisThread()) return complete();
    ElasticThreads::Global().Run([complete, env] {
      SetFloatEnv(env);  // of XLA's thread, so that the rank computes the same bits on ours
      complete();
    });
  };
  const MeetingKey key{site.run_id.run_id, site.instance->number, site.group,
                       place->second.subgroup};
  HostRendezvous::Global().Arrive(
      key, std::move(arrival),
      [op, run](std::vector<std::shared_ptr<void>> args, Completion finish) {
        std::vector<Buffers> all;
        const Shape& first = static_cast<Brought*>(args[0].get())->shape;
        for (const std::shared_ptr<void>& arg : args) {
          const Brought& brought = *static_cast<Brought*>(arg.get());
          if (!(brought.shape == first)) {
            return finish(Status::InvalidArgument(std::string(op) +
                                                  ": ranks disagree on shapes, dtypes or options"));
          }
          all.push_back(brought.buffers);
        }
        run(first, std::move(all), std::move(finish));
      });
  return future;
}

/// For ops with nothing more to check.
inline Status NoCheck(const HostGroup&, HostGroup::Place) { return Status(); }

}  // namespace wideep
