// A group whose ranks are in several processes of this host: what each process tells the others.
//
// Every pair of processes has a connected Unix socket, and each process maps the others' arenas. A
// rank that arrives at an exchange stages what its peers will read in its own process's arena and
// announces it; each process keeps the announcements in its HostRendezvous beside the arrivals of
// its own ranks, and does the exchange for its own ranks once all have come. Nobody waits for its
// peers to finish: they read copies.
//
//   kArrive   rank -> processes of its subgroup   the block with what the rank sends
//   kRelease  reader -> owner                     one reader is done with a block; freed with the
//   last kFail     process -> processes                an exchange failed here, and why
//
// Messages of one process arrive in order. A socket that closes says that the process ended or
// closed its group, at once; one that stays silent is left to the deadline.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/transport/host_arena.h"
#include "csrc/transport/host_rendezvous.h"

namespace wideep {

class HostPeers : public std::enable_shared_from_this<HostPeers> {
 public:
  /// Another process. Owns both descriptors.
  struct Peer {
    int process;
    int socket;                                  // connected, SOCK_SEQPACKET
    int arena;                                   // its arena's descriptor
    std::vector<std::pair<int32_t, int>> ranks;  // (subgroup, rank) of its devices
  };

  /// What a rank of another process sent, in that process's arena; released with the object.
  class Block {
   public:
    Block(std::shared_ptr<HostPeers> peers, int peer, uint64_t offset, const char* data,
          size_t bytes)
        : data(data), bytes(bytes), peers_(std::move(peers)), peer_(peer), offset_(offset) {}
    ~Block();
    const char* const data;
    const size_t bytes;

   private:
    const std::shared_ptr<HostPeers> peers_;
    const int peer_;
    const uint64_t offset_;
  };

  /// `group`: the number under which all processes know the group. `num_ranks`: of a subgroup.
  /// Closes the peers' descriptors if it fails.
  static Status Connect(int64_t group, int num_ranks, std::unique_ptr<HostArena> arena,
                        std::vector<Peer> peers, HostRendezvous& rendezvous,
                        std::shared_ptr<HostPeers>& connected);
  ~HostPeers();
  HostPeers(const HostPeers&) = delete;
  HostPeers& operator=(const HostPeers&) = delete;

  HostArena& arena() { return *arena_; }

  /// Tells the processes of the key's subgroup that `rank` has come and that what it sends is at
  /// `block` of the arena, which they free together. `expected`, if not null: by rank, those that
  /// take part; processes without any are not told.
  void Announce(const MeetingKey& key, int rank, const std::vector<bool>* expected, uint64_t block,
                size_t bytes);
  /// Tells them that the exchange failed here.
  void AnnounceFailure(const MeetingKey& key, const Status& why);
  /// Ends the connections: the peers see this process leave. Not on a thread of this object.
  void Shutdown();

 private:
  struct Message;
  struct Connection {
    Peer peer;
    std::unique_ptr<Mapping> arena;
    std::mutex mutex;  // of the fields below
    bool open = true;
    std::deque<std::string> unsent;  // what the socket did not take at once
    std::set<uint64_t> owed;         // blocks of ours that it has yet to release
  };

  HostPeers(int64_t group, int num_ranks, std::unique_ptr<HostArena> arena,
            HostRendezvous& rendezvous);
  void Send(Connection& to, const Message& message, const std::string& text = {});
  void SendRelease(int peer, uint64_t offset);
  bool Flush(Connection& to);  // needs its mutex; false while something is left
  void Loop();
  void Receive(int index);
  void Handle(int index, const Message& message, std::string text);
  void Lose(int index);
  void Released(uint64_t block);
  bool InSubgroup(const Connection& connection, int32_t subgroup,
                  const std::vector<bool>* expected) const;
  void Wake();

  const int64_t group_;
  const int num_ranks_;
  const std::unique_ptr<HostArena> arena_;
  HostRendezvous& rendezvous_;
  std::vector<std::unique_ptr<Connection>> connections_;
  std::mutex readers_mutex_;
  std::map<uint64_t, int> readers_;  // by block: processes that have yet to release it
  int wake_ = -1;                    // eventfd
  std::mutex shutdown_mutex_;
  std::atomic<bool> stopping_{false};
  std::thread progress_;
};

}  // namespace wideep
