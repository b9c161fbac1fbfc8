// Ranks in several processes: arenas, what is staged in them, and what processes tell each other.
// Most worlds here are several rendezvous of one process, connected as processes are.
#include "csrc/transport/host_peers.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/transport/host_staging.h"
#include "tests/cpp/check.h"
#include "tests/cpp/number_formats.h"

namespace wideep {
namespace testing {
namespace {

using check::Counter;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr int64_t kGroup = 5;
constexpr size_t kSmallArena = 1 << 20;
constexpr milliseconds kLong = std::chrono::minutes(5);

// What a rank sends: a number that says which exchange it is for.
struct Note {
  int64_t run_id;
  int rank;
};

// One process of a group: its rendezvous and its connections.
struct Process {
  int number;
  std::vector<int> ranks;
  std::unique_ptr<HostRendezvous> rendezvous = std::make_unique<HostRendezvous>();
  std::shared_ptr<HostPeers> peers;
};

// Processes with `ranks_each` ranks each, all in one subgroup.
struct World {
  World(int num_processes, int ranks_each, size_t arena_bytes = kSmallArena)
      : num_ranks(num_processes * ranks_each) {
    std::vector<std::unique_ptr<HostArena>> arenas(num_processes);
    for (int p = 0; p < num_processes; ++p) {
      CHECK(HostArena::Make(arenas[p], arena_bytes).ok());
      processes.emplace_back();
      processes[p].number = p;
      for (int i = 0; i < ranks_each; ++i) {
        processes[p].ranks.push_back(p * ranks_each + i);
        process_of_rank.push_back(p);
      }
    }
    std::vector<std::vector<HostPeers::Peer>> connections(num_processes);
    for (int a = 0; a < num_processes; ++a) {
      for (int b = a + 1; b < num_processes; ++b) {
        int ends[2];
        CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
        connections[a].push_back(PeerAt(b, ends[0], arenas[b]->descriptor()));
        connections[b].push_back(PeerAt(a, ends[1], arenas[a]->descriptor()));
      }
    }
    for (int p = 0; p < num_processes; ++p) {
      Status status =
          HostPeers::Connect(kGroup, num_ranks, std::move(arenas[p]), std::move(connections[p]),
                             *processes[p].rendezvous, processes[p].peers);
      CHECK(status.ok());
    }
  }
  ~World() {
    for (Process& process : processes) Close(process);
  }

  HostPeers::Peer PeerAt(int process, int socket, int arena) {
    HostPeers::Peer peer{process, socket, dup(arena), {}};
    for (int rank : processes[process].ranks) peer.ranks.emplace_back(0, rank);
    return peer;
  }

  static void Close(Process& process) {
    if (process.peers == nullptr) return;
    process.peers->Shutdown();
    process.rendezvous->CancelGroup(kGroup, Status::FailedPrecondition("closed"));
    process.peers.reset();
  }

  // As a handler does: stages a note, announces it, arrives. `done(status, sum)`: of all notes.
  void Arrive(Process& process, int rank, const MeetingKey& key,
              std::function<void(const Status&, int64_t)> done, milliseconds deadline = kLong) {
    const Note note{key.run_id, rank};
    const uint64_t block = process.peers->arena().Allocate(sizeof(note));
    CHECK(block != HostArena::kNone);
    std::memcpy(process.peers->arena().data() + block, &note, sizeof(note));
    process.peers->Announce(key, rank, nullptr, block, sizeof(note));

    auto sum = std::make_shared<int64_t>(0);
    HostRendezvous::Arrival arrival;
    arrival.rank = rank;
    arrival.num_ranks = num_ranks;
    arrival.op = "test_op";
    arrival.deadline = deadline;
    arrival.args = std::make_shared<Note>(note);
    arrival.done = [done = std::move(done), sum](const Status& status) { done(status, *sum); };
    arrival.process_of_rank = std::make_shared<const std::vector<int>>(process_of_rank);
    arrival.tell_others = [peers = process.peers, key](const Status& why) {
      peers->AnnounceFailure(key, why);
    };
    const Exchange exchange = [this, number = process.number, key, sum](
                                  std::vector<std::shared_ptr<void>> args, Completion finish) {
      for (size_t r = 0; r < args.size(); ++r) {
        Note read;
        if (process_of_rank[r] == number) {
          read = *static_cast<Note*>(args[r].get());
        } else {
          std::memcpy(&read, static_cast<HostPeers::Block*>(args[r].get())->data, sizeof(read));
        }
        CHECK_EQ(read.run_id, key.run_id);
        CHECK_EQ(read.rank, static_cast<int>(r));
        *sum += read.run_id + read.rank;
      }
      finish(Status());
    };
    process.rendezvous->Arrive(key, std::move(arrival), exchange);
  }

