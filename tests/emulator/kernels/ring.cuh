// What the GEMM does not use: a ring of bulk copies on mbarriers with a producer warp and consumer warps,
// named barriers, shuffles, votes, ldmatrix.trans, bf16, static shared memory, a grid barrier, fences with
// relaxed atomics.
#pragma once

#include "device/ptx.cuh"

namespace emulator_tests {

using namespace rosaq;

enum class RingBug { kNone, kNoFullWait, kNoEmptyWait, kNoNamedBarrier, kBadMask, kNumBugs };

constexpr int kSlots = 3, kRowBytes = 512, kConsumers = 64, kRingThreads = kConsumers + 32;

// sums [rows] = sum over the 128 floats of each row of x [rows, 128]; one block.
template <RingBug kBug>
__global__ void __launch_bounds__(kRingThreads) ring_kernel(const float* x, float* sums, int rows) {
    ROSAQ_DYN_SMEM(smem);
    ROSAQ_SHARED(full, uint64_t[kSlots]);
    ROSAQ_SHARED(empty, uint64_t[kSlots]);
    ROSAQ_SHARED(s_part, float[2]);
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    if (tid == 0) {
        for (int i = 0; i < kSlots; ++i) {
            ptx::mbarrier_init(&full[i], 1);
            ptx::mbarrier_init(&empty[i], kConsumers);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (tid >= kConsumers) {
        for (int row = 0; row < rows && lane == 0; ++row) {
            const int slot = row % kSlots, round = row / kSlots;
            if (kBug != RingBug::kNoEmptyWait)
                while (round > 0 && !ptx::mbarrier_try_wait_parity(&empty[slot], (round - 1) & 1)) {
                }
            ptx::mbarrier_arrive_expect_tx(&full[slot], kRowBytes);
            ptx::bulk_copy_g2s(smem + slot * kRowBytes, x + row * 128, kRowBytes, &full[slot]);
        }
        return;
    }
    for (int row = 0; row < rows; ++row) {
        const int slot = row % kSlots, round = row / kSlots;
        if (kBug != RingBug::kNoFullWait)
            while (!ptx::mbarrier_try_wait_parity(&full[slot], round & 1)) {
            }
        const float* values = reinterpret_cast<const float*>(smem + slot * kRowBytes);
        float sum = values[tid] + values[tid + kConsumers];
        ptx::mbarrier_arrive(&empty[slot]);
        const uint32_t mask = kBug == RingBug::kBadMask && lane == 3 ? 0x7fffffffu : 0xffffffffu;
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
        if (lane == 0) s_part[warp] = sum;
        if (kBug != RingBug::kNoNamedBarrier) ptx::bar_sync(1, kConsumers);
        if (tid == 0) sums[row] = s_part[0] + s_part[1];
        ptx::bar_sync(2, kConsumers);
    }
}

// Every block writes its own part of `stage`, all meet, and every block reads all parts: out [blocks] = sum
// of stage. The counter only grows, so a launch needs no clean-up after the one before.
template <bool kAcquire>
__global__ void grid_barrier_kernel(int* counter, int* stage, int* out) {
    const int blocks = gridDim.x, block = blockIdx.x, tid = threadIdx.x;
    if (tid == 0) stage[block] = block + 1;
    __syncthreads();
    if (tid == 0) {
        const int goal = (ptx::atom_add_acq_rel(counter, 1) / blocks + 1) * blocks;
        while ((kAcquire ? ptx::ld_acquire(counter) : atomicAdd(counter, 0)) < goal) ptx::nanosleep(50);
    }
    __syncthreads();
    int sum = 0;
    for (int i = tid; i < blocks; i += blockDim.x) sum += stage[i];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (tid == 0) out[block] = sum;
}

// The last block to arrive adds up what the others left: fences around a relaxed counter.
template <bool kFence>
__global__ void last_block_kernel(int* counter, int* parts, int* out) {
    ROSAQ_SHARED(s_is_last, int);
    parts[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) {
        if (kFence) __threadfence();
        s_is_last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
        if (kFence) __threadfence();
    }
    __syncthreads();
    if (s_is_last != 0 && threadIdx.x == 0) {
        int sum = 0;
        for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += parts[i];
        *out = sum;
    }
}

// Block 0 waits for a flag that the last block sets.
static __global__ void forward_wait_kernel(int* flag) {
    if (blockIdx.x == 0)
        while (ptx::ld_acquire(flag) == 0) ptx::nanosleep(50);
    if (blockIdx.x == gridDim.x - 1) ptx::st_release(flag, 1);
}

// d [16, 8] = a [16, 16] b [16, 8] in bf16, b loaded transposed; votes and masks that do not cover the warp
// on the way.
static __global__ void bf16_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
    ROSAQ_SHARED(s_a, __nv_bfloat16[16 * 16]);
    ROSAQ_SHARED(s_b, __nv_bfloat16[16 * 8]);
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) s_a[i] = a[i];
    for (int i = lane; i < 128; i += 32) s_b[i] = b[i];
    __syncwarp();
    uint32_t fa[4], fb[2];
    ptx::ldmatrix_x4(fa, s_a + (lane % 16) * 16 + lane / 16 * 8);
    ptx::ldmatrix_x2_trans(fb, s_b + (lane % 16) * 8);
    float sum[4] = {};
    ptx::mma_m16n8k16<__nv_bfloat16>(sum, fa, fb);
    const bool is_lower = lane < 16;
    const uint32_t half = is_lower ? 0x0000ffffu : 0xffff0000u;
    int from = 0;
    if (is_lower)
        from = __shfl_sync(half, lane, 15);
    else
        from = __shfl_sync(half, lane, 16);
    const bool ok = from == (is_lower ? 15 : 16) && __ballot_sync(0xffffffffu, is_lower) == 0xffffu &&
                    __all_sync(0xffffffffu, lane < 32) && !__any_sync(half, lane > 31) &&
                    __shfl_up_sync(0xffffffffu, lane, 1, 8) == (lane % 8 == 0 ? lane : lane - 1);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = ok ? sum[i] : -1e30f;
}

// Shared memory counts of values below 8, by atomics; then a shift or an index that goes too far, if asked.
static __global__ void count_kernel(const int* values, int n, int* counts, int shift, int index) {
    ROSAQ_SHARED(s_counts, int[8]);
    if (threadIdx.x < 8) s_counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&s_counts[values[i]], 1);
    __syncthreads();
    const int local[4] = {1 << shift, 1, 1, 1};
    if (threadIdx.x < 8) counts[threadIdx.x] = s_counts[threadIdx.x] * local[index];
}

}  // namespace emulator_tests
