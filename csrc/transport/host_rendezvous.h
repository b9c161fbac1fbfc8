// Where the ranks of one process meet. Each rank brings its buffers and leaves; the last one to
// come does the exchange for all. No rank blocks a thread while it waits: its completion is called
// later.
//
//   who writes   Arrive() adds the rank's arguments under the mutex.
//   who runs     the last of `num_ranks` arrivals takes the meeting out of the table and runs the
//   exchange. who resets   nobody: a meeting is made by its first arrival and dropped by its last,
//   or by the deadline.
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
#include <vector>

#include "csrc/core/status.h"

namespace wideep {

/// Identifies one exchange among all that are in flight in the process.
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

/// Runs one exchange. `args[rank]` is what that rank brought. Calls `finish` once, from any thread.
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
  };

  HostRendezvous();
  ~HostRendezvous();
  HostRendezvous(const HostRendezvous&) = delete;
  HostRendezvous& operator=(const HostRendezvous&) = delete;

  /// The rendezvous of this process; never destroyed.
  static HostRendezvous& Global();

  /// Adds a rank to its meeting. If it is the last one, runs `exchange` on this thread (and on
  /// whatever threads the exchange uses). `arrival.done` is called exactly once, perhaps before
  /// this returns.
  void Arrive(const MeetingKey& key, Arrival arrival, const Exchange& exchange);

  /// Fails every meeting of `group` that is still open: its memory is about to go.
  void CancelGroup(int64_t group, const Status& why);

 private:
  using Clock = std::chrono::steady_clock;
  struct Meeting {
    const char* op;
    Clock::time_point due;
    std::chrono::milliseconds deadline;
    int num_arrived = 0;
    std::vector<std::shared_ptr<void>> args;  // by rank; null until it has come
    std::vector<Completion> done;             // by rank
  };

  void WatchDeadlines();
  void Remember(const MeetingKey& key, const Status& status);  // needs mutex_
  static Status Missing(const Meeting& meeting);

  std::mutex mutex_;
  std::condition_variable wake_watcher_;
  std::map<MeetingKey, Meeting> meetings_;
  std::map<MeetingKey, Status> failed_;  // recent failures, bounded by kRememberedFailures
  std::deque<MeetingKey> failed_order_;
  Clock::time_point next_check_ = Clock::time_point::max();
  bool stopping_ = false;
  std::thread watcher_;
};

}  // namespace wideep
