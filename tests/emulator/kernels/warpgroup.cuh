// A warpgroup multiplies in two groups, as it should or wrong in one way.
#pragma once

#include "device/ptx_wgmma.cuh"

namespace emulator_tests {

using namespace rosaq;

enum class WgmmaBug {
    kNone,
    kNoWait,     // the sums are read while the products are under way
    kShortWait,  // and those of the second group, when the first is done
    kNoBarrier,  // b is read before others have written it
    kGlobal,     // b is not in shared memory
    kPastEnd,    // b goes on where shared memory has ended
    kUnaligned,  // b begins 8 bytes past a multiple of 16
    kDivergent,  // half of each warp multiplies elsewhere
};
constexpr int kWgmmaThreads = 128, kWgmmaSmemBytes = 1024;

// out [2, 64, 32] = a b^T and 2 a b^T; a [64, 16], b [32, 16], numbers that float16 holds.
template <WgmmaBug kBug>
__global__ void wgmma_kernel(const __half* a, const __half* b, float* out) {
    ROSAQ_DYN_SMEM(smem);
    const int t = threadIdx.x, lane = t % 32;
    auto* s_b = reinterpret_cast<__half*>(smem);  // [2 of k, 4 of rows, 8, 8]
    for (int i = t; i < 512; i += kWgmmaThreads)
        s_b[i % 16 / 8 * 256 + i / 128 * 64 + i / 16 % 8 * 8 + i % 8] = b[i];
    ptx::fence_proxy_async();
    if (kBug != WgmmaBug::kNoBarrier) __syncthreads();

    uint32_t fragment[4];
    const __half* from = a + (t / 32 * 16 + lane / 4) * 16 + lane % 4 * 2;
    for (int i = 0; i < 4; ++i) memcpy(&fragment[i], from + i % 2 * 128 + i / 2 * 8, 4);
    const char* start = reinterpret_cast<const char*>(kBug == WgmmaBug::kGlobal ? b : s_b);
    if (kBug == WgmmaBug::kPastEnd) start += 128;
    if (kBug == WgmmaBug::kUnaligned) start += 8;
    const ptx::WgmmaMatrix matrix(start, 512, 128);
    float once[16], twice[16];
    ptx::wgmma_fence();
    if (kBug == WgmmaBug::kDivergent && lane >= 16)
        ptx::wgmma_m64k16<__half, 32>(once, fragment, matrix, false);
    else
        ptx::wgmma_m64k16<__half, 32>(once, fragment, matrix, false);
    ptx::wgmma_commit();
    ptx::wgmma_m64k16<__half, 32>(twice, fragment, matrix, false);
    ptx::wgmma_m64k16<__half, 32>(twice, fragment, matrix, true);
    ptx::wgmma_commit();
    if (kBug != WgmmaBug::kNoWait) ptx::wgmma_wait<kBug == WgmmaBug::kShortWait ? 1 : 0>();
    for (int i = 0; i < 16; ++i) {
        const int row = t / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        out[row * 32 + column] = once[i];
        out[(64 + row) * 32 + column] = twice[i];
    }
}

}  // namespace emulator_tests
