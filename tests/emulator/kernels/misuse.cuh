// One instruction used wrongly, each in its way; out = in where it does no harm to the result.
#pragma once

#include "device/ptx.cuh"

namespace emulator_tests {

using namespace rosaq;

enum class Misuse {
    kStaleLoad,       // ld.global.nc of what this kernel writes
    kWriteInput,      // a store to a buffer that is an input
    kBarrierShort,    // a named barrier of 64 threads that 32 come to
    kBarrierSizes,    // warps disagree on how many threads a named barrier has
    kNoMbarrier,      // an arrival on memory that is no mbarrier
    kBulkSize,        // a bulk copy of 24 bytes
    kBulkInFlight,    // the block ends before its bulk copy
    kNone,            // a shuffle among the lanes that have not returned
    kShuffleExited,   // a shuffle from a lane that has
    kMisalignedCopy,  // 16 bytes to an address that is a multiple of 8
};
constexpr int kMisuseThreads = 96;

template <Misuse kMisuse>
__global__ void misuse_kernel(const uint4* in, uint4* out) {
    ROSAQ_DYN_SMEM(smem);
    ROSAQ_SHARED(mbar, uint64_t);
    const int t = threadIdx.x;
    uint4 v = in[t];
    if (kMisuse == Misuse::kStaleLoad) {
        out[t] = v;
        v = ptx::ld_global_nc_16(out + t);
    }
    if (kMisuse == Misuse::kWriteInput) const_cast<uint4*>(in)[t].x = v.y;
    if (kMisuse == Misuse::kBarrierShort && t < 32) ptx::bar_sync(1, 64);
    if (kMisuse == Misuse::kBarrierSizes) ptx::bar_sync(1, t < 32 ? 64 : 96);
    if (kMisuse == Misuse::kNoMbarrier) ptx::mbarrier_arrive(&mbar);
    if ((kMisuse == Misuse::kBulkSize || kMisuse == Misuse::kBulkInFlight) && t == 0) {
        ptx::mbarrier_init(&mbar, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(&mbar, kMisuse == Misuse::kBulkSize ? 24 : 32);
        ptx::bulk_copy_g2s(smem, in, kMisuse == Misuse::kBulkSize ? 24 : 32, &mbar);
    }
    if (kMisuse == Misuse::kNone || kMisuse == Misuse::kShuffleExited) {
        if (t % 32 == 5) {
            out[t] = v;
            return;
        }
        const int from = kMisuse == Misuse::kShuffleExited && t % 32 == 0 ? 5 : t % 32;
        v.x = __shfl_sync(0xffffffffu, v.x, from);
    }
    if (kMisuse == Misuse::kMisalignedCopy) {
        ptx::cp_async_16(smem + t * 16 + 8, in + t);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
    }
    out[t] = v;
}

}  // namespace emulator_tests
