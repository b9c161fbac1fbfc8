#include "csrc/transport/host_peers.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

namespace wideep {
namespace {

enum class Kind : int32_t { kArrive = 1, kRelease = 2, kFail = 3 };

constexpr size_t kMaxText = 2048;
// A process that closes its group waits this long for peers whose sockets are full.
constexpr std::chrono::seconds kLongestFlush{1};
constexpr int kFlushPollMs = 20;

}  // namespace

struct HostPeers::Message {
  Kind kind;
  int32_t rank;
  int64_t run_id;
  int64_t op_instance;
  int32_t subgroup;
  int32_t code;  // of a failure
  uint64_t block;
  uint64_t bytes;
};

HostPeers::Block::~Block() { peers_->SendRelease(peer_, offset_); }

Status HostPeers::Connect(int64_t group, int num_ranks, std::unique_ptr<HostArena> arena,
                          std::vector<Peer> peers, HostRendezvous& rendezvous,
                          std::shared_ptr<HostPeers>& connected) {
  std::shared_ptr<HostPeers> made(new HostPeers(group, num_ranks, std::move(arena), rendezvous));
  for (Peer& peer : peers) {
    auto connection = std::make_unique<Connection>();
    connection->peer = std::move(peer);
    made->connections_.push_back(std::move(connection));
  }
  for (const auto& connection : made->connections_) {
    const int socket = connection->peer.socket;
    Status status = Mapping::Map(connection->peer.arena, made->arena_->bytes(), /*writable=*/false,
                                 connection->arena);
    if (!status.ok()) return status;
    close(connection->peer.arena);
    connection->peer.arena = -1;
    if (fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK) != 0)
      return Status::FailedPrecondition(std::string("shared memory: socket: ") +
                                        std::strerror(errno));
  }
  made->wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (made->wake_ < 0)
    return Status::FailedPrecondition(std::string("shared memory: eventfd: ") +
                                      std::strerror(errno));
  // The thread ends in Shutdown, which comes before the object goes.
  made->progress_ = std::thread([raw = made.get()] { raw->Loop(); });
  connected = std::move(made);
  return Status();
}

HostPeers::HostPeers(int64_t group, int num_ranks, std::unique_ptr<HostArena> arena,
                     HostRendezvous& rendezvous)
    : group_(group), num_ranks_(num_ranks), arena_(std::move(arena)), rendezvous_(rendezvous) {}

HostPeers::~HostPeers() {
  Shutdown();
  for (const auto& connection : connections_) {
    if (connection->peer.arena >= 0) close(connection->peer.arena);
    if (connection->peer.socket >= 0) close(connection->peer.socket);
  }
  if (wake_ >= 0) close(wake_);
}

void HostPeers::Shutdown() {
  std::lock_guard<std::mutex> lock(shutdown_mutex_);
  stopping_ = true;
  Wake();
  if (progress_.joinable()) progress_.join();
  const auto until = std::chrono::steady_clock::now() + kLongestFlush;
  for (const auto& connection : connections_) {
    std::lock_guard<std::mutex> connection_lock(connection->mutex);
    if (connection->open) {
      // Others may need it: this process has done its part.
      while (!Flush(*connection) && std::chrono::steady_clock::now() < until) {
        pollfd space{connection->peer.socket, POLLOUT, 0};
        poll(&space, 1, kFlushPollMs);
      }
      shutdown(connection->peer.socket, SHUT_RDWR);
    }
    connection->open = false;
  }
}

void HostPeers::Wake() {
  const uint64_t one = 1;
  if (wake_ >= 0 && write(wake_, &one, sizeof(one)) < 0) {
    // Full: the thread is being woken already.
  }
}

bool HostPeers::InSubgroup(const Connection& connection, int32_t subgroup,
                           const std::vector<bool>* expected) const {
  for (const auto& [of_subgroup, rank] : connection.peer.ranks) {
    if (of_subgroup == subgroup && (expected == nullptr || (*expected)[rank])) return true;
  }
  return false;
}

void HostPeers::Announce(const MeetingKey& key, int rank, const std::vector<bool>* expected,
                         uint64_t block, size_t bytes) {
  Message message{Kind::kArrive, rank, key.run_id, key.op_instance, key.subgroup, 0, block, bytes};
  std::vector<Connection*> readers;
  {
    // Counted before the first message goes out: whoever gets it may release at once.
    std::lock_guard<std::mutex> lock(readers_mutex_);
    for (const auto& connection : connections_) {
      if (!InSubgroup(*connection, key.subgroup, expected)) continue;
      std::lock_guard<std::mutex> connection_lock(connection->mutex);
      if (!connection->open) continue;
      connection->owed.insert(block);
      readers.push_back(connection.get());
    }
    if (!readers.empty()) readers_[block] = static_cast<int>(readers.size());
  }
  if (readers.empty()) return arena_->Free(block);
  for (Connection* reader : readers) Send(*reader, message);
}

void HostPeers::AnnounceFailure(const MeetingKey& key, const Status& why) {
  Message message{
      Kind::kFail, 0, key.run_id, key.op_instance, key.subgroup, static_cast<int32_t>(why.code()),
      0,           0};
  for (const auto& connection : connections_) {
    if (InSubgroup(*connection, key.subgroup, /*expected=*/nullptr))
      Send(*connection, message, why.message().substr(0, kMaxText));
  }
}

