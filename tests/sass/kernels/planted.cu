// Kernels that tests/test_sass.py must approve of (good) or must not (all others), compiled and never run.
#include "device/ptx.cuh"

namespace planted {

using namespace rosaq;

enum class Fault { kNone, kNarrowCopy, kDivision, kLocalArray, kNoMma, kPaddedLoop };

template <Fault kFault>
__device__ void stream_and_multiply(const uint4* w, float* y, int tiles, int divisor) {
    ROSAQ_DYN_SMEM(smem);
    const int tid = threadIdx.x;
    float acc[4] = {};
    float sums[64];
    if (kFault == Fault::kLocalArray)
        for (int i = 0; i < 64; ++i) sums[i] = y[i];
    for (int t = 0; t < tiles; ++t) {
        unsigned char* stage = smem + (t & 3) * 1024;
        const uint4* from = w + (kFault == Fault::kDivision ? t * 37 / divisor : t) * 64;
        if (kFault == Fault::kNarrowCopy)
            ptx::cp_async_4(stage + tid * 4, reinterpret_cast<const uint32_t*>(from) + tid);
        else
            ptx::cp_async_16(stage + tid * 16, from + tid);
        ptx::cp_async_commit();
        ptx::cp_async_wait<2>();
        __syncthreads();
        uint32_t a[4], b[4];
        ptx::ldmatrix_x4(a, smem + ((t + 1) & 3) * 1024 + tid * 16);
        ptx::ldmatrix_x4(b, smem + ((t + 2) & 3) * 1024 + tid * 16);
        if (kFault == Fault::kPaddedLoop)
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 24; ++j) a[i] = a[i] * b[(i + j) & 3] + 12345u * j;
        if (kFault == Fault::kNoMma) {
            for (int i = 0; i < 4; ++i) acc[i] += __uint_as_float(a[i] ^ b[i]);
        } else {
            ptx::mma_m16n8k16<__half>(acc, a, {b[0], b[1]});
            ptx::mma_m16n8k16<__half>(acc, a, {b[2], b[3]});
        }
        if (kFault == Fault::kLocalArray) sums[a[0] & 63] += acc[0];
    }
    for (int i = 0; i < 4; ++i)
        y[tid * 4 + i] = acc[i] + (kFault == Fault::kLocalArray ? sums[tid & 63] : 0.0f);
}

#define PLANTED(name, fault)                                                                       \
    __global__ void __launch_bounds__(64) name(const uint4* w, float* y, int tiles, int divisor) { \
        stream_and_multiply<fault>(w, y, tiles, divisor);                                          \
    }
PLANTED(good, Fault::kNone)
PLANTED(narrow_copy, Fault::kNarrowCopy)
PLANTED(division, Fault::kDivision)
PLANTED(local_array, Fault::kLocalArray)
PLANTED(no_mma, Fault::kNoMma)
PLANTED(padded_loop, Fault::kPaddedLoop)

}  // namespace planted
