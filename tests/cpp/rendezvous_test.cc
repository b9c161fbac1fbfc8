// The rendezvous: who runs an exchange, who hears of its outcome, and what happens when a rank is
// missing.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/transport/host_rendezvous.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Context;
using check::Counter;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr milliseconds kLong = std::chrono::minutes(5);

// One rank's part of an exchange, and what it was told.
struct Part {
  int rank = 0;
  int64_t value = 0;
  int64_t result = -1;  // written by the exchange
  Status status;
  std::atomic<int> num_done{0};
};

// One exchange as a test sees it: `result` of every part becomes a sum that depends on the order of
// ranks.
struct Meeting {
  Meeting(MeetingKey meeting_key, int num_ranks) : key(meeting_key), parts(num_ranks) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      parts[rank] = std::make_shared<Part>();
      parts[rank]->rank = rank;
      parts[rank]->value =
          1000 * key.run_id + 100 * key.op_instance + 10 * key.group + key.subgroup + rank;
    }
  }

  static int64_t Mix(const std::vector<int64_t>& values) {
    int64_t mixed = 0;
    for (int64_t value : values) mixed = mixed * 31 + value;
    return mixed;
  }
  int64_t Expected() const {
    std::vector<int64_t> values;
    for (const auto& part : parts) values.push_back(part->value);
    return Mix(values);
  }

  void Arrive(HostRendezvous& rendezvous, int rank, milliseconds deadline = kLong) {
    HostRendezvous::Arrival arrival;
    arrival.rank = rank;
    arrival.num_ranks = static_cast<int>(parts.size());
    arrival.op = "test_op";
    arrival.deadline = deadline;
    arrival.args = parts[rank];
    arrival.done = [this, part = parts[rank]](const Status& status) {
      part->status = status;
      ++part->num_done;
      completed.Add();
    };
    rendezvous.Arrive(key, std::move(arrival),
                      [this](std::vector<std::shared_ptr<void>> args, Completion finish) {
                        ++num_exchanges;
                        std::vector<int64_t> values;
                        for (const auto& arg : args)
                          values.push_back(static_cast<Part*>(arg.get())->value);
                        for (const auto& arg : args)
                          static_cast<Part*>(arg.get())->result = Mix(values);
                        finish(Status());
                      });
  }

  void CheckSucceeded() {
    const Context context("run " + std::to_string(key.run_id) + ", op " +
                          std::to_string(key.op_instance) + ", group " + std::to_string(key.group) +
                          "." + std::to_string(key.subgroup));
    CHECK(completed.WaitFor(static_cast<int>(parts.size())));
    CHECK_EQ(num_exchanges.load(), 1);
    for (const auto& part : parts) {
      CHECK_EQ(part->num_done.load(), 1);
      CHECK(part->status.ok());
      CHECK_EQ(part->result, Expected());
    }
  }

  MeetingKey key;
  std::vector<std::shared_ptr<Part>> parts;
  std::atomic<int> num_exchanges{0};
  Counter completed;
};

void Run(std::vector<std::thread>& threads) {
  for (std::thread& thread : threads) thread.join();
}

