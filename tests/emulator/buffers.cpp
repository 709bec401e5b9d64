// Global memory that kernels may touch.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "machine.h"

namespace emu {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr char kPoison = static_cast<char>(0xff);
constexpr char kGuard = static_cast<char>(0xfe);

std::map<uintptr_t, RegisteredBuffer>& registered() {
    static std::map<uintptr_t, RegisteredBuffer> buffers;
    return buffers;
}

std::map<uintptr_t, std::unique_ptr<char[]>>& allocated() {
    static std::map<uintptr_t, std::unique_ptr<char[]>> storage;
    return storage;
}

}  // namespace

void register_buffer(void* data, size_t bytes, const char* name, Access access) {
    const auto start = reinterpret_cast<uintptr_t>(data);
    const auto next = registered().upper_bound(start);
    const bool meets_next = next != registered().end() && next->first < start + bytes;
    const bool meets_previous =
        next != registered().begin() && std::prev(next)->first + std::prev(next)->second.bytes > start;
    if (meets_next || meets_previous)
        throw Error(std::string("register_buffer: ") + name + " overlaps " +
                    (meets_next ? next : std::prev(next))->second.name);
    registered()[start] = {bytes, name, access};
}

void unregister_buffer(void* data) {
    if (registered().erase(reinterpret_cast<uintptr_t>(data)) == 0)
        throw Error("unregister_buffer: no buffer was registered at this address");
}

void* allocate_buffer(size_t bytes, const char* name, Access access) {
    const size_t total = bytes + 2 * kGuardBytes + 256;
    auto storage = std::make_unique<char[]>(total);
    std::memset(storage.get(), kGuard, total);
    const auto start =
        (reinterpret_cast<uintptr_t>(storage.get()) + kGuardBytes + 255) / 256 * 256;  // as cudaMalloc
    std::memset(reinterpret_cast<void*>(start), kPoison, bytes);
    register_buffer(reinterpret_cast<void*>(start), bytes, name, access);
    allocated()[start] = std::move(storage);
    return reinterpret_cast<void*>(start);
}

void free_buffer(void* data) {
    unregister_buffer(data);
    allocated().erase(reinterpret_cast<uintptr_t>(data));
}

// The buffer around the address, or, up to a guard zone away, the nearest.
const std::pair<const uintptr_t, RegisteredBuffer>* buffer_at(const void* address) {
    const auto a = reinterpret_cast<uintptr_t>(address);
    const auto next = registered().upper_bound(a);
    if (next != registered().begin()) {
        const auto& before = *std::prev(next);
        if (a < before.first + std::max<size_t>(before.second.bytes, 1) + kGuardBytes) return &before;
    }
    if (next != registered().end() && next->first - a <= kGuardBytes) return &*next;
    return nullptr;
}

bool any_buffer_registered() {
    return !registered().empty();
}

void check_buffer_guards() {
    for (const auto& [start, storage] : allocated()) {
        const RegisteredBuffer& buffer = registered().at(start);
        for (size_t i = 1; i <= kGuardBytes; ++i) {
            const char* data = reinterpret_cast<const char*>(start);
            const bool before = *(data - i) != kGuard, after = data[buffer.bytes + i - 1] != kGuard;
            if (before || after)
                throw Error("the kernel wrote out of bounds: " + buffer.name +
                            (after ? "+" + std::to_string(buffer.bytes + i - 1) : "-" + std::to_string(i)) +
                            " (of " + std::to_string(buffer.bytes) + " bytes)");
        }
    }
}

}  // namespace emu
