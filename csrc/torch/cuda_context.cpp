#include "cuda_context.h"

#include <array>
#include <map>
#include <tuple>
#include <vector>

// Weak: a torch without CUDA does not have it, and this library loads there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace rosaq::bind {
namespace {

constexpr int kMaxDevices = 64, kSlotsAtOnce = 32;

DeviceFacts read_facts(const char* op, int device) {
    DeviceFacts facts;
    const auto read = [&](cudaDeviceAttr attribute, int* value) {
        check_cuda(op, cudaDeviceGetAttribute(value, attribute, device), "device " + std::to_string(device));
    };
    read(cudaDevAttrMultiProcessorCount, &facts.sms);
    read(cudaDevAttrComputeCapabilityMajor, &facts.major);
    read(cudaDevAttrComputeCapabilityMinor, &facts.minor);
    read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &facts.smem_per_block);
    return facts;
}

// While this lives, the thread may allocate although some stream is being captured.
class AllowAllocation {
  public:
    AllowAllocation() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~AllowAllocation() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    AllowAllocation(const AllowAllocation&) = delete;
    AllowAllocation& operator=(const AllowAllocation&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int* allocate_zeros(const char* op, size_t bytes) {
    const AllowAllocation allow;
    void* data = nullptr;
    cudaStream_t own = nullptr;  // a memset on the default stream would end a capture
    check_cuda(op, cudaMalloc(&data, bytes), "counters, " + std::to_string(bytes) + " bytes");
    check_cuda(op, cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "counters");
    check_cuda(op, cudaMemsetAsync(data, 0, bytes, own), "counters");
    check_cuda(op, cudaStreamSynchronize(own), "counters");
    check_cuda(op, cudaStreamDestroy(own), "counters");
    return static_cast<int*>(data);
}

// Who may share counters: work that runs one after another.
using Owner = std::tuple<int, cudaStream_t, unsigned long long>;  // device, stream, capture (0: none)

struct CounterPool {
    std::mutex mutex;
    std::map<Owner, int*> slots;
    std::array<std::vector<int*>, kMaxDevices> free;
};

}  // namespace

cudaStream_t current_stream(const char* op, int device) {
    ROSAQ_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                ": x: got a CUDA tensor, but the torch in this process has no CUDA");
    void* stream = nullptr;
    ROSAQ_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, op, ": x: got device ", device,
                ", of which torch gives no current stream");
    return static_cast<cudaStream_t>(stream);
}

const DeviceFacts& device_facts(const char* op, int device) {
    static std::array<DeviceFacts, kMaxDevices> known;
    static std::mutex mutex;
    ROSAQ_CHECK(device >= 0 && device < kMaxDevices, op, ": x: got device ", device, ", need 0 to ",
                kMaxDevices - 1);
    const std::lock_guard<std::mutex> lock(mutex);
    DeviceFacts& facts = known[static_cast<size_t>(device)];
    if (facts.sms == 0) facts = read_facts(op, device);
    ROSAQ_CHECK(facts.major >= 8, op, ": x: got a GPU of compute capability ", facts.major, ".", facts.minor,
                ", need 8.0 (Ampere) or later; on the CPU every op works");
    return facts;
}

int* launch_counters(const char* op, int device, cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    check_cuda(op, cudaStreamGetCaptureInfo(stream, &status, &capture), "stream");
    if (status != cudaStreamCaptureStatusActive) capture = 0;

    static CounterPool pool;
    const std::lock_guard<std::mutex> lock(pool.mutex);
    int*& slot = pool.slots[Owner{device, stream, capture}];
    if (slot == nullptr) {
        std::vector<int*>& free = pool.free[static_cast<size_t>(device)];
        if (free.empty()) {
            int* chunk = allocate_zeros(op, size_t{kSlotsAtOnce} * kCounterInts * sizeof(int));
            for (int i = 0; i < kSlotsAtOnce; ++i) free.push_back(chunk + i * kCounterInts);
        }
        slot = free.back();
        free.pop_back();
    }
    return slot;
}

}  // namespace rosaq::bind
