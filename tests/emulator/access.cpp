// The checker: every load and store of a kernel compiled with -fsanitize=thread,alignment,bounds,shift calls
// one of the hooks below. No sanitizer library is linked; these are the hooks.
#include <link.h>

#include "machine.h"

namespace emu {
namespace {

// Constants of the kernel's own library.
bool is_in_library_of_kernel(const void* address) {
    struct Query {
        uintptr_t code, address;
        bool found;
    } query{reinterpret_cast<uintptr_t>(machine->launch.code), reinterpret_cast<uintptr_t>(address), false};
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* data) {
            Query& q = *static_cast<Query*>(data);
            bool has_code = false, has_address = false;
            for (int i = 0; i < object->dlpi_phnum; ++i) {
                const auto& segment = object->dlpi_phdr[i];
                if (segment.p_type != PT_LOAD) continue;
                const uintptr_t start = object->dlpi_addr + segment.p_vaddr;
                has_code |= q.code - start < segment.p_memsz;
                has_address |= q.address - start < segment.p_memsz;
            }
            q.found |= has_code && has_address;
            return has_code ? 1 : 0;
        },
        &query);
    return query.found;
}

Shadow& shadow_of(const std::pair<const uintptr_t, RegisteredBuffer>& buffer) {
    const auto found = machine->buffer_shadows.find(buffer.first);
    if (found != machine->buffer_shadows.end()) return found->second;
    const bool is_initialised = buffer.second.access != Access::kOut;
    return machine->buffer_shadows
        .emplace(buffer.first,
                 Shadow(reinterpret_cast<const void*>(buffer.first), buffer.second.bytes, is_initialised))
        .first->second;
}

void check_global(const void* address, size_t bytes, AccessKind kind, Site site) {
    const bool is_write = kind == AccessKind::kWrite || kind == AccessKind::kAtomicWrite;
    const bool is_atomic = kind == AccessKind::kAtomicRead || kind == AccessKind::kAtomicWrite;
    const char* verb = is_write ? "write of " : "read of ";
    const auto* buffer = buffer_at(address);
    const auto a = reinterpret_cast<uintptr_t>(address);
    if (buffer == nullptr || a < buffer->first || a + bytes > buffer->first + buffer->second.bytes) {
        if (is_in_library_of_kernel(address)) return;
        fail(site,
             std::string("out of bounds: ") + verb + std::to_string(bytes) + " bytes at " + name_of(address));
    }
    if (buffer->second.access == Access::kIn) {
        if (is_write) fail(site, "write to " + name_of(address) + ", which is an input");
        return;
    }
    const std::string problem = shadow_of(*buffer).access(self(), address, bytes, is_write, is_atomic, site);
    if (!problem.empty()) fail(site, problem + ", at " + name_of(address));
}

bool is_on_own_stack(const void* address) {
    const FiberContext& fiber = self().context;
    const char* a = static_cast<const char*>(address);
    return a >= fiber.stack_bottom && a < fiber.stack_bottom + fiber.stack_bytes;
}

void hook(const void* address, size_t bytes, AccessKind kind, Site site) {
    if (machine == nullptr || machine->running == nullptr) return;  // host code in the kernel's file
    check_access(address, bytes, kind, site);
}

}  // namespace

void check_access(const void* address, size_t bytes, AccessKind kind, Site site) {
    if (!machine->launch.checked || is_on_own_stack(address)) return;
    Block& block = *self().block;
    const bool is_write = kind == AccessKind::kWrite || kind == AccessKind::kAtomicWrite;
    const bool is_atomic = kind == AccessKind::kAtomicRead || kind == AccessKind::kAtomicWrite;
    for (const SharedPiece& piece : block.shared) {
        const char* a = static_cast<const char*>(address);
        if (a < piece.storage.get() || a >= piece.storage.get() + piece.storage_bytes) continue;
        if (a < piece.data || a + bytes > piece.data + piece.bytes)
            fail(site, std::string("out of bounds: ") + (is_write ? "write of " : "read of ") +
                           std::to_string(bytes) + " bytes at " + name_of(address));
        const std::string problem = piece.shadow->access(self(), address, bytes, is_write, is_atomic, site);
        if (!problem.empty()) fail(site, problem + ", at " + name_of(address));
        return;
    }
    check_global(address, bytes, kind, site);
}

void check_constant(const void* address, size_t bytes, Site site) {
    check_access(address, bytes, AccessKind::kRead, site);
    const auto* buffer = buffer_at(address);
    if (buffer != nullptr && buffer->second.access != Access::kIn)
        fail(site,
             "ld.global.nc from " + name_of(address) + ", which the kernel may write; it needs an input");
}

}  // namespace emu

using emu::AccessKind;

extern "C" {

#define EMU_HOOKS(bytes)                                   \
    void __tsan_read##bytes(void* a) {                     \
        emu::hook(a, bytes, AccessKind::kRead, EMU_SITE);  \
    }                                                      \
    void __tsan_write##bytes(void* a) {                    \
        emu::hook(a, bytes, AccessKind::kWrite, EMU_SITE); \
    }                                                      \
    void __tsan_unaligned_read##bytes(void* a) {           \
        emu::hook(a, bytes, AccessKind::kRead, EMU_SITE);  \
    }                                                      \
    void __tsan_unaligned_write##bytes(void* a) {          \
        emu::hook(a, bytes, AccessKind::kWrite, EMU_SITE); \
    }                                                      \
    void __tsan_volatile_read##bytes(void* a) {            \
        emu::hook(a, bytes, AccessKind::kRead, EMU_SITE);  \
    }                                                      \
    void __tsan_volatile_write##bytes(void* a) {           \
        emu::hook(a, bytes, AccessKind::kWrite, EMU_SITE); \
    }
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
#undef EMU_HOOKS

void __tsan_read_range(void* a, unsigned long bytes) {
    emu::hook(a, bytes, AccessKind::kRead, EMU_SITE);
}
void __tsan_write_range(void* a, unsigned long bytes) {
    emu::hook(a, bytes, AccessKind::kWrite, EMU_SITE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// From -fsanitize=alignment, bounds, shift. The first argument starts with the place in the source, but the
// return address says more: who inlined it.
void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
    emu::fail(EMU_SITE, "misaligned: " + (emu::machine ? emu::name_of(reinterpret_cast<const void*>(address))
                                                       : std::string("address")));
}
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
    emu::fail(EMU_SITE, "array index " + std::to_string(static_cast<intptr_t>(index)) + " is out of bounds");
}
void __ubsan_handle_shift_out_of_bounds(void*, uintptr_t value, uintptr_t shift) {
    emu::fail(EMU_SITE,
              "shift of " + std::to_string(value) + " by " + std::to_string(static_cast<intptr_t>(shift)));
}

}  // extern "C"
