// A small W4A16 kernel in the style of Marlin, to test the emulator with: y [m, n] = x [m, k] W [n, k]^T on
// cp.async, ldmatrix, lop3, mma.sync and split-K in a fixed order. Each Bug breaks it in one way.
//
// Packed W: per 64 rows and 64 k one record of 128 lanes x 16 bytes. Word s of a lane holds, for k step s of
// 16, the eight codes of its mma fragment: register i in bits 4 i (first of the pair) and 16 + 4 i (second).
// scales [k/64, n].
#pragma once

#include "device/ptx.cuh"

namespace emulator_tests {

using namespace rosaq;

enum class Bug {
    kNone,
    kShortWait,          // one group too many may be pending
    kNoBarrier,          // in the main loop
    kEarlyPrefetch,      // into the slot that is being read
    kNoSplitOrder,       // slices add up as they come
    kRelaxedRelease,     // the lock says done, but releases nothing
    kEarlyRelease,       // the lock is released before all threads have stored
    kStorePastEnd,       // rows m and up are stored too
    kSmallSmem,          // the launch asks for 64 bytes too few
    kMisaligned,         // a 16-byte load from an address that is a multiple of 4
    kNoScales,           // the scales are never copied
    kNoAccumulators,     // the accumulators start undefined
    kDivergentBarrier,   // two halves of the block at different __syncthreads
    kDivergentLdmatrix,  // half a warp in ldmatrix, the other half in mma
    kEarlyExit,          // some threads return before the last barrier
    kNumBugs
};

struct GemmParams {
    const __half* x;  // [m, k]
    const uint4* w;   // packed
    const __half* scales;
    float* partial;  // [m, n], one slice's sum is added after the other's
    int* locks;      // [n / 64], zero
    __half* y;       // [m, n]
    int m, n, k, num_slices;
};

constexpr int kStages = 4, kTileN = 64, kTileK = 64, kTileM = 16, kGemmThreads = 128;
constexpr int kTileWBytes = kTileN * kTileK / 2, kTileXBytes = kTileM * kTileK * 2,
              kTileScaleBytes = kTileN * 2;
constexpr int kStageBytes = kTileWBytes + kTileXBytes + kTileScaleBytes;
constexpr int kGemmSmemBytes = kStages * kStageBytes;

template <Bug kBug>
struct Tile {
    const GemmParams& p;
    unsigned char* smem;
    int first_tile, num_tiles;

    ROSAQ_DEVICE unsigned char* stage(int t) const { return smem + t % kStages * kStageBytes; }
    // 16-byte chunk of row `token`; neighbours in a column of chunks lie in different banks.
    ROSAQ_DEVICE static int x_offset(int token, int chunk) {
        return (token * 8 + (chunk ^ (token & 7))) * 16;
    }

    ROSAQ_DEVICE void fetch(int t) const {
        if (t < num_tiles) {
            const int tile = first_tile + t, tid = threadIdx.x, token = tid / 8, chunk = tid % 8;
            unsigned char* s = stage(t);
            const int64_t record = int64_t{blockIdx.x} * (p.k / kTileK) + tile;
            ptx::cp_async_16_first(s + tid * 16, p.w + record * kGemmThreads + tid);
            const __half* x = p.x + int64_t{token} * p.k + tile * kTileK + chunk * 8;
            ptx::cp_async_16_zfill(s + kTileWBytes + x_offset(token, chunk), x, token < p.m);
            if (tid < kTileScaleBytes / 16 && kBug != Bug::kNoScales)
                ptx::cp_async_16(s + kTileWBytes + kTileXBytes + tid * 16,
                                 p.scales + int64_t{tile} * p.n + blockIdx.x * kTileN + tid * 8);
        }
        ptx::cp_async_commit();
    }

