// What a launch needs from the process: the current stream, facts about the device, and counters that stay
// zero.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>

#include "checks.h"

namespace rosaq::bind {

// Raises with op, what was attempted and cudaError, and clears the error: the thread's next good launch would
// report it again.
inline void check_cuda(const char* op, cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) (void)cudaGetLastError();
    ROSAQ_CHECK(error == cudaSuccess, op, ": ", what, ": ", cudaGetErrorName(error), ": ",
                cudaGetErrorString(error));
}

// PyTorch's current stream of a device.
cudaStream_t current_stream(const char* op, int device);

struct DeviceFacts {
    int sms = 0, major = 0, minor = 0, smem_per_block = 0;
};

// Of the device of t, which must be a CUDA device of compute capability 8.0 or later.
const DeviceFacts& device_facts(const char* op, int device);

constexpr int kCounterInts = 4096;

// `kCounterInts` ints in device memory that are zero between launches, for the kernels that run on `stream`
// one after another. A captured graph gets its own for each stream it was captured on, so that its replays
// meet nobody else's. Allocated once, kept for the life of the process; safe to call while a stream is being
// captured.
int* launch_counters(const char* op, int device, cudaStream_t stream);

}  // namespace rosaq::bind
