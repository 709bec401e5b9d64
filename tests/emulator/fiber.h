// One stack per CUDA thread, and the switch between two of them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

struct FiberContext {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
    char* stack_bottom = nullptr;  // null: the stack of the host thread
    size_t stack_bytes = 0;
};

// Stacks that live as long as the process and are handed out again and again: mapping them is slower than a
// kernel.
char* fiber_stack(size_t slot);
size_t fiber_stack_bytes();

// Prepares `fiber` to run entry() on the stack of `slot`. entry never returns.
void prepare_fiber(FiberContext& fiber, size_t slot, void (*entry)());

// Saves the running context in `from` and goes on with `to`.
void switch_fiber(FiberContext& from, FiberContext& to);

// The first thing entry() does.
void fiber_entered();

}  // namespace emu
