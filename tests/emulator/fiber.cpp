#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr size_t kStackBytes = 512 * 1024;  // instrumented frames are large
#else
constexpr size_t kStackBytes = 96 * 1024;
#endif

#if defined(__x86_64__)
// Callee-saved registers go to the old stack, the new ones come from the new stack; everything else the
// compiler has saved around the call.
asm(R"(
.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
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
.size emu_switch_stack, .-emu_switch_stack
)");
extern "C" void emu_switch_stack(void** save_stack_pointer, void* stack_pointer);
#endif

namespace emu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
void set_host_stack(FiberContext& fiber) {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
    fiber.stack_bottom = static_cast<char*>(bottom);
}
#endif

char* map_stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* mapped = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped, page, PROT_NONE);  // an overflow faults instead of reaching the neighbour
    return static_cast<char*>(mapped) + page;
}

}  // namespace

size_t fiber_stack_bytes() {
    return kStackBytes;
}

char* fiber_stack(size_t slot) {
    static std::vector<char*> stacks;
    while (stacks.size() <= slot) stacks.push_back(map_stack());
    return stacks[slot];
}

void prepare_fiber(FiberContext& fiber, size_t slot, void (*entry)()) {
    fiber.stack_bottom = fiber_stack(slot);
    fiber.stack_bytes = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack_bottom,
                                  kStackBytes);  // frames of the thread before never returned
#endif
#if defined(__x86_64__)
    // Tops at different distances from a page border, or all hot frames would share a few cache sets.
    const size_t stagger = (slot % 61) * 64;
    auto* top = reinterpret_cast<uint64_t*>(fiber.stack_bottom + kStackBytes - stagger - 64);
    top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--top = 0;                                  // where entry would return to; keeps the ABI's alignment
    *--top = reinterpret_cast<uint64_t>(entry);  // where the switch returns to
    for (int saved = 0; saved < 6; ++saved) *--top = 0;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack_bottom;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(FiberContext& from, FiberContext& to) {
#if defined(__SANITIZE_ADDRESS__)
    if (from.stack_bottom == nullptr) set_host_stack(from);
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if defined(__x86_64__)
    emu_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void fiber_entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace emu