// Several groups side by side, each rank on a thread of its own; every rank goes through the same
// meetings in an order of its own, with pauses.
TEST(AnyOrderOfArrival) {
  for (int seed = 0; seed < 4; ++seed) {
    HostRendezvous rendezvous;
    const int num_ranks = 2 + seed;
    const int num_groups = 3;
    std::vector<std::vector<std::unique_ptr<Meeting>>> meetings(num_groups);
    for (int g = 0; g < num_groups; ++g) {
      for (int64_t run = 1; run <= 4; ++run) {
        for (int64_t op = 1; op <= 5; ++op) {
          // Two of the three groups are subgroups of one expert group.
          const MeetingKey key{run, op, g == 2 ? 8 : 7, g % 2};
          meetings[g].push_back(std::make_unique<Meeting>(key, num_ranks));
        }
      }
    }
    std::vector<std::thread> threads;
    for (int g = 0; g < num_groups; ++g) {
      for (int rank = 0; rank < num_ranks; ++rank) {
        threads.emplace_back([&, g, rank, seed] {
          Random random(seed * 100 + g * 10 + rank);
          std::vector<size_t> order(meetings[g].size());
          for (size_t i = 0; i < order.size(); ++i) order[i] = i;
          std::shuffle(order.begin(), order.end(), random);
          for (size_t i : order) {
            if (Uniform(random, 0, 3) == 0) {
              std::this_thread::sleep_for(std::chrono::microseconds(Uniform(random, 0, 2000)));
            }
            meetings[g][i]->Arrive(rendezvous, rank);
          }
        });
      }
    }
    Run(threads);
    for (auto& of_group : meetings) {
      for (auto& meeting : of_group) meeting->CheckSucceeded();
    }
  }
}

// One thread plays all ranks, each rank taking the meetings in another order: if an arrival
// blocked, this would hang.
TEST(ArrivalsNeverBlock) {
  HostRendezvous rendezvous;
  const int num_ranks = 8;
  std::vector<std::unique_ptr<Meeting>> meetings;
  for (int64_t op = 0; op < 50; ++op) {
    meetings.push_back(std::make_unique<Meeting>(MeetingKey{1, op, 1, 0}, num_ranks));
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (size_t i = 0; i < meetings.size(); ++i) {
      Meeting& meeting = *meetings[(i * 7 + rank * 13) % meetings.size()];
      if (rank < num_ranks - 1) CHECK_EQ(meeting.num_exchanges.load(), 0);
      meeting.Arrive(rendezvous, rank);
    }
  }
  for (auto& meeting : meetings) meeting->CheckSucceeded();
}

// The last one to come runs the exchange, on its own thread, outside the lock.
TEST(LastArrivalRunsTheExchange) {
  HostRendezvous rendezvous;
  std::thread::id ran_on;
  Counter done;
  const auto arrive = [&](int64_t op, int rank, const Exchange& exchange) {
    HostRendezvous::Arrival arrival{
        rank, 2, "op", kLong, std::make_shared<int>(rank), [&](const Status&) { done.Add(); }};
    rendezvous.Arrive({1, op, 1, 0}, std::move(arrival), exchange);
  };
  const Exchange plain = [](std::vector<std::shared_ptr<void>>, Completion finish) {
    finish(Status());
  };
  const Exchange exchange = [&](std::vector<std::shared_ptr<void>>, Completion finish) {
    ran_on = std::this_thread::get_id();
    // A whole meeting inside an exchange: would deadlock if the lock were held here.
    arrive(2, 0, plain);
    arrive(2, 1, plain);
    finish(Status());
  };
  arrive(1, 1, exchange);
  CHECK_EQ(done.count(), 0);
  std::thread last([&] { arrive(1, 0, exchange); });
  const std::thread::id last_id = last.get_id();
  last.join();
  CHECK_EQ(done.count(), 4);
  CHECK(ran_on == last_id);
}

// The exchange may finish later, elsewhere, and its failure reaches every rank.
TEST(OutcomeOfTheExchangeReachesAllRanks) {
  HostRendezvous rendezvous;
  Counter done;
  std::vector<Status> statuses(4);
  std::thread finisher;
  for (int rank = 0; rank < 4; ++rank) {
    HostRendezvous::Arrival arrival{
        rank, 4, "op", kLong, std::make_shared<int>(rank), [&, rank](const Status& status) {
          statuses[rank] = status;
          done.Add();
        }};
    rendezvous.Arrive({1, 1, 1, 0}, std::move(arrival),
                      [&](std::vector<std::shared_ptr<void>> args, Completion finish) {
                        for (int i = 0; i < 4; ++i) CHECK_EQ(*static_cast<int*>(args[i].get()), i);
                        finisher = std::thread([finish = std::move(finish)] {
                          std::this_thread::sleep_for(milliseconds(10));
                          finish(Status::Internal("the exchange failed"));
                        });
                      });
  }
  CHECK(done.WaitFor(4));
  finisher.join();
  for (const Status& status : statuses) {
    CHECK_EQ(status.code(), Code::kInternal);
    CHECK_EQ(status.message(), "the exchange failed");
  }
  CHECK_EQ(done.count(), 4);
}

