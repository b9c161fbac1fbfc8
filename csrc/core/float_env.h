// IEEE denormals for the current scope. XLA's threads flush them, ours do not; an exchange may run on
// either, and must give the same bits.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace wideep {

class ScopedIeeeDenormals {
 public:
#if defined(__SSE2__)
  ScopedIeeeDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushBits); }
  ~ScopedIeeeDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushBits = 0x8040;  // flush-to-zero | denormals-are-zero
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedIeeeDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ & ~kFlushBits));
  }
  ~ScopedIeeeDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  static constexpr unsigned long kFlushBits = 1ul << 24;  // FPCR.FZ
  unsigned long saved_;
#endif
};

}  // namespace wideep
