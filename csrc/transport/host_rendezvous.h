// Where ranks meet: those of this process bring their buffers and leave; of those in other
// processes HostPeers brings what they sent. The last one to come does the exchange for all ranks
// of this process. No rank blocks a thread while it waits: its completion is called later.
//
//   who writes   Arrive() and ArriveElsewhere() add a rank's arguments under the mutex.
//   who runs     whoever adds the last of the expected ranks takes the meeting out of the table and
//                runs the exchange.
//   who resets   nobody: a meeting is made by its first arrival and dropped by its last, by the
//                deadline, or with the ranks it waits for.
//
// A meeting that misses its deadline fails on every rank that came, naming those that did not. Its
// key is remembered for a while, so that a rank that comes late gets the same error at once.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/core/status.h"

namespace wideep {

/// Identifies one exchange among all that are in flight. Where ranks are in several processes, all
/// of them use the same numbers.
struct MeetingKey {
  int64_t run_id;       // one launch of an executable, on all devices
  int64_t op_instance;  // one call site in the executable
  int64_t group;        // the expert group
  int32_t subgroup;     // which of several groups side by side in the mesh

  bool operator<(const MeetingKey& other) const {
    return std::tie(run_id, op_instance, group, subgroup) <
           std::tie(other.run_id, other.op_instance, other.group, other.subgroup);
  }
};

using Completion = std::function<void(const Status&)>;

/// Runs one exchange. `args[rank]` is what that rank brought, null for ranks that were not
/// expected. Calls `finish` once, from any thread.
using Exchange = std::function<void(std::vector<std::shared_ptr<void>> args, Completion finish)>;

class HostRendezvous {
 public:
  struct Arrival {
    int rank;
    int num_ranks;
    const char* op;  // for messages; must outlive the meeting
    std::chrono::milliseconds deadline;
    std::shared_ptr<void> args;
    Completion done;
    /// Ranks to wait for, by rank; null: all of them. The same for every rank of the meeting.
    std::shared_ptr<const std::vector<bool>> expected = nullptr;
    /// The process of every rank; null: all are in this one.
    std::shared_ptr<const std::vector<int>> process_of_rank = nullptr;
    /// Called when the meeting fails here for reasons that other processes may not see.
    std::function<void(const Status&)> tell_others = nullptr;
  };

  HostRendezvous();
  ~HostRendezvous();
  HostRendezvous(const HostRendezvous&) = delete;
  HostRendezvous& operator=(const HostRendezvous&) = delete;

  /// The rendezvous of this process; never destroyed.
  static HostRendezvous& Global();

  /// Adds a rank of this process to its meeting. If it is the last one, runs `exchange` on this
  /// thread (and on whatever threads the exchange uses). `arrival.done` is called exactly once,
  /// perhaps before this returns.
  void Arrive(const MeetingKey& key, Arrival arrival, const Exchange& exchange);

  /// Adds a rank of another process, maybe to a meeting that no rank of this one has come to yet:
  /// it waits there without a deadline. It may also be one turn of a loop ahead of this process.
  void ArriveElsewhere(const MeetingKey& key, int rank, int num_ranks, std::shared_ptr<void> args);

  /// Fails a meeting that has failed in another process, here too.
  void FailElsewhere(const MeetingKey& key, const Status& why);

  /// (subgroup, rank)s of `group` that will not come any more, since `why`: meetings that wait for
  /// one of them fail, now and later.
  void LoseRanks(int64_t group, const std::vector<std::pair<int32_t, int>>& ranks,
                 const std::string& why);

  /// Fails every meeting of `group` that is still open: its memory is about to go.
  void CancelGroup(int64_t group, const Status& why);

 private:
  using Clock = std::chrono::steady_clock;
  using Place = std::tuple<int64_t, int32_t, int>;  // group, subgroup, rank
  struct Meeting {
    // Of the first rank of this process; until it comes, op is null.
    const char* op = nullptr;
    Clock::time_point due = Clock::time_point::max();
    std::chrono::milliseconds deadline{};
    Exchange exchange;
    std::shared_ptr<const std::vector<bool>> expected;
    std::shared_ptr<const std::vector<int>> process_of_rank;
    std::function<void(const Status&)> tell_others;

    std::vector<std::shared_ptr<void>> args;  // by rank; null until it has come
    std::vector<Completion> done;             // by rank; of this process's ranks that came
    std::vector<std::pair<int, std::shared_ptr<void>>> next_turn;  // of the ranks that are ahead

    bool Expects(size_t rank) const { return expected == nullptr || (*expected)[rank]; }
    bool Complete() const;
    bool LacksAny(const std::vector<std::pair<int32_t, int>>& ranks, int32_t subgroup) const;
    std::vector<int> MissingRanks() const;
  };
  using Table = std::map<MeetingKey, Meeting>;

  void WatchDeadlines();
  Meeting& Open(const MeetingKey& key, int num_ranks);               // needs mutex_
  Meeting Take(Table::iterator slot);                                // needs mutex_
  Meeting Fail(Table::iterator slot, const Status& status);          // needs mutex_
  void Remember(const MeetingKey& key, const Status& status);        // needs mutex_
  Status RefuseLost(const MeetingKey& key, const Meeting& meeting);  // needs mutex_
  static void Run(Meeting complete);
  static Status Missing(const Meeting& meeting);
  static std::string Name(const Meeting& meeting, const std::vector<int>& ranks);

  std::mutex mutex_;
  std::condition_variable wake_watcher_;
  Table meetings_;
  std::map<MeetingKey, Status> failed_;  // recent failures, bounded by kRememberedFailures
  std::deque<MeetingKey> failed_order_;
  std::map<Place, std::string> lost_;  // ranks that will not come, and why
  Clock::time_point next_check_ = Clock::time_point::max();
  bool stopping_ = false;
  std::thread watcher_;
};

}  // namespace wideep
