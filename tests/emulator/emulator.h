// Runs CUDA kernels that were compiled by g++ with -DROSAQ_EMULATE. This is what tests include; the rest of
// the folder is behind it. See README.md for what a passing test proves and what it cannot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "nvidia_headers.h"

namespace emu {

// What a kernel did wrong, with the file and line where it did it.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// When an asynchronous copy writes: at once, not before somebody waits for it, or at any moment in between.
enum class Completion { kEager, kLazy, kRandom };

struct LaunchOptions {
    // Of the order in which threads run (even: all alike; odd: some run far ahead) and of random completion.
    uint64_t seed = 0;
    Completion completion = Completion::kRandom;
    int resident_blocks = 4;      // blocks in flight together; the next one starts when one ends
    bool shuffle_blocks = false;  // start blocks in random order instead of by index
};

// How kernels may use a buffer. Only the checker holds them to it.
enum class Access { kIn, kOut, kInOut };

// A piece of global memory that kernels may touch. The checker reports every other access as out of bounds.
void register_buffer(void* data, size_t bytes, const char* name, Access access);
void unregister_buffer(void* data);

// Registered memory between two guard zones: a launch fails if a kernel wrote to one, checker or not. Filled
// with 0xff bytes, a NaN in every float format.
void* allocate_buffer(size_t bytes, const char* name, Access access);
void free_buffer(void* data);

template <class T>
class DeviceArray {
  public:
    DeviceArray(size_t size, const char* name, Access access)
        : data_(static_cast<T*>(allocate_buffer(size * sizeof(T), name, access))), size_(size) {}
    ~DeviceArray() { free_buffer(data_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) const { return data_[i]; }

  private:
    T* data_;
    size_t size_;
};

struct Launch {
    dim3 grid, block;
    size_t smem_bytes;  // dynamic shared memory
    bool checked;       // the kernel was compiled with the checker's hooks
    const void* code;   // an address in the library that holds the kernel
    void (*thread_main)(const void* context);
    const void* context;
};

// Runs all threads of all blocks; throws Error.
void run(const Launch& launch, const LaunchOptions& options);

#ifdef __SANITIZE_THREAD__
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

// kernel<<<grid, block, smem_bytes>>>(args...), to the end. Throws Error.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem_bytes,
            const LaunchOptions& options, const Args&... args) {
    // The arguments lie on the caller's stack, which is no memory of the device: these frames go unchecked.
    const auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(args...); };
    const auto thread_main = [](const void* context) __attribute__((no_sanitize("thread"))) {
        (*static_cast<const decltype(call)*>(context))();
    };
    run({grid, block, smem_bytes, kChecked, reinterpret_cast<const void*>(kernel), thread_main, &call},
        options);
}

}  // namespace emu
