#include "csrc/transport/host_staging.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

namespace wideep {
namespace {

constexpr int64_t kBytesPerTask = 1 << 20;

size_t Align(size_t bytes) {
  return (bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}

// A piece of an array for one task of the pool; whole rows where rows are wanted.
struct Piece {
  int array;
  int64_t begin, end;  // bytes
};

std::vector<Piece> CutIntoPieces(const std::vector<StagedArray>& arrays) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const int64_t row = std::max<int64_t>(1, arrays[i].row_bytes);
    const int64_t step = std::max(row, kBytesPerTask / row * row);
    for (int64_t at = 0; at < arrays[i].bytes; at += step)
      pieces.push_back({static_cast<int>(i), at, std::min(arrays[i].bytes, at + step)});
  }
  return pieces;
}

void Copy(const StagedArray& array, const Piece& piece, char* to) {
  const char* from = static_cast<const char*>(array.data);
  if (array.row_bytes == 0) {
    std::memcpy(to + piece.begin, from + piece.begin, piece.end - piece.begin);
    return;
  }
  for (int64_t at = piece.begin; at < piece.end; at += array.row_bytes) {
    if (array.wanted(at / array.row_bytes)) std::memcpy(to + at, from + at, array.row_bytes);
  }
}

}  // namespace

void StageBlock(HostArena& arena, WorkerPool& pool, const char* op, const void* shape,
                size_t shape_bytes, std::vector<StagedArray> arrays,
                std::function<void(const Status&, StagedBlock)> done) {
  StagedHeader header{};
  std::strncpy(header.op, op, sizeof(header.op) - 1);
  header.shape_bytes = shape_bytes;
  size_t bytes = Align(sizeof(header) + shape_bytes);
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (arrays[i].data == nullptr) continue;
    header.offsets[i] = bytes;
    bytes += Align(arrays[i].bytes);
  }
  const StagedBlock block{arena.Allocate(bytes), bytes};
  if (block.offset == HostArena::kNone) {
    return done(Status::Internal(std::string(op) + ": " + std::to_string(bytes) +
                                 " bytes of shared memory are not left: " +
                                 std::to_string(arena.bytes_in_use()) + " are in use"),
                block);
  }
  char* const base = arena.data() + block.offset;
  std::memcpy(base, &header, sizeof(header));
  std::memcpy(base + sizeof(header), shape, shape_bytes);
  auto pieces = std::make_shared<std::vector<Piece>>(CutIntoPieces(arrays));
  auto sources = std::make_shared<std::vector<StagedArray>>(std::move(arrays));
  const auto copy = [=](int64_t index) {
    const Piece& piece = (*pieces)[index];
    Copy((*sources)[piece.array], piece, base + header.offsets[piece.array]);
  };
  const int64_t num_pieces = static_cast<int64_t>(pieces->size());
  if (num_pieces <= 4) {  // small: waking helpers costs more than the copies
    int64_t total = 0;
    for (const Piece& piece : *pieces) total += piece.end - piece.begin;
    if (total <= kBytesPerTask) {
      for (int64_t i = 0; i < num_pieces; ++i) copy(i);
      return done(Status(), block);
    }
  }
  pool.Run(num_pieces, copy, [=] { done(Status(), block); });
}

const StagedHeader* ReadStagedHeader(const char* block, size_t block_bytes, const char* op,
                                     size_t shape_bytes) {
  if (block_bytes < sizeof(StagedHeader) + shape_bytes) return nullptr;
  const auto* header = reinterpret_cast<const StagedHeader*>(block);
  if (std::strncmp(header->op, op, sizeof(header->op) - 1) != 0) return nullptr;
  if (header->shape_bytes != shape_bytes) return nullptr;
  for (uint64_t offset : header->offsets) {
    if (offset > block_bytes) return nullptr;
  }
  return header;
}

}  // namespace wideep
