// What the headers in override/ call on behalf of a kernel's thread.
#pragma once

#include <cstdint>

#include "tests/simt/site.h"

namespace simt {

enum class Order { kRelaxed, kAcquire, kRelease, kAcqRel };
enum class Scope { kBlock, kGpu, kSys };

// ---- barriers and warps ----

void BarSync(uint32_t id, uint32_t num_threads, const char* what, Site site);
void SyncThreads(Site site);

enum class WarpOp {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kMatch,
  kAddU32,
  kMaxU32,
  kMaxS32,
  kMinU32,
  kMinS32,
  kAnd,
  kOr,
};
/// Waits for the lanes of `mask`; returns this lane's result. `lane` is the lane, distance or lane
/// mask of a shuffle.
uint64_t WarpMeet(WarpOp op, uint32_t mask, uint64_t value, uint32_t lane, int width, Site site);

// ---- flags and atomics: `bytes` is 4 or 8 ----

uint64_t FlagLoad(const void* pointer, int bytes, Order order, Scope scope, Site site);
void FlagStore(void* pointer, int bytes, uint64_t value, Order order, Scope scope, Site site);

enum class Rmw { kAdd, kMaxU, kMaxS, kMinU, kMinS, kExchange, kCas, kOr, kAnd };
/// Returns the value before.
uint64_t FlagUpdate(Rmw kind, void* pointer, int bytes, uint64_t value, uint64_t expected,
                    Order order, Scope scope, Site site);

void Fence(Scope scope, Site site);
void ProxyFence(Site site);
uint64_t Time(Site site);

// ---- memory ----

char* SharedBase();
uint32_t SharedOffset(const void* pointer, Site site);
/// Ordinary 16-byte accesses.
void Load16(void* to, const void* pointer, Site site);
void Store16(void* pointer, const void* from, Site site);

// ---- mbarriers and bulk copies ----

void MbarrierInit(uint32_t smem, uint32_t arrivals, Site site);
void MbarrierArrive(uint32_t smem, uint32_t expect_bytes, Site site);
bool MbarrierTryWait(uint32_t smem, uint32_t parity, Site site);

void BulkLoad(uint32_t smem, const void* pointer, uint32_t bytes, uint32_t mbarrier, Site site);
void BulkStore(void* pointer, uint32_t smem, uint32_t bytes, Site site);
void BulkCommit();
/// Until at most `pending` groups of this thread are unread (or, not `read_only`, unwritten).
void BulkWait(int pending, bool read_only, Site site);

}  // namespace simt
