#include "csrc/transport/host_rendezvous.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace wideep {
namespace {

constexpr size_t kRememberedFailures = 1024;

void CompleteAll(const std::vector<Completion>& completions, const Status& status) {
  for (const Completion& done : completions) {
    if (done) done(status);
  }
}

}  // namespace

HostRendezvous::HostRendezvous() : watcher_([this] { WatchDeadlines(); }) {}

HostRendezvous::~HostRendezvous() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_watcher_.notify_all();
  watcher_.join();
}

HostRendezvous& HostRendezvous::Global() {
  static HostRendezvous* const rendezvous = new HostRendezvous();
  return *rendezvous;
}

void HostRendezvous::Arrive(const MeetingKey& key, Arrival arrival, const Exchange& exchange) {
  Meeting complete;
  Status refused;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto failure = failed_.find(key);
    if (failure != failed_.end()) {
      refused = failure->second;
    } else {
      auto [slot, first] = meetings_.try_emplace(key);
      Meeting& meeting = slot->second;
      if (first) {
        meeting.op = arrival.op;
        meeting.deadline = arrival.deadline;
        meeting.due = Clock::now() + arrival.deadline;
        meeting.args.resize(arrival.num_ranks);
        meeting.done.resize(arrival.num_ranks);
        if (meeting.due < next_check_) {
          next_check_ = meeting.due;
          wake_watcher_.notify_one();
        }
      }
      if (meeting.args[arrival.rank] != nullptr) {
        refused =
            Status::Internal(std::string(arrival.op) + ": rank " + std::to_string(arrival.rank) +
                             " arrived twice at one exchange. Run the op inside shard_map over the "
                             "group's own mesh, with every mesh axis manual");
      } else {
        meeting.args[arrival.rank] = std::move(arrival.args);
        meeting.done[arrival.rank] = std::move(arrival.done);
        if (++meeting.num_arrived < static_cast<int>(meeting.args.size())) return;
        complete = std::move(meeting);
        meetings_.erase(slot);
      }
    }
  }
  if (!refused.ok()) {
    arrival.done(refused);
    return;
  }
  exchange(std::move(complete.args),
           [completions = std::move(complete.done)](const Status& status) {
             CompleteAll(completions, status);
           });
}

void HostRendezvous::CancelGroup(int64_t group, const Status& why) {
  std::vector<Completion> cancelled;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = meetings_.begin(); it != meetings_.end();) {
      if (it->first.group != group) {
        ++it;
        continue;
      }
      for (Completion& done : it->second.done) cancelled.push_back(std::move(done));
      Remember(it->first, why);
      it = meetings_.erase(it);
    }
  }
  CompleteAll(cancelled, why);
}

Status HostRendezvous::Missing(const Meeting& meeting) {
  std::string missing;
  for (size_t rank = 0; rank < meeting.args.size(); ++rank) {
    if (meeting.args[rank] == nullptr)
      missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
  }
  return Status::DeadlineExceeded(std::string(meeting.op) + ": rank(s) " + missing + " of " +
                                  std::to_string(meeting.args.size()) +
                                  " did not arrive within the deadline of " +
                                  std::to_string(meeting.deadline.count()) +
                                  " ms. Every rank of the group must run every exchange; look at "
                                  "what those ranks did instead, or "
                                  "raise deadline_s on the ExpertGroup");
}

void HostRendezvous::Remember(const MeetingKey& key, const Status& status) {
  failed_[key] = status;
  failed_order_.push_back(key);
  if (failed_order_.size() > kRememberedFailures) {
    failed_.erase(failed_order_.front());
    failed_order_.pop_front();
  }
}

void HostRendezvous::WatchDeadlines() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (next_check_ == Clock::time_point::max()) {
      wake_watcher_.wait(lock);
    } else {
      const Clock::time_point until =
          next_check_;  // a copy: arrivals may move next_check_ meanwhile
      wake_watcher_.wait_until(lock, until);
    }
    const Clock::time_point now = Clock::now();
    if (now < next_check_) continue;
    std::vector<std::pair<Meeting, Status>> overdue;
    next_check_ = Clock::time_point::max();
    for (auto it = meetings_.begin(); it != meetings_.end();) {
      if (it->second.due > now) {
        next_check_ = std::min(next_check_, it->second.due);
        ++it;
        continue;
      }
      Status status = Missing(it->second);
      Remember(it->first, status);
      overdue.emplace_back(std::move(it->second), std::move(status));
      it = meetings_.erase(it);
    }
    lock.unlock();
    for (const auto& [meeting, status] : overdue) {
      // Said here as well: the missing rank may by now wait in a collective of XLA's for those that
      // fail, and then nobody gets to see the error before XLA ends the process.
      std::fprintf(stderr, "jax_wideep: %s\n", status.message().c_str());
      CompleteAll(meeting.done, status);
    }
    overdue.clear();
    lock.lock();
  }
}

}  // namespace wideep