  // Until peers have released everything.
  void CheckNothingInUse() {
    for (Process& process : processes) {
      if (process.peers == nullptr) continue;
      const auto until = Clock::now() + std::chrono::seconds(30);
      while (process.peers->arena().bytes_in_use() != 0 && Clock::now() < until)
        std::this_thread::yield();
      CHECK_EQ(process.peers->arena().bytes_in_use(), size_t{0});
    }
  }

  const int num_ranks;
  std::vector<int> process_of_rank;
  std::vector<Process> processes;
};

TEST(ArenaBlocksAreDisjointAndComeBack) {
  for (int seed = 0; seed < 5; ++seed) {
    std::unique_ptr<HostArena> arena;
    CHECK(HostArena::Make(arena, kSmallArena).ok());
    Random random(seed);
    std::vector<std::pair<uint64_t, size_t>> blocks;
    for (int step = 0; step < 2000; ++step) {
      if (!blocks.empty() && Uniform(random, 0, 1) == 0) {
        const size_t i = Uniform(random, 0, static_cast<int64_t>(blocks.size()) - 1);
        // Each block still holds what was written to all of it.
        for (size_t at = 0; at < blocks[i].second; ++at)
          CHECK_EQ(arena->data()[blocks[i].first + at], static_cast<char>(blocks[i].first >> 6));
        arena->Free(blocks[i].first);
        blocks.erase(blocks.begin() + i);
        continue;
      }
      const size_t bytes = Uniform(random, 0, 2999);
      const uint64_t offset = arena->Allocate(bytes);
      if (offset == HostArena::kNone) continue;
      CHECK_EQ(offset % kBlockAlignment, uint64_t{0});
      CHECK(offset + bytes <= arena->bytes());
      std::memset(arena->data() + offset, static_cast<int>(offset >> 6), bytes);
      blocks.emplace_back(offset, bytes);
    }
    for (const auto& [offset, bytes] : blocks) arena->Free(offset);
    CHECK_EQ(arena->bytes_in_use(), size_t{0});
    CHECK_EQ(arena->Allocate(kSmallArena), uint64_t{0});  // one piece again
    CHECK_EQ(arena->Allocate(1), HostArena::kNone);
  }
}

TEST(OthersMapAnArenaForReadingOnly) {
  std::unique_ptr<HostArena> arena;
  CHECK(HostArena::Make(arena, kSmallArena).ok());
  std::unique_ptr<Mapping> mapping;
  CHECK(Mapping::Map(arena->descriptor(), kSmallArena, /*writable=*/false, mapping).ok());
  arena->data()[77] = 'x';
  CHECK_EQ(mapping->data()[77], 'x');
  std::unique_ptr<Mapping> writable;
  CHECK(!Mapping::Map(arena->descriptor(), kSmallArena, /*writable=*/true, writable).ok());
  CHECK(ftruncate(arena->descriptor(), 0) != 0);  // nor can anybody take pages away
}

TEST(StagedArraysAreFoundAgain) {
  std::unique_ptr<HostArena> arena;
  CHECK(HostArena::Make(arena, 64 << 20).ok());
  WorkerPool pool(2);
  for (const int64_t num_rows : {0, 1, 3, 5000}) {
    struct Shape {
      int64_t num_rows;
    } shape{num_rows};
    constexpr int64_t kWidth = 1000;
    std::vector<int32_t> numbers(num_rows * 7);
    std::vector<float> rows(num_rows * kWidth);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int32_t>(i);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i);
    const auto visit = [&](auto& visitor, const int32_t*& first, const float*& second,
                           const float*& none) {
      visitor.Array(first, [&] { return static_cast<int64_t>(numbers.size()) * 4; });
      visitor.Array(none, [&] { return int64_t{0}; });
      visitor.Rows(
          second, kWidth * 4, [&] { return num_rows; }, [](int64_t row) { return row % 3 != 1; });
    };
    SentArrays sent;
    const int32_t* first = numbers.data();
    const float *second = rows.data(), *none = nullptr;
    visit(sent, first, second, none);
    Counter staged;
    StagedBlock block{};
    StageBlock(*arena, pool, "test_op", &shape, sizeof(shape), sent.Take(),
               [&](const Status& status, StagedBlock made) {
                 CHECK(status.ok());
                 block = made;
                 staged.Add();
               });
    CHECK(staged.WaitFor(1));
    const char* data = arena->data() + block.offset;
    CHECK(ReadStagedHeader(data, block.bytes, "other_op", sizeof(shape)) == nullptr);
    CHECK(ReadStagedHeader(data, block.bytes, "test_op", 4) == nullptr);
    const StagedHeader* header = ReadStagedHeader(data, block.bytes, "test_op", sizeof(shape));
    CHECK(header != nullptr);
    CHECK_EQ(reinterpret_cast<const Shape*>(StagedShape(header))->num_rows, num_rows);
    ReceivedArrays received(header);
    first = nullptr, second = nullptr, none = rows.data();
    visit(received, first, second, none);
    CHECK(none == nullptr);
    CHECK(std::memcmp(first, numbers.data(), numbers.size() * 4) == 0);
    for (int64_t row = 0; row < num_rows; ++row) {
      if (row % 3 == 1) continue;
      CHECK(std::memcmp(second + row * kWidth, &rows[row * kWidth], kWidth * 4) == 0);
    }
    arena->Free(block.offset);
  }
  StagedArray huge{arena->data(), 65 << 20};
  Counter refused;
  StageBlock(*arena, pool, "test_op", "", 0, {huge}, [&](const Status& status, StagedBlock) {
    CHECK_CONTAINS(status.message(), "of shared memory are not left");
    refused.Add();
  });
  CHECK(refused.WaitFor(1));
}

// Ranks go round loops of exchanges under one key, so that some are a turn ahead of others, while
// other exchanges run beside.
TEST(LoopsOverSeveralProcesses) {
  for (const auto& [num_processes, ranks_each] :
       std::vector<std::pair<int, int>>{{2, 1}, {2, 4}, {4, 2}, {8, 1}}) {
    World world(num_processes, ranks_each);
    constexpr int kTurns = 100;
    std::atomic<int> num_failed{0};
    std::vector<std::thread> threads;
    for (Process& process : world.processes) {
      for (int rank : process.ranks) {
        for (int64_t loop = 0; loop < 2; ++loop) {
          threads.emplace_back([&world, &process, &num_failed, rank, loop] {
            const int64_t run_id = 10 + loop;
            const MeetingKey key{run_id, /*op_instance=*/3, kGroup, 0};
            int64_t expected = 0;
            for (int r = 0; r < world.num_ranks; ++r) expected += run_id + r;
            Random random(rank * 2 + loop);
            for (int turn = 0; turn < kTurns; ++turn) {
              Counter done;
              world.Arrive(process, rank, key, [&](const Status& status, int64_t sum) {
                // The sum is that of the rank that opened the meeting in this process, or none yet.
                if (!status.ok() || (sum != expected && sum != 0)) ++num_failed;
                done.Add();
              });
              if (!done.WaitFor(1)) ++num_failed;
              if (Uniform(random, 0, 3) == 0) std::this_thread::yield();
            }
          });
        }
      }
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(num_failed.load(), 0);
    world.CheckNothingInUse();
  }
}

TEST(MissedDeadlineIsKnownEverywhere) {
  const MeetingKey key{1, 1, kGroup, 0};
  World world(3, 2);
  Counter done;
  const auto hear = [&](const Status& status, int64_t) {
    CHECK_CONTAINS(status.message(), "rank(s) 4, 5 of 6 (in process 2) did not arrive");
    done.Add();
  };
  // Only the first is in a hurry; the others learn of it from there.
  world.Arrive(world.processes[0], 0, key, hear, milliseconds(50));
  world.Arrive(world.processes[0], 1, key, hear);
  world.Arrive(world.processes[1], 2, key, hear);
  world.Arrive(world.processes[1], 3, key, hear);
  CHECK(done.WaitFor(4));
  // Who comes late hears the same.
  world.Arrive(world.processes[2], 4, key, hear);
  CHECK(done.WaitFor(5));
  world.CheckNothingInUse();
}

TEST(ProcessThatLeavesAfterItsPartIsNotMissed) {
  World world(2, 1);
  const MeetingKey key{1, 1, kGroup, 0};
  Counter done;
  world.Arrive(world.processes[1], 1, key, [](const Status&, int64_t) {});
  // What it sent stays readable.
  World::Close(world.processes[1]);
  world.Arrive(world.processes[0], 0, key, [&](const Status& status, int64_t sum) {
    CHECK(status.ok());
    CHECK_EQ(sum, int64_t{1 + 2});
    done.Add();
  });
  CHECK(done.WaitFor(1));
  // The next exchange will not come about, and says so at once.
  world.Arrive(world.processes[0], 0, {2, 1, kGroup, 0}, [&](const Status& status, int64_t) {
    CHECK_CONTAINS(status.message(), "rank(s) 1 of 2 (in process 1) will not come: process 1 has");
    done.Add();
  });
  CHECK(done.WaitFor(2));
  world.CheckNothingInUse();
}

// Rank 0 of two, with nothing to send.
HostRendezvous::Arrival FirstOfTwo() {
  HostRendezvous::Arrival arrival;
  arrival.rank = 0;
  arrival.num_ranks = 2;
  arrival.op = "test_op";
  arrival.deadline = kLong;
  arrival.args = std::make_shared<int>(0);
  return arrival;
}

// A process that ends with something unread resets its socket. What it sent before counts all the
// same.
TEST(ProcessThatEndsWithMessagesUnreadIsNotMissed) {
  int to_test[2], ends[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, to_test), 0);
  CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  std::unique_ptr<HostArena> arena, other_arena;
  CHECK(HostArena::Make(arena, kSmallArena).ok());
  CHECK(HostArena::Make(other_arena, kSmallArena).ok());
  const int other = dup(other_arena->descriptor());
  const MeetingKey key{1, 1, kGroup, 0};

  // What rank 1 says, passed on by hand: then its process can end in this order.
  HostRendezvous other_rendezvous;
  std::shared_ptr<HostPeers> other_peers;
  CHECK(HostPeers::Connect(kGroup, 2, std::move(other_arena),
                           {{0, to_test[0], dup(arena->descriptor()), {{0, 0}}}}, other_rendezvous,
                           other_peers)
            .ok());
  other_peers->Announce(key, 1, nullptr, other_peers->arena().Allocate(8), 8);
  char packet[4096];
  const ssize_t bytes = recv(to_test[1], packet, sizeof(packet), 0);
  CHECK(bytes > 0);
  CHECK_EQ(send(ends[1], packet, static_cast<size_t>(bytes), 0), bytes);
  CHECK_EQ(send(ends[0], "unread", 6, 0), ssize_t{6});
  close(ends[1]);

  HostRendezvous rendezvous;
  std::shared_ptr<HostPeers> peers;
  CHECK(HostPeers::Connect(kGroup, 2, std::move(arena), {{1, ends[0], other, {{0, 1}}}}, rendezvous,
                           peers)
            .ok());
  Counter done;
  HostRendezvous::Arrival arrival = FirstOfTwo();
  arrival.done = [&](const Status& status) {
    CHECK_EQ(status.message(), "");
    done.Add();
  };
  rendezvous.Arrive(
      key, std::move(arrival),
      [](std::vector<std::shared_ptr<void>>, Completion finish) { finish(Status()); });
  CHECK(done.WaitFor(1));
  peers->Shutdown();
  other_peers->Shutdown();
  close(to_test[1]);
}

// More messages than a socket holds, to a process that does not read: they wait for it.
TEST(MessagesWaitForASlowReader) {
  int ends[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  std::unique_ptr<HostArena> arena, other_arena;
  CHECK(HostArena::Make(arena, kSmallArena).ok());
  CHECK(HostArena::Make(other_arena, kSmallArena).ok());
  HostRendezvous rendezvous;
  std::shared_ptr<HostPeers> peers;
  std::vector<HostPeers::Peer> connections = {
      {1, ends[0], dup(other_arena->descriptor()), {{0, 1}}}};
  CHECK(HostPeers::Connect(kGroup, 2, std::move(arena), connections, rendezvous, peers).ok());
  constexpr int kMessages = 3000;
  for (int i = 0; i < kMessages; ++i) {
    const uint64_t block = peers->arena().Allocate(8);
    peers->Announce({i, 0, kGroup, 0}, 0, nullptr, block, 8);
  }
  char packet[4096];
  for (int i = 0; i < kMessages; ++i) CHECK(recv(ends[1], packet, sizeof(packet), 0) > 0);
  CHECK(recv(ends[1], packet, sizeof(packet), MSG_DONTWAIT) < 0);
  // The reader ends without a release: nothing stays in use for it.
  close(ends[1]);
  const auto until = Clock::now() + std::chrono::seconds(30);
  while (peers->arena().bytes_in_use() != 0 && Clock::now() < until) std::this_thread::yield();
  CHECK_EQ(peers->arena().bytes_in_use(), size_t{0});
  peers->Shutdown();
}

// A process of its own, killed with its rank expected: the other one hears of it without a
// deadline.
TEST(KilledProcessIsNoticedAtOnce) {
  int ends[2], ready[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  CHECK_EQ(pipe(ready), 0);
  std::unique_ptr<HostArena> arena, other_arena;
  CHECK(HostArena::Make(arena, kSmallArena).ok());
  CHECK(HostArena::Make(other_arena, kSmallArena).ok());
  std::fflush(nullptr);
  const pid_t child = fork();  // no other threads run yet
  if (child == 0) {
    close(ends[0]);
    if (write(ready[1], "x", 1) != 1) _exit(1);
    for (;;) pause();
  }
  close(ends[1]);
  char byte;
  CHECK_EQ(read(ready[0], &byte, 1), ssize_t{1});
  HostRendezvous rendezvous;
  std::shared_ptr<HostPeers> peers;
  std::vector<HostPeers::Peer> connections = {
      {1, ends[0], dup(other_arena->descriptor()), {{0, 1}}}};
  CHECK(HostPeers::Connect(kGroup, 2, std::move(arena), connections, rendezvous, peers).ok());
  Counter done;
  HostRendezvous::Arrival arrival = FirstOfTwo();
  arrival.process_of_rank = std::make_shared<const std::vector<int>>(std::vector<int>{0, 1});
  arrival.done = [&](const Status& status) {
    CHECK_CONTAINS(status.message(), "rank(s) 1 of 2 (in process 1) will not come");
    done.Add();
  };
  rendezvous.Arrive({1, 1, kGroup, 0}, std::move(arrival), {});
  CHECK_EQ(done.count(), 0);
  kill(child, SIGKILL);
  CHECK(done.WaitFor(1, std::chrono::seconds(20)));
  waitpid(child, nullptr, 0);
  peers->Shutdown();
  close(ready[0]);
  close(ready[1]);
}

}  // namespace
}  // namespace testing
}  // namespace wideep
