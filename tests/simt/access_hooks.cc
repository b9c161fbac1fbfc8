// What -fsanitize=thread has compiled code call at every access of memory, in place of that
// sanitizer's own library: the emulator checks and logs the access. Without the option nothing
// calls these. This file itself is compiled without it.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/simt/runtime.h"

namespace {

bool in_hook = false;

void OnAccess(const void* pointer, int64_t num_bytes, bool write, const void* place) {
  simt::Runtime* const runtime = simt::Runtime::Get();
  if (!runtime || in_hook || !simt::Runtime::Current()) return;
  if (!runtime->InDevice(pointer) && !runtime->InShared(pointer)) return;  // the thread's own
  // A template's code may be shared with the emulator, whose accesses are not the kernel's.
  in_hook = true;
  const uint32_t index = runtime->PlaceOf(place);
  in_hook = false;
  runtime->OnAccess(pointer, num_bytes, write, index);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define SIMT_HOOK(bytes)                                                                       \
  void __tsan_read##bytes(void* p) { OnAccess(p, bytes, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { OnAccess(p, bytes, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                 \
    OnAccess(p, bytes, false, __builtin_return_address(0));                                    \
  }                                                                                            \
  void __tsan_unaligned_write##bytes(void* p) {                                                \
    OnAccess(p, bytes, true, __builtin_return_address(0));                                     \
  }                                                                                            \
  void __tsan_volatile_read##bytes(void* p) { __tsan_read##bytes(p); }                         \
  void __tsan_volatile_write##bytes(void* p) { __tsan_write##bytes(p); }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
#undef SIMT_HOOK

void __tsan_read_range(void* p, size_t bytes) {
  OnAccess(p, static_cast<int64_t>(bytes), false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  OnAccess(p, static_cast<int64_t>(bytes), true, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  OnAccess(from, static_cast<int64_t>(bytes), false, __builtin_return_address(0));
  OnAccess(to, static_cast<int64_t>(bytes), true, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  OnAccess(to, static_cast<int64_t>(bytes), true, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}

// std::atomic of the test program itself, which has one OS thread here.
#define SIMT_ATOMICS(bits)                                                                         \
  using a##bits = uint##bits##_t;                                                                  \
  a##bits __tsan_atomic##bits##_load(const volatile a##bits* p, int) {                             \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile a##bits* p, a##bits v, int) {                          \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  a##bits __tsan_atomic##bits##_exchange(volatile a##bits* p, a##bits v, int) {                    \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  a##bits __tsan_atomic##bits##_fetch_add(volatile a##bits* p, a##bits v, int) {                   \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  a##bits __tsan_atomic##bits##_fetch_sub(volatile a##bits* p, a##bits v, int) {                   \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile a##bits* p, a##bits* e, a##bits v,    \
                                                    int, int) {                                    \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile a##bits* p, a##bits* e, a##bits v, int, \
                                                  int) {                                           \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }
SIMT_ATOMICS(8)
SIMT_ATOMICS(16)
SIMT_ATOMICS(32)
SIMT_ATOMICS(64)
#undef SIMT_ATOMICS
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

}  // extern "C"