void HostPeers::SendRelease(int peer, uint64_t offset) {
  Send(*connections_[peer], {Kind::kRelease, 0, 0, 0, 0, 0, offset, 0});
}

void HostPeers::Send(Connection& to, const Message& message, const std::string& text) {
  std::string packet(reinterpret_cast<const char*>(&message), sizeof(message));
  packet += text;
  bool wake = false;
  {
    std::lock_guard<std::mutex> lock(to.mutex);
    if (!to.open) return;
    to.unsent.push_back(std::move(packet));
    wake = !Flush(to);
  }
  if (wake) Wake();
}

bool HostPeers::Flush(Connection& to) {
  while (!to.unsent.empty()) {
    const std::string& packet = to.unsent.front();
    if (send(to.peer.socket, packet.data(), packet.size(), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) return false;
      to.unsent.clear();  // it has ended; the progress thread will see that
      return true;
    }
    to.unsent.pop_front();
  }
  return true;
}

void HostPeers::Loop() {
  while (!stopping_) {
    std::vector<pollfd> waits = {{wake_, POLLIN, 0}};
    std::vector<int> indices;
    for (size_t i = 0; i < connections_.size(); ++i) {
      Connection& connection = *connections_[i];
      std::lock_guard<std::mutex> lock(connection.mutex);
      if (!connection.open) continue;
      const short unsent = connection.unsent.empty() ? 0 : POLLOUT;
      waits.push_back({connection.peer.socket, static_cast<short>(POLLIN | unsent), 0});
      indices.push_back(static_cast<int>(i));
    }
    if (poll(waits.data(), waits.size(), -1) < 0) continue;  // EINTR
    if (waits[0].revents != 0) {
      uint64_t count;
      if (read(wake_, &count, sizeof(count)) < 0) continue;
    }
    for (size_t i = 0; i < indices.size(); ++i) {
      const short events = waits[i + 1].revents;
      if (events & POLLOUT) {
        Connection& connection = *connections_[indices[i]];
        std::lock_guard<std::mutex> lock(connection.mutex);
        Flush(connection);
      }
      if (events & (POLLIN | POLLHUP | POLLERR)) Receive(indices[i]);
    }
  }
}

void HostPeers::Receive(int index) {
  char packet[sizeof(Message) + kMaxText];
  while (!stopping_) {
    const ssize_t bytes =
        recv(connections_[index]->peer.socket, packet, sizeof(packet), MSG_DONTWAIT);
    // Reset: it ended with something of ours unread. What it sent before is still to be had, and
    // then the end.
    if (bytes < 0 && (errno == EINTR || errno == ECONNRESET)) continue;
    if (bytes < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (bytes < static_cast<ssize_t>(sizeof(Message))) return Lose(index);
    Message message;
    std::memcpy(&message, packet, sizeof(message));
    Handle(index, message, std::string(packet + sizeof(message), bytes - sizeof(message)));
  }
}

void HostPeers::Handle(int index, const Message& message, std::string text) {
  Connection& from = *connections_[index];
  const MeetingKey key{message.run_id, message.op_instance, group_, message.subgroup};
  switch (message.kind) {
    case Kind::kArrive: {
      const bool inside = message.block <= from.arena->bytes() &&
                          message.bytes <= from.arena->bytes() - message.block;
      if (!inside || message.rank < 0 || message.rank >= num_ranks_) return Lose(index);
      auto self = weak_from_this().lock();
      if (self == nullptr) return;  // being destroyed
      auto block = std::make_shared<Block>(std::move(self), index, message.block,
                                           from.arena->data() + message.block, message.bytes);
      return rendezvous_.ArriveElsewhere(key, message.rank, num_ranks_, std::move(block));
    }
    case Kind::kRelease: {
      {
        std::lock_guard<std::mutex> lock(from.mutex);
        if (from.owed.erase(message.block) == 0) return;
      }
      return Released(message.block);
    }
    case Kind::kFail:
      return rendezvous_.FailElsewhere(key,
                                       Status(static_cast<Code>(message.code), std::move(text)));
  }
}

void HostPeers::Released(uint64_t block) {
  {
    std::lock_guard<std::mutex> lock(readers_mutex_);
    auto readers = readers_.find(block);
    if (readers == readers_.end() || --readers->second > 0) return;
    readers_.erase(readers);
  }
  arena_->Free(block);
}

void HostPeers::Lose(int index) {
  Connection& lost = *connections_[index];
  std::set<uint64_t> owed;
  {
    std::lock_guard<std::mutex> lock(lost.mutex);
    if (!lost.open) return;
    lost.open = false;
    lost.unsent.clear();
    owed.swap(lost.owed);
  }
  shutdown(lost.peer.socket, SHUT_RDWR);
  for (uint64_t block : owed) Released(block);
  rendezvous_.LoseRanks(
      group_, lost.peer.ranks,
      "process " + std::to_string(lost.peer.process) + " has ended or closed its ExpertGroup");
}

}  // namespace wideep