    ROSAQ_DEVICE void multiply(int t, float (&acc)[2][4]) const {
        const unsigned char* s = stage(t);
        const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
        const uint4 codes =
            *reinterpret_cast<const uint4*>(s + tid * 16 + (kBug == Bug::kMisaligned ? 4 : 0));
        const __half* scales = reinterpret_cast<const __half*>(s + kTileWBytes + kTileXBytes) + warp * 16;
        const __half2 scale[2] = {__half2half2(scales[lane / 4]), __half2half2(scales[lane / 4 + 8])};
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        for (int step = 0; step < 4; ++step) {
            uint32_t a[4], b[4];
            const unsigned char* row =
                s + kTileWBytes + x_offset(lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2);
            if (kBug != Bug::kDivergentLdmatrix || lane < 16) ptx::ldmatrix_x4(b, row);
            for (int i = 0; i < 4; ++i) a[i] = dequantise(words[step] >> (4 * i), scale[i % 2]);
            ptx::mma_m16n8k16<__half>(acc[0], a, {b[0], b[1]});
            ptx::mma_m16n8k16<__half>(acc[1], a, {b[2], b[3]});
        }
    }

    // 0x6400 is fp16 1024, where one ulp is 1: the code goes into the mantissa, and 1032 comes off exactly.
    ROSAQ_DEVICE static uint32_t dequantise(uint32_t codes, __half2 scale) {
        const uint32_t biased = ptx::lop3<0xea>(codes, 0x000f000fu, 0x64006400u);
        const __half2 one = __floats2half2_rn(1.0f, 1.0f), offset = __floats2half2_rn(-1032.0f, -1032.0f);
        const __half2 w = __hmul2(ptx::hfma2(reinterpret_cast<const __half2&>(biased), one, offset), scale);
        return reinterpret_cast<const uint32_t&>(w);
    }
};

// Slices add to `partial` in their order; the last one rounds.
template <Bug kBug>
ROSAQ_DEVICE void store(const GemmParams& p, const float (&acc)[2][4]) {
    const int tid = threadIdx.x, lane = tid % 32, slice = blockIdx.y;
    int* lock = p.locks + blockIdx.x;
    if (p.num_slices > 1 && kBug != Bug::kNoSplitOrder) {
        if (tid == 0)
            while (ptx::ld_acquire(lock) != slice) ptx::nanosleep(20);
        if (kBug == Bug::kEarlyExit && tid == 40) return;
        __syncthreads();
    }
    for (int i = 0; i < 8; ++i) {
        const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int row = blockIdx.x * kTileN + tid / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
        if (token >= p.m + (kBug == Bug::kStorePastEnd ? 1 : 0)) continue;
        const int64_t at = int64_t{token} * p.n + row;
        const float sum = acc[i / 4][i % 4] + (slice > 0 ? p.partial[at] : 0.0f);
        if (slice < p.num_slices - 1)
            p.partial[at] = sum;
        else
            p.y[at] = __float2half_rn(sum);
    }
    if (p.num_slices > 1) {
        if (kBug != Bug::kEarlyRelease) __syncthreads();
        if (tid == 0) {
            if (kBug == Bug::kRelaxedRelease)
                atomicExch(lock, slice + 1);
            else
                ptx::st_release(lock, slice + 1);
        }
    }
}

template <Bug kBug>
__global__ void __launch_bounds__(kGemmThreads) gemm_kernel(const GemmParams p) {
    ROSAQ_DYN_SMEM(smem);
    const int tiles_per_slice = p.k / kTileK / p.num_slices;
    const Tile<kBug> tile{p, smem, static_cast<int>(blockIdx.y) * tiles_per_slice, tiles_per_slice};
    float acc[2][4];
    if (kBug != Bug::kNoAccumulators)
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.0f;
    for (int t = 0; t < kStages - 1; ++t) tile.fetch(t);
    for (int t = 0; t < tiles_per_slice; ++t) {
        ptx::cp_async_wait<kBug == Bug::kShortWait ? kStages - 1 : kStages - 2>();
        if (kBug == Bug::kDivergentBarrier && threadIdx.x < 64)
            __syncthreads();
        else if (kBug != Bug::kNoBarrier)
            __syncthreads();
        if (kBug == Bug::kEarlyPrefetch)
            tile.fetch(t + kStages);
        else
            tile.fetch(t + kStages - 1);
        tile.multiply(t, acc);
    }
    ptx::cp_async_wait<0>();
    store<kBug>(p, acc);
}

}  // namespace emulator_tests
