// How a rank's arrays lie in a block of its process's arena, where ranks of other processes read
// them.
//
//   header | shape | arrays, each aligned
//
// The shape lies there as it is in memory: all processes of a group run the same build.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/core/worker_pool.h"
#include "csrc/transport/host_arena.h"

namespace wideep {

constexpr int kMaxStagedArrays = 8;

/// Something that a rank sends: all of it, or the rows that are wanted, each at its own place.
struct StagedArray {
  const void* data;  // null: there is no such array
  int64_t bytes;
  int64_t row_bytes = 0;                         // 0: all of it
  std::function<bool(int64_t row)> wanted = {};  // of rows; the others are left unwritten
};

struct StagedHeader {
  char op[32];
  uint64_t shape_bytes;
  uint64_t offsets[kMaxStagedArrays];  // from the header; 0: there is no such array
};

/// A block that is ready to be announced.
struct StagedBlock {
  uint64_t offset;
  size_t bytes;
};

/// Copies into a new block on the pool; `done` is called once, on any thread.
void StageBlock(HostArena& arena, WorkerPool& pool, const char* op, const void* shape,
                size_t shape_bytes, std::vector<StagedArray> arrays,
                std::function<void(const Status&, StagedBlock)> done);

/// Null unless the block holds what `op` sends, with a shape of that many bytes.
const StagedHeader* ReadStagedHeader(const char* block, size_t block_bytes, const char* op,
                                     size_t shape_bytes);
inline const char* StagedShape(const StagedHeader* header) {
  return reinterpret_cast<const char*>(header) + sizeof(StagedHeader);
}

/// Visitors of an op's Sent() function (sent_host.h), which names the arrays of its buffers that
/// are read elsewhere, always in the same order: one lists them, one finds them in a block.
class SentArrays {
 public:
  template <typename T, typename Bytes>
  void Array(const T*& field, Bytes bytes) {
    arrays_.push_back({field, field == nullptr ? 0 : bytes()});
  }
  template <typename T, typename NumRows>
  void Rows(const T*& field, int64_t row_bytes, NumRows num_rows,
            std::function<bool(int64_t)> wanted) {
    const int64_t rows = field == nullptr ? 0 : num_rows();
    arrays_.push_back({field, rows * row_bytes, row_bytes, std::move(wanted)});
  }
  std::vector<StagedArray> Take() { return std::move(arrays_); }

 private:
  std::vector<StagedArray> arrays_;
};

class ReceivedArrays {
 public:
  explicit ReceivedArrays(const StagedHeader* header) : header_(header) {}
  template <typename T, typename Bytes>
  void Array(const T*& field, Bytes) {
    const uint64_t offset = header_->offsets[next_++];
    const char* data = reinterpret_cast<const char*>(header_) + offset;
    field = offset == 0 ? nullptr : reinterpret_cast<const T*>(data);
  }
  template <typename T, typename NumRows>
  void Rows(const T*& field, int64_t, NumRows rows, std::function<bool(int64_t)>) {
    Array(field, rows);
  }

 private:
  const StagedHeader* header_;
  int next_ = 0;
};

}  // namespace wideep
