// A stack and where it stopped: what a fiber is made of.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

/// Makes `context` begin with entry(), which must not return, on the stack that ends at
/// `stack_end`.
void Prepare(Context& context, char* stack, size_t stack_bytes, void (*entry)());

/// Leaves `from` here and goes on where `to` stopped.
void SwitchTo(Context& from, Context& to);

/// Stacks with a guard page below each, kept for the whole process.
class StackPool {
 public:
  static constexpr size_t kStackBytes = 64 * 1024;
  char* Take();
  void Return(char* stack);
};

}  // namespace simt
