// How a thread treats denormals. XLA's threads flush them, others do not; the same work must give
// the same bits on either.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace wideep {

#if defined(__SSE2__)
constexpr unsigned long kFlushDenormals = 0x8040;  // MXCSR: flush-to-zero | denormals-are-zero
inline unsigned long GetFloatEnv() { return _mm_getcsr(); }
inline void SetFloatEnv(unsigned long env) { _mm_setcsr(static_cast<unsigned>(env)); }
#elif defined(__aarch64__)
constexpr unsigned long kFlushDenormals = 1ul << 24;  // FPCR.FZ
inline unsigned long GetFloatEnv() {
  unsigned long env;
  __asm__ volatile("mrs %0, fpcr" : "=r"(env));
  return env;
}
inline void SetFloatEnv(unsigned long env) { __asm__ volatile("msr fpcr, %0" ::"r"(env)); }
#else
constexpr unsigned long kFlushDenormals = 0;
inline unsigned long GetFloatEnv() { return 0; }
inline void SetFloatEnv(unsigned long) {}
#endif

/// IEEE denormals for the current scope.
class ScopedIeeeDenormals {
 public:
  ScopedIeeeDenormals() : saved_(GetFloatEnv()) { SetFloatEnv(saved_ & ~kFlushDenormals); }
  ~ScopedIeeeDenormals() { SetFloatEnv(saved_); }
  ScopedIeeeDenormals(const ScopedIeeeDenormals&) = delete;
  ScopedIeeeDenormals& operator=(const ScopedIeeeDenormals&) = delete;

 private:
  unsigned long saved_;
};

}  // namespace wideep
