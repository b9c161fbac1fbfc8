// XLA allocates outputs afresh, so a large one is made of pages that no one has touched: on the
// first write to each the kernel is entered and zeroes it, which costs more than the rows that are
// written.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wideep {

constexpr size_t kHugePageBytes = size_t{2} << 20;

/// Asks for huge pages, which are entered 512 times less often, in [begin, begin + bytes), which is
/// about to be written. A hint: nothing changes where the system has none, where the range is
/// small, or for pages that exist already.
inline void AdviseHugePages(void* begin, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  // Only whole huge pages that lie inside: neighbours keep their own settings.
  const uintptr_t first =
      (reinterpret_cast<uintptr_t>(begin) + kHugePageBytes - 1) & ~(kHugePageBytes - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(kHugePageBytes - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace wideep
