// Turns a SIGSEGV of a kernel (a misaligned vector access, a wild pointer, a stack overflow) into an Error
// with its line. Not with ASan, which does the same, and only where the registers of a signal are known.
#include <signal.h>
#include <ucontext.h>

#include <cstring>

#include "machine.h"

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
namespace emu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
alignas(64) char handler_stack[kStackBytes];
alignas(64) char report_stack[kStackBytes];  // the fiber's own may be what overflowed
Site fault_site = nullptr;
const void* fault_address = nullptr;
bool has_address = false;
struct sigaction before;

void report() {
    if (has_address)
        fail(fault_site, "fault: nothing is mapped at " + name_of(fault_address));
    else
        fail(fault_site, "fault: a vector access that is not aligned, or a wild pointer");
}

// Nothing is safe to do in here, so the thread goes on in report(), as if the instruction had called it.
void on_signal(int number, siginfo_t* info, void* data) {
    if (machine == nullptr || machine->running == nullptr) {  // not a kernel: die as without us
        sigaction(number, &before, nullptr);
        return;
    }
    auto& registers = static_cast<ucontext_t*>(data)->uc_mcontext.gregs;
    fault_site = reinterpret_cast<Site>(registers[REG_RIP] + 1);
    fault_address = info->si_addr;
    has_address = info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR;
    registers[REG_RIP] = reinterpret_cast<greg_t>(&report);
    registers[REG_RSP] = reinterpret_cast<greg_t>(report_stack + kStackBytes - 64 - 8);
}

}  // namespace

FaultHandler::FaultHandler() {
    stack_t stack{};
    stack.ss_sp = handler_stack;
    stack.ss_size = kStackBytes;
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before);
}

FaultHandler::~FaultHandler() {
    sigaction(SIGSEGV, &before, nullptr);
    sigaltstack(&stack_before_, nullptr);
}

}  // namespace emu
#else
emu::FaultHandler::FaultHandler() : stack_before_{} {}
emu::FaultHandler::~FaultHandler() {}
#endif
