// A thread of the emulated GPU: a function with a stack of its own that runs until it must wait. One runs at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a call must preserve on the current stack, and continues on another.
extern "C" void lr_emulator_switch(void** save, void* to);
asm(R"(
.pushsection .text
.weak lr_emulator_switch
.type lr_emulator_switch,@function
lr_emulator_switch:
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
.size lr_emulator_switch,.-lr_emulator_switch
.popsection
)");
#else
#include <ucontext.h>
#endif

namespace lr::emulator {

class Fiber {
 public:
  // entry never returns: it ends with leave() for ever.
  void start(void (*entry)()) {
    stack_.reset(new char[kStack]);
#if defined(__x86_64__)
    auto* top = reinterpret_cast<uintptr_t*>((uintptr_t(stack_.get()) + kStack) & ~uintptr_t(15));
    *--top = 0;                 // the entry sees the stack as after a call
    *--top = uintptr_t(entry);  // what the switch returns to
    for (int i = 0; i < 6; ++i) *--top = 0;
    mine_ = top;
#else
    getcontext(&mine_);
    mine_.uc_stack.ss_sp = stack_.get();
    mine_.uc_stack.ss_size = kStack;
    mine_.uc_link = nullptr;
    makecontext(&mine_, entry, 0);
#endif
  }
  // From the scheduler: runs the fiber until it leaves.
  void enter() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStack);
#endif
#if defined(__x86_64__)
    lr_emulator_switch(&scheduler_, mine_);
#else
    swapcontext(&scheduler_, &mine_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  // From the fiber: back to the scheduler. begun() is the first call on a new stack.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, scheduler_stack_, scheduler_size_);
#endif
#if defined(__x86_64__)
    lr_emulator_switch(&mine_, scheduler_);
#else
    swapcontext(&mine_, &scheduler_);
#endif
    begun();
  }
  void begun() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &scheduler_stack_, &scheduler_size_);
#endif
  }

 private:
  static constexpr size_t kStack = 1 << 16;
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void *mine_ = nullptr, *scheduler_ = nullptr;
#else
  ucontext_t mine_, scheduler_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
#endif
};

}  // namespace lr::emulator
