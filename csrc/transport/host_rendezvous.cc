#include "csrc/transport/host_rendezvous.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <utility>

namespace wideep {
namespace {

constexpr size_t kRememberedFailures = 1024;

void CompleteAll(const std::vector<Completion>& completions, const Status& status) {
  for (const Completion& done : completions) {
    if (done) done(status);
  }
}

template <typename Numbers>
std::string Join(const Numbers& numbers) {
  std::string text;
  for (int number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return text;
}

}  // namespace

bool HostRendezvous::Meeting::Complete() const {
  for (size_t rank = 0; rank < args.size(); ++rank) {
    if (args[rank] == nullptr && Expects(rank)) return false;
  }
  return op != nullptr;
}

bool HostRendezvous::Meeting::LacksAny(const std::vector<std::pair<int32_t, int>>& ranks,
                                       int32_t subgroup) const {
  for (const auto& [of_subgroup, rank] : ranks) {
    if (of_subgroup == subgroup && Expects(rank) && args[rank] == nullptr) return true;
  }
  return false;
}

std::vector<int> HostRendezvous::Meeting::MissingRanks() const {
  std::vector<int> missing;
  for (size_t rank = 0; rank < args.size(); ++rank) {
    if (args[rank] == nullptr && Expects(rank)) missing.push_back(static_cast<int>(rank));
  }
  return missing;
}

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
      Meeting& meeting = Open(key, arrival.num_ranks);
      if (meeting.op == nullptr) {
        meeting.op = arrival.op;
        meeting.deadline = arrival.deadline;
        meeting.due = Clock::now() + arrival.deadline;
        meeting.exchange = exchange;
        meeting.expected = std::move(arrival.expected);
        meeting.process_of_rank = std::move(arrival.process_of_rank);
        meeting.tell_others = std::move(arrival.tell_others);
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
      } else if (refused = RefuseLost(key, meeting); !refused.ok()) {
        complete = Fail(meetings_.find(key), refused);  // goes outside of the mutex
      } else {
        meeting.args[arrival.rank] = std::move(arrival.args);
        meeting.done[arrival.rank] = std::move(arrival.done);
        if (!meeting.Complete()) return;
        complete = Take(meetings_.find(key));
      }
    }
  }
  if (!refused.ok()) {
    arrival.done(refused);
    return;
  }
  Run(std::move(complete));
}

void HostRendezvous::ArriveElsewhere(const MeetingKey& key, int rank, int num_ranks,
                                     std::shared_ptr<void> args) {
  Meeting complete;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // What it sent is released where `args` goes, outside of the mutex.
    if (failed_.count(key) != 0) return;
    Meeting& meeting = Open(key, num_ranks);
    if (rank >= static_cast<int>(meeting.args.size())) return;
    if (meeting.args[rank] != nullptr) {
      meeting.next_turn.emplace_back(rank, std::move(args));
      return;
    }
    meeting.args[rank] = std::move(args);
    if (!meeting.Complete()) return;
    complete = Take(meetings_.find(key));
  }
  Run(std::move(complete));
}

void HostRendezvous::FailElsewhere(const MeetingKey& key, const Status& why) {
  Meeting failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto slot = meetings_.find(key);
    if (slot != meetings_.end()) {
      failed = Fail(slot, why);
    } else if (failed_.count(key) == 0) {
      Remember(key, why);
    }
  }
  CompleteAll(failed.done, why);
}

void HostRendezvous::LoseRanks(int64_t group, const std::vector<std::pair<int32_t, int>>& ranks,
                               const std::string& why) {
  std::vector<std::pair<Meeting, Status>> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [subgroup, rank] : ranks) lost_[{group, subgroup, rank}] = why;
    for (auto it = meetings_.begin(); it != meetings_.end();) {
      const auto slot = it++;
      // One without ranks of this process stays: the lost ones may have been all that was missing.
      if (slot->first.group != group || slot->second.op == nullptr) continue;
      if (!slot->second.LacksAny(ranks, slot->first.subgroup)) continue;
      const Status status = RefuseLost(slot->first, slot->second);
      failed.emplace_back(Fail(slot, status), status);
    }
  }
  for (const auto& [meeting, status] : failed) {
    std::fprintf(stderr, "jax_wideep: %s\n", status.message().c_str());
    CompleteAll(meeting.done, status);
  }
}

