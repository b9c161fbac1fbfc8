#include "tests/simt/order.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

namespace simt {

void Join(Clocks& into, const Clocks& other) {
  if (into.size() < other.size()) into.resize(other.size());
  uint32_t* to = into.data();
  for (size_t i = 0; i < other.size(); ++i) to[i] = std::max(to[i], other[i]);
}

void Raise(Clocks& clocks, uint32_t slot, uint32_t clock) {
  if (clocks.size() <= slot) clocks.resize(slot + 1);
  clocks[slot] = std::max(clocks[slot], clock);
}

namespace {

ClocksPtr Joined(const ClocksPtr& a, const ClocksPtr& b, uint32_t slot, uint32_t clock) {
  auto joined = a ? std::make_shared<Clocks>(*a) : std::make_shared<Clocks>();
  if (b && b != a) Join(*joined, *b);
  Raise(*joined, slot, clock);
  return joined;
}

}  // namespace

void Knowledge::Start(uint32_t slot, uint32_t clock, ClocksPtr before) {
  slot_ = slot;
  own_ = clock;
  fenced_own_ = clock - 1;
  seen_ = before;
  fenced_ = std::move(before);  // the start of a kernel is a fence of every kind
}

Snapshot Knowledge::Release() { return {seen_, fenced_, slot_, own_++, fenced_own_}; }

void Knowledge::Acquire(const Snapshot& snapshot) {
  // Who knows a party at some clock knows all that the party knew then.
  if (snapshot.slot == slot_) return;
  if (Seen(snapshot.slot) >= snapshot.own && Fenced(snapshot.slot) >= snapshot.fenced_own) return;
  seen_ = Joined(seen_, snapshot.seen, snapshot.slot, snapshot.own);
  fenced_ = Joined(fenced_, snapshot.fenced, snapshot.slot, snapshot.fenced_own);
}

void Knowledge::AcquireCopy(uint32_t slot, uint32_t clock) {
  if (Seen(slot) < clock) seen_ = Joined(seen_, nullptr, slot, clock);
  if (Fenced(slot) < clock) fenced_ = Joined(fenced_, nullptr, slot, clock);
}

void Knowledge::ProxyFence() {
  fenced_ = seen_;
  fenced_own_ = own_++;
}

void Knowledge::Meet(const std::vector<Knowledge*>& parties) {
  std::vector<const Clocks*> joined;  // most parties share theirs
  const auto join = [&](ClocksPtr Knowledge::* which) {
    joined.clear();
    const ClocksPtr& first = parties[0]->*which;
    auto all = first ? std::make_shared<Clocks>(*first) : std::make_shared<Clocks>();
    joined.push_back(first.get());
    for (const Knowledge* party : parties) {
      const Clocks* clocks = (party->*which).get();
      if (!clocks || clocks == joined.back()) continue;
      if (std::find(joined.begin(), joined.end(), clocks) != joined.end()) continue;
      Join(*all, *clocks);
      joined.push_back(clocks);
    }
    return all;
  };
  const auto seen = join(&Knowledge::seen_);
  const auto fenced = join(&Knowledge::fenced_);
  for (Knowledge* party : parties) {
    Raise(*seen, party->slot_, party->own_++);
    Raise(*fenced, party->slot_, party->fenced_own_);
  }
  for (Knowledge* party : parties) {
    party->seen_ = seen;
    party->fenced_ = fenced;
  }
}

void Knowledge::AddTo(Clocks& clocks) const {
  if (seen_) Join(clocks, *seen_);
  Raise(clocks, slot_, own_);
}

AccessLog::AccessLog(const char* begin, int64_t num_bytes) : begin_(begin), num_bytes_(num_bytes) {
  void* memory = mmap(nullptr, num_bytes / 4 * kKept * sizeof(Access), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  log_ = static_cast<Access*>(memory);
}

AccessLog::~AccessLog() { munmap(log_, num_bytes_ / 4 * kKept * sizeof(Access)); }

const AccessLog::Access* AccessLog::Add(const char* pointer, int64_t num_bytes,
                                        const Knowledge& who, Access access, uint32_t floor,
                                        uint32_t random) {
  const int64_t first = pointer - begin_;
  for (int64_t word = first / 4; word * 4 < first + num_bytes; ++word) {
    uint8_t bytes = 0xf;
    if (word * 4 < first) bytes &= 0xf << (first - word * 4);
    const int64_t past_end = word * 4 + 4 - (first + num_bytes);
    if (past_end > 0) bytes &= 0xf >> past_end;

    Access* const kept = log_ + word * kKept;
    Access* replaced = nullptr;
    bool same = false;
    for (int i = 0; i < kKept; ++i) {
      Access& old = kept[i];
      if (old.clock <= floor) {
        if (!same) replaced = &old;
        continue;
      }
      // A bulk copy sees an ordinary write only through a proxy fence.
      const bool needs_fence =
          (access.kind & kAsync) && !(old.kind & kAsync) && (old.kind & kWrite);
      const bool ordered = old.clock <= (needs_fence ? who.Fenced(old.slot) : who.Seen(old.slot));
      if (!ordered && (old.bytes & bytes) && ((old.kind | access.kind) & kWrite) &&
          !(old.kind & access.kind & kAtomic)) {
        return &old;
      }
      if (old.slot == access.slot && old.bytes == bytes && old.kind == access.kind) {
        replaced = &old;
        same = true;
      } else if (!replaced && ordered && !(old.bytes & ~bytes) &&
                 ((access.kind & kWrite) || !(old.kind & kWrite)) &&
                 (!(access.kind & kAtomic) || (old.kind & kAtomic)) && !(old.kind & kAsync)) {
        // What races with the old one races with the new one too.
        replaced = &old;
      }
    }
    if (!replaced) replaced = &kept[random % kKept];
    *replaced = access;
    replaced->bytes = bytes;
  }
  return nullptr;
}

}  // namespace simt