TEST(MissingRanksAreNamed) {
  HostRendezvous rendezvous;
  Meeting meeting({3, 2, 1, 0}, 5);
  const Clock::time_point begin = Clock::now();
  for (const int rank : {4, 0, 2}) meeting.Arrive(rendezvous, rank, milliseconds(60));
  CHECK_EQ(meeting.completed.count(), 0);
  CHECK(meeting.completed.WaitFor(3));
  const auto waited = Clock::now() - begin;
  CHECK(waited >= milliseconds(60));
  CHECK(waited < std::chrono::seconds(20));
  const std::string message = meeting.parts[0]->status.message();
  CHECK_CONTAINS(message, "test_op: rank(s) 1, 3 of 5 did not arrive");
  CHECK_CONTAINS(message, "deadline of 60 ms");
  for (const int rank : {4, 0, 2}) {
    CHECK_EQ(meeting.parts[rank]->status.code(), Code::kDeadlineExceeded);
    CHECK_EQ(meeting.parts[rank]->status.message(), message);
  }
  // Late ranks hear the same at once, even when all of them have come.
  for (const int rank : {1, 3}) {
    meeting.Arrive(rendezvous, rank);
    CHECK_EQ(meeting.parts[rank]->num_done.load(), 1);
    CHECK_EQ(meeting.parts[rank]->status.code(), Code::kDeadlineExceeded);
    CHECK_EQ(meeting.parts[rank]->status.message(), message);
  }
  CHECK_EQ(meeting.num_exchanges.load(), 0);
  for (const auto& part : meeting.parts) CHECK_EQ(part->num_done.load(), 1);
  // The group's next exchange is not affected.
  Meeting next({4, 2, 1, 0}, 5);
  for (int rank = 0; rank < 5; ++rank) next.Arrive(rendezvous, rank, milliseconds(1000));
  next.CheckSucceeded();
}

// The watcher sleeps until the first deadline, also when that is set after a later one.
TEST(ShorterDeadlineArrivingLaterIsKept) {
  HostRendezvous rendezvous;
  Meeting slow({1, 1, 1, 0}, 2);
  Meeting quick({1, 2, 1, 0}, 2);
  Meeting second({1, 3, 1, 0}, 2);
  slow.Arrive(rendezvous, 0, kLong);
  std::this_thread::sleep_for(milliseconds(20));
  second.Arrive(rendezvous, 0, milliseconds(120));
  quick.Arrive(rendezvous, 1, milliseconds(30));
  CHECK(quick.completed.WaitFor(1, std::chrono::seconds(20)));
  CHECK_CONTAINS(quick.parts[1]->status.message(), "rank(s) 0 of 2");
  CHECK(second.completed.WaitFor(1, std::chrono::seconds(20)));
  CHECK_CONTAINS(second.parts[0]->status.message(), "rank(s) 1 of 2");
  CHECK_EQ(slow.completed.count(), 0);
  slow.Arrive(rendezvous, 1, kLong);
  slow.CheckSucceeded();
}

