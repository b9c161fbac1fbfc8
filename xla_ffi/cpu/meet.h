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
#include "csrc/core/worker_pool.h"
#include "csrc/ep/sent_host.h"
#include "csrc/transport/host_peers.h"
#include "csrc/transport/host_rendezvous.h"
#include "csrc/transport/host_staging.h"
#include "xla_ffi/cpu/call_sites.h"
#include "xla_ffi/cpu/group_registry.h"
#include "xla_ffi/ffi_util.h"

namespace wideep {

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

/// What a rank of this process brings to a meeting.
template <typename Shape, typename Buffers>
struct Brought {
  Shape shape;
  Buffers buffers;
};

/// The parts of all ranks in rank order, those of other processes read from their arenas. Ranks
/// that were not expected are masked.
template <typename Shape, typename Buffers>
Status Gather(const char* op, int process, const std::vector<int>* process_of_rank,
              const std::vector<std::shared_ptr<void>>& args, Shape& shape,
              std::vector<Buffers>& all) {
  const auto elsewhere = [&](int64_t rank) {
    return process_of_rank != nullptr && (*process_of_rank)[rank] != process;
  };
  all.resize(args.size());
  bool first = true, agree = true;
  for (size_t rank = 0; rank < args.size(); ++rank) {
    const Shape* of_rank = nullptr;
    if (args[rank] == nullptr) {
      all[rank].masked = true;
      continue;
    }
    if (!elsewhere(rank)) {
      const auto& brought = *static_cast<const Brought<Shape, Buffers>*>(args[rank].get());
      of_rank = &brought.shape;
      all[rank] = brought.buffers;
    } else {
      const auto& block = *static_cast<const HostPeers::Block*>(args[rank].get());
      const StagedHeader* header = ReadStagedHeader(block.data, block.bytes, op, sizeof(Shape));
      if (header == nullptr) {
        return Status::InvalidArgument(std::string(op) + ": rank " + std::to_string(rank) +
                                       " in process " + std::to_string((*process_of_rank)[rank]) +
                                       " runs another op here. All processes must run the same "
                                       "program");
      }
      of_rank = reinterpret_cast<const Shape*>(StagedShape(header));
      ReceivedArrays received(header);
      Sent(*of_rank, all[rank], elsewhere, received);
    }
    if (first) shape = *of_rank;
    agree = agree && *of_rank == shape;
    first = false;
  }
  if (agree) return Status();
  return Status::InvalidArgument(std::string(op) + ": ranks disagree on shapes, dtypes or options");
}

/// Stages what the ranks of other processes read, tells them, and then arrives: from then on XLA
/// may free the buffers.
template <typename Shape, typename Buffers>
void Announce(const HostGroup& group, const MeetingKey& key, const char* op, const Shape& shape,
              const Buffers& buffers, HostRendezvous::Arrival arrival, const Exchange& exchange) {
  const std::shared_ptr<const std::vector<int>> process_of_rank = arrival.process_of_rank;
  const auto elsewhere = [process_of_rank, process = group.process](int64_t rank) {
    return (*process_of_rank)[rank] != process;
  };
  SentArrays sent;
  Buffers fields = buffers;
  Sent(shape, fields, elsewhere, sent);
  arrival.tell_others = [peers = std::weak_ptr<HostPeers>(group.peers), key](const Status& why) {
    if (auto open = peers.lock()) open->AnnounceFailure(key, why);
  };
  auto coming = std::make_shared<HostRendezvous::Arrival>(std::move(arrival));
  StageBlock(group.peers->arena(), WorkerPool::Global(), op, &shape, sizeof(Shape), sent.Take(),
             [peers = group.peers, key, coming, exchange](const Status& status, StagedBlock block) {
               if (!status.ok()) {
                 peers->AnnounceFailure(key, status);
                 HostRendezvous::Global().FailElsewhere(key, status);
                 return coming->done(status);
               }
               peers->Announce(key, coming->rank, coming->expected.get(), block.offset,
                               block.bytes);
               HostRendezvous::Global().Arrive(key, std::move(*coming), exchange);
             });
}

/// `Shape` is what all ranks must agree on, `Buffers` one rank's part. `check(place)` may refuse
/// the call; `run(shape, buffers of all ranks in rank order, finish)` does the exchange for the
/// ranks of this process; `empty(shape, buffers)` writes what a masked rank gets, which meets
/// nobody.
template <typename Shape, typename Buffers>
ffi::Future Meet(const char* op, const CallSite& site, const Shape& shape, const Buffers& buffers,
                 const std::function<Status(const HostGroup&, HostGroup::Place)>& check,
                 void (*run)(const Shape&, std::vector<Buffers>, Completion),
                 void (*empty)(const Shape&, const Buffers&)) {
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
  if (group->expected != nullptr && !(*group->expected)[place->second.rank]) {
    empty(shape, buffers);
    promise.SetAvailable();
    return future;
  }
  HostRendezvous::Arrival arrival;
  arrival.rank = place->second.rank;
  arrival.num_ranks = group->num_ranks;
  arrival.op = op;
  arrival.deadline = group->deadline;
  arrival.expected = group->expected;
  arrival.args = std::make_shared<Brought<Shape, Buffers>>(Brought<Shape, Buffers>{shape, buffers});
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
  const auto spanned = group->process_of_rank.find(place->second.subgroup);
  const bool spans = spanned != group->process_of_rank.end();
  const MeetingKey key{site.run_id.run_id, spans ? site.instance->place : site.instance->number,
                       site.group, place->second.subgroup};
  if (spans) {
    if (Status status = CheckPlace(site.run_id.run_id, *site.instance); !status.ok()) {
      promise.SetError(ToFfiError(status));
      return future;
    }
    arrival.process_of_rank = spanned->second;
  }
  const Exchange exchange = [op, run, process = group->process,
                             process_of_rank = arrival.process_of_rank](
                                std::vector<std::shared_ptr<void>> args, Completion finish) {
    Shape agreed;
    std::vector<Buffers> all;
    Status status = Gather(op, process, process_of_rank.get(), args, agreed, all);
    if (!status.ok()) return finish(status);
    // What other processes sent stays until the exchange has read it.
    run(agreed, std::move(all),
        [args = std::move(args), finish = std::move(finish)](const Status& outcome) {
          finish(outcome);
        });
  };
  if (!spans) {
    HostRendezvous::Global().Arrive(key, std::move(arrival), exchange);
    return future;
  }
  Announce(*group, key, op, shape, buffers, std::move(arrival), exchange);
  return future;
}

/// For ops with nothing more to check.
inline Status NoCheck(const HostGroup&, HostGroup::Place) { return Status(); }

}  // namespace wideep