void HostRendezvous::CancelGroup(int64_t group, const Status& why) {
  std::vector<Meeting> cancelled;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = meetings_.begin(); it != meetings_.end();) {
      const auto slot = it++;
      if (slot->first.group == group) cancelled.push_back(Fail(slot, why));
    }
    for (auto it = lost_.begin(); it != lost_.end();) {
      it = std::get<0>(it->first) == group ? lost_.erase(it) : std::next(it);
    }
  }
  for (const Meeting& meeting : cancelled) CompleteAll(meeting.done, why);
}

HostRendezvous::Meeting& HostRendezvous::Open(const MeetingKey& key, int num_ranks) {
  auto [slot, first] = meetings_.try_emplace(key);
  if (first) {
    slot->second.args.resize(num_ranks);
    slot->second.done.resize(num_ranks);
  }
  return slot->second;
}

HostRendezvous::Meeting HostRendezvous::Take(Table::iterator slot) {
  const MeetingKey key = slot->first;
  Meeting taken = std::move(slot->second);
  meetings_.erase(slot);
  if (!taken.next_turn.empty()) {
    Meeting& next = Open(key, static_cast<int>(taken.args.size()));
    for (auto& [rank, args] : taken.next_turn) next.args[rank] = std::move(args);
    taken.next_turn.clear();
  }
  return taken;
}

HostRendezvous::Meeting HostRendezvous::Fail(Table::iterator slot, const Status& status) {
  Remember(slot->first, status);
  Meeting failed = std::move(slot->second);
  meetings_.erase(slot);
  return failed;
}

void HostRendezvous::Run(Meeting complete) {
  complete.exchange(std::move(complete.args),
                    [completions = std::move(complete.done)](const Status& status) {
                      CompleteAll(completions, status);
                    });
}

std::string HostRendezvous::Name(const Meeting& meeting, const std::vector<int>& ranks) {
  std::string text = "rank(s) " + Join(ranks) + " of " + std::to_string(meeting.args.size());
  if (meeting.process_of_rank == nullptr) return text;
  std::set<int> processes;
  for (int rank : ranks) processes.insert((*meeting.process_of_rank)[rank]);
  return text + " (in process " + Join(processes) + ")";
}

Status HostRendezvous::Missing(const Meeting& meeting) {
  return Status::DeadlineExceeded(
      std::string(meeting.op) + ": " + Name(meeting, meeting.MissingRanks()) +
      " did not arrive within the deadline of " + std::to_string(meeting.deadline.count()) +
      " ms. Every rank of the group must run every exchange; look at "
      "what those ranks did instead, or "
      "raise deadline_s on the ExpertGroup");
}

Status HostRendezvous::RefuseLost(const MeetingKey& key, const Meeting& meeting) {
  if (lost_.empty()) return Status();
  std::vector<int> gone;
  std::set<std::string> reasons;
  for (int rank : meeting.MissingRanks()) {
    auto lost = lost_.find({key.group, key.subgroup, rank});
    if (lost == lost_.end()) continue;
    gone.push_back(rank);
    reasons.insert(lost->second);
  }
  if (gone.empty()) return Status();
  std::string why;
  for (const std::string& reason : reasons) why += (why.empty() ? "" : ", ") + reason;
  return Status::FailedPrecondition(
      std::string(meeting.op) + ": " + Name(meeting, gone) + " will not come: " + why +
      ". Look at that process's own error. The group goes on without those ranks "
      "after mask_ranks; otherwise start the processes again");
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
      const auto slot = it++;
      if (slot->second.due > now) {
        next_check_ = std::min(next_check_, slot->second.due);
        continue;
      }
      Status status = Missing(slot->second);
      overdue.emplace_back(Fail(slot, status), status);
    }
    lock.unlock();
    for (const auto& [meeting, status] : overdue) {
      // Said here as well: the missing rank may by now wait in a collective of XLA's for those that
      // fail, and then nobody gets to see the error before XLA ends the process.
      std::fprintf(stderr, "jax_wideep: %s\n", status.message().c_str());
      if (meeting.tell_others) meeting.tell_others(status);
      CompleteAll(meeting.done, status);
    }
    overdue.clear();
    lock.lock();
  }
}

}  // namespace wideep
