#include "tests/simt/context.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
// The registers that a call keeps go onto the stack that is left.
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

namespace simt {

#if defined(__x86_64__)
void Prepare(Context& context, char* stack, size_t stack_bytes, void (*entry)()) {
  // As after a call of `entry`: the stack pointer is 8 above a multiple of 16.
  auto* top = reinterpret_cast<uint64_t*>(stack + stack_bytes - 64);
  *--top = 0;  // where `entry` would return to
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
}

void SwitchTo(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
#else
void Prepare(Context& context, char* stack, size_t stack_bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = stack_bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void SwitchTo(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

namespace {
std::vector<char*>& FreeStacks() {
  static std::vector<char*> stacks;
  return stacks;
}
}  // namespace

char* StackPool::Take() {
  if (FreeStacks().empty()) {
    constexpr size_t kPage = 4096;
    constexpr int kAtOnce = 64;
    constexpr size_t kStride = kStackBytes + kPage;
    void* memory = mmap(nullptr, kAtOnce * kStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kAtOnce; ++i) {
      char* guard = static_cast<char*>(memory) + i * kStride;
      mprotect(guard, kPage, PROT_NONE);
      FreeStacks().push_back(guard + kPage);
    }
  }
  char* stack = FreeStacks().back();
  FreeStacks().pop_back();
  return stack;
}

void StackPool::Return(char* stack) { FreeStacks().push_back(stack); }

}  // namespace simt
