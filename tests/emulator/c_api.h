// What a shared library of kernels and emulator offers to Python. A library adds its own functions:
//
//   extern "C" int run_my_kernel(const emu::LaunchOptions* options, const void* x, void* y, int n) {
//       return emu::guarded([&] { emu::launch(my_kernel, grid, block, smem_bytes, *options, x, y, n); });
//   }
#pragma once

#include <cstddef>
#include <functional>

namespace emu {

// 0, or 1 with the message of the exception in emu_last_error().
int guarded(const std::function<void()>& call);

}  // namespace emu

extern "C" {
const char* emu_last_error();
void* emu_allocate(size_t bytes, const char* name, int access);  // null: emu_last_error()
int emu_free(void* data);
}
