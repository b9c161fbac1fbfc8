// Happens-before between fibers, as vector clocks, and the races that it shows.
//
// Every fiber has a slot and a clock that rises with each of its releases. A fiber knows, for every
// slot, up to which clock that slot's accesses come before its own. It knows this twice: for
// ordinary accesses, and for accesses of bulk copies (`fenced`), which see an ordinary write only
// past a proxy fence somewhere between the two. A bulk copy is a party of its own, with a slot.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace simt {

/// Clock of every slot; slots beyond the end are at 0. Shared by those who know the same.
using Clocks = std::vector<uint32_t>;
using ClocksPtr = std::shared_ptr<const Clocks>;

/// What someone who released had done and seen.
struct Snapshot {
  ClocksPtr seen;
  ClocksPtr fenced;
  uint32_t slot = 0;
  uint32_t own = 0;
  uint32_t fenced_own = 0;
};

/// A party's knowledge.
class Knowledge {
 public:
  void Start(uint32_t slot, uint32_t clock, ClocksPtr before);
  uint32_t slot() const { return slot_; }
  uint32_t own() const { return own_; }

  uint32_t Seen(uint32_t slot) const { return slot == slot_ ? own_ : At(seen_, slot); }
  uint32_t Fenced(uint32_t slot) const { return slot == slot_ ? fenced_own_ : At(fenced_, slot); }

  /// The caller's later accesses are not covered.
  Snapshot Release();
  void Acquire(const Snapshot& snapshot);
  /// Access (slot, clock) of a bulk copy has been completed for this party.
  void AcquireCopy(uint32_t slot, uint32_t clock);
  void ProxyFence();

  /// All of them know what any of them does.
  static void Meet(const std::vector<Knowledge*>& parties);
  /// Adds what the party knows and did to `clocks`.
  void AddTo(Clocks& clocks) const;

 private:
  static uint32_t At(const ClocksPtr& clocks, uint32_t slot) {
    return clocks && slot < clocks->size() ? (*clocks)[slot] : 0;
  }

  uint32_t slot_ = 0;
  uint32_t own_ = 0;
  uint32_t fenced_own_ = 0;
  ClocksPtr seen_;
  ClocksPtr fenced_;
};

void Join(Clocks& into, const Clocks& other);
void Raise(Clocks& clocks, uint32_t slot, uint32_t clock);

/// Remembers the last few accesses to each 4 bytes of a range of addresses.
class AccessLog {
 public:
  enum Kind : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2, kAsync = 4 };  // flags
  struct Access {
    uint32_t slot;
    uint32_t clock;
    uint32_t place;  // index of a source place, see Runtime
    uint8_t bytes;   // bit i: byte i of the four
    uint8_t kind;
    uint16_t unused;
  };
  static constexpr int kKept = 4;

  AccessLog(const char* begin, int64_t num_bytes);
  ~AccessLog();
  AccessLog(const AccessLog&) = delete;
  AccessLog& operator=(const AccessLog&) = delete;

  /// Adds an access of `who`, or of a bulk copy (slot, clock) that `who` issues now. Returns the
  /// first access that it races with, or null. Accesses with clocks up to `floor` are forgotten.
  const Access* Add(const char* pointer, int64_t num_bytes, const Knowledge& who, Access access,
                    uint32_t floor, uint32_t random);

 private:
  const char* begin_;
  int64_t num_bytes_;
  Access* log_;
};

}  // namespace simt