TEST(CancelGroupFailsItsOpenMeetingsOnly) {
  HostRendezvous rendezvous;
  Meeting cancelled({1, 1, 5, 0}, 3);
  Meeting subgroup({1, 1, 5, 1}, 3);
  Meeting other_group({1, 1, 6, 0}, 3);
  Meeting finished({1, 2, 5, 0}, 3);
  for (int rank = 0; rank < 3; ++rank) finished.Arrive(rendezvous, rank);
  for (const int rank : {0, 2}) {
    cancelled.Arrive(rendezvous, rank);
    subgroup.Arrive(rendezvous, rank);
    other_group.Arrive(rendezvous, rank);
  }
  rendezvous.CancelGroup(5, Status::FailedPrecondition("closed"));
  for (Meeting* meeting : {&cancelled, &subgroup}) {
    CHECK_EQ(meeting->completed.count(), 2);
    meeting->Arrive(rendezvous, 1);  // late
    CHECK_EQ(meeting->completed.count(), 3);
    CHECK_EQ(meeting->num_exchanges.load(), 0);
    for (const auto& part : meeting->parts) {
      CHECK_EQ(part->num_done.load(), 1);
      CHECK_EQ(part->status.code(), Code::kFailedPrecondition);
      CHECK_EQ(part->status.message(), "closed");
    }
  }
  CHECK_EQ(other_group.completed.count(), 0);
  other_group.Arrive(rendezvous, 1);
  other_group.CheckSucceeded();
  finished.CheckSucceeded();
  rendezvous.CancelGroup(5, Status::FailedPrecondition("again"));
  CHECK_EQ(cancelled.completed.count(), 3);
}

TEST(SameRankTwiceIsRefused) {
  HostRendezvous rendezvous;
  Meeting meeting({1, 1, 1, 0}, 2);
  meeting.Arrive(rendezvous, 1);
  Status refused;
  int num_refused = 0;
  HostRendezvous::Arrival twin{
      1, 2, "test_op", kLong, std::make_shared<Part>(), [&](const Status& status) {
        refused = status;
        ++num_refused;
      }};
  rendezvous.Arrive(
      meeting.key, std::move(twin),
      [](std::vector<std::shared_ptr<void>>, Completion finish) { finish(Status()); });
  CHECK_EQ(num_refused, 1);
  CHECK_EQ(refused.code(), Code::kInternal);
  CHECK_CONTAINS(refused.message(), "test_op: rank 1 arrived twice");
  meeting.Arrive(rendezvous, 0);  // the first comer is not harmed
  meeting.CheckSucceeded();
}

TEST(OneRankMeetsItself) {
  HostRendezvous rendezvous;
  Meeting meeting({1, 1, 1, 0}, 1);
  meeting.Arrive(rendezvous, 0);
  CHECK_EQ(meeting.completed.count(), 1);
  meeting.CheckSucceeded();
}

// A loop in a program runs one call site again and again under one run: the same key, one meeting
// after the other. A quick rank is a round ahead of a slow one, never two.
TEST(SameKeyMeetsAgainAndAgain) {
  HostRendezvous rendezvous;
  const int num_ranks = 3;
  std::vector<std::unique_ptr<Meeting>> rounds;
  for (int round = 0; round < 200; ++round) {
    rounds.push_back(std::make_unique<Meeting>(MeetingKey{1, 1, 1, 0}, num_ranks));
    for (auto& part : rounds.back()->parts) part->value += 10 * round;
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      for (auto& round : rounds) {
        round->Arrive(rendezvous, rank);
        while (round->parts[rank]->num_done == 0) std::this_thread::yield();
      }
    });
  }
  Run(threads);
  int num_exchanges = 0;
  for (auto& round : rounds) {
    num_exchanges += round->num_exchanges;
    for (const auto& part : round->parts) {
      CHECK_EQ(part->num_done.load(), 1);
      CHECK(part->status.ok());
      CHECK_EQ(part->result, round->Expected());
    }
  }
  CHECK_EQ(num_exchanges, 200);
}

