// y[m,n] = t W^T + s C^T + bias for 17 to 64 tokens on sm_90a, in one launch: fused_gemm.cuh with warpgroups.
//
// Bound by the bytes of W, if decoding and multiplying keep up: tensor cores work on their own here, on
// weights from registers and x from shared memory. Nobody in the main loop waits for all of the block.
#pragma once

#include "../device/rotate.cuh"
#include "../device/salient.cuh"
#include "../device/warpgroup_load.cuh"
#include "../device/warpgroup_multiply.cuh"

namespace rosaq::cuda {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) warpgroup_gemm_kernel(const GemmParams p) {
#if ROSAQ_SM90A
    ROSAQ_DYN_SMEM(smem);
    const Schedule& schedule = p.schedule;
    const int list = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.x);
    const int first = first_tile_of(schedule, list, part);
    const int tiles = first_tile_of(schedule, list, part + 1) - first;
    const Cursor start(schedule, list, first);
    const StageRing<Tile> ring(smem);
    if (threadIdx.x < kLanes) {
        if (threadIdx.x == 0) ring.init();
        __syncwarp();
        Loader<Tile>::start_weights(p, ring, start, tiles);
    }
    __syncthreads();

    GridBarrier grid(p.counters, schedule.grid);
    auto* s_sums = reinterpret_cast<float*>(ring.x(0));  // free until x is brought
    if (p.rotation_size != 0) {
        rotate<Tile>(p, s_sums, Lane());
        grid.arrive();
        grid.wait();
    }
    if (schedule.projection_parts != 0) {
        project<Tile>(p, s_sums, Lane());
        grid.arrive();
        __syncthreads();
    }

    // The same for all lanes, which the compiler has to see before it lets products overlap.
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / Tile::kGroupThreads, 0);
    if (group == 0) {
        ptx::fewer_registers<Tile::kLoaderRegisters>();
        Loader<Tile>(p, ring, grid, start).run(tiles);
        return;
    }
    ptx::more_registers<Tile::kConsumerRegisters>();
    if (p.groups == 1)
        Multiplier<Tile, Groups::kWholeRow>(p, ring).run(start, tiles);
    else if (p.groups_per_block == 1)
        Multiplier<Tile, Groups::kOf128>(p, ring).run(start, tiles);
    else if (p.groups_per_block == 2)
        Multiplier<Tile, Groups::kOf64>(p, ring).run(start, tiles);
    else
        Multiplier<Tile, Groups::kOf32>(p, ring).run(start, tiles);
#else
    __trap();  // the host asks for it on sm_90 only
#endif
}

}  // namespace rosaq::cuda
