// For Python, by ctypes. See driver.py.
#include "c_api.h"

#include "emulator.h"

namespace {

std::string& last_error() {
    static std::string text;
    return text;
}

}  // namespace

int emu::guarded(const std::function<void()>& call) {
    try {
        call();
        return 0;
    } catch (const std::exception& e) {
        last_error() = e.what();
        return 1;
    }
}

const char* emu_last_error() {
    return last_error().c_str();
}

void* emu_allocate(size_t bytes, const char* name, int access) {
    void* data = nullptr;
    emu::guarded([&] { data = emu::allocate_buffer(bytes, name, static_cast<emu::Access>(access)); });
    return data;
}

int emu_free(void* data) {
    return emu::guarded([&] { emu::free_buffer(data); });
}