// Many failures in a row: the recent ones are still known, the oldest make room.
TEST(RecentFailuresAreRemembered) {
  HostRendezvous rendezvous;
  std::vector<std::unique_ptr<Meeting>> meetings;
  const int num_failures = 1500;
  for (int64_t run = 0; run < num_failures; ++run) {
    meetings.push_back(std::make_unique<Meeting>(MeetingKey{run, 1, 1, 0}, 2));
    meetings.back()->Arrive(rendezvous, 0);
    rendezvous.CancelGroup(1, Status::FailedPrecondition("closed " + std::to_string(run)));
  }
  for (int run = num_failures - 500; run < num_failures; ++run) {
    meetings[run]->Arrive(rendezvous, 1);
    CHECK_EQ(meetings[run]->completed.count(), 2);
    CHECK_EQ(meetings[run]->parts[1]->status.message(), "closed " + std::to_string(run));
  }
  meetings[0]->Arrive(rendezvous, 1);
  CHECK_EQ(meetings[0]->completed.count(), 1);  // forgotten: it waits as at a new meeting
  rendezvous.CancelGroup(1, Status::FailedPrecondition("the end"));
  CHECK_EQ(meetings[0]->completed.count(), 2);
}

// The last rank comes when the deadline does: either all succeed or all fail, and each hears once.
TEST(DeadlineRacesWithTheLastArrival) {
  HostRendezvous rendezvous;
  int num_failed = 0;
  const int num_rounds = 150;
  for (int round = 0; round < num_rounds; ++round) {
    Meeting meeting({round, 1, 1, 0}, 3);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 3; ++rank) {
      threads.emplace_back([&, rank] {
        if (rank == 2) std::this_thread::sleep_for(std::chrono::microseconds(1800 + 4 * round));
        meeting.Arrive(rendezvous, rank, milliseconds(2));
      });
    }
    Run(threads);
    CHECK(meeting.completed.WaitFor(3));
    const bool failed = meeting.num_exchanges == 0;
    num_failed += failed;
    for (const auto& part : meeting.parts) {
      CHECK_EQ(part->num_done.load(), 1);
      CHECK_EQ(part->status.ok(), !failed);
    }
    if (!failed) meeting.CheckSucceeded();
  }
  std::printf("deadline won %d of %d times\n", num_failed, num_rounds);
}

// Cancelling while ranks arrive: nobody is forgotten.
TEST(CancelRacesWithArrivals) {
  HostRendezvous rendezvous;
  for (int round = 0; round < 100; ++round) {
    std::vector<std::unique_ptr<Meeting>> meetings;
    for (int64_t op = 0; op < 10; ++op) {
      meetings.push_back(std::make_unique<Meeting>(MeetingKey{round, op, 1, 0}, 2));
    }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        for (auto& meeting : meetings) meeting->Arrive(rendezvous, rank);
      });
    }
    threads.emplace_back([&] { rendezvous.CancelGroup(1, Status::FailedPrecondition("closed")); });
    Run(threads);
    for (auto& meeting : meetings) {
      CHECK(meeting->completed.WaitFor(2));
      const bool failed = meeting->num_exchanges == 0;
      for (const auto& part : meeting->parts) {
        CHECK_EQ(part->num_done.load(), 1);
        CHECK_EQ(part->status.ok(), !failed);
      }
    }
  }
}

// Ten thousand exchanges, each rank as fast as it can and several in flight: all ranks hear of all
// of them.
TEST(Soak) {
  HostRendezvous rendezvous;
  const int num_ranks = 4;
  const int num_exchanges = 10000;
  std::vector<std::unique_ptr<Meeting>> meetings;
  for (int64_t i = 0; i < num_exchanges; ++i) {
    meetings.push_back(std::make_unique<Meeting>(MeetingKey{i / 10, i % 10, 1, 0}, num_ranks));
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      for (int i = 0; i < num_exchanges; i += 10) {
        // Independent branches of a program: within a run, each rank has its own order.
        for (int j = 0; j < 10; ++j) meetings[i + (j * 3 + rank) % 10]->Arrive(rendezvous, rank);
      }
    });
  }
  Run(threads);
  for (auto& meeting : meetings) meeting->CheckSucceeded();
}

}  // namespace
}  // namespace testing
}  // namespace wideep
