// y[m,n] = t W^T + s C^T + bias for up to 64 tokens, in one launch (DESIGN.md 1).
//
// Bound by the bytes of W: weights flow through a ring of shared memory without ever waiting for x. Low-bit
// K-tiles and the 16-bit ones of the salient directions take turns in the same ring and add into the same
// registers. A rotation needs all of x before any of t, so the ring is filled before the grid meets; the
// salient projection is needed by the last K-tiles only, so the grid arrives early and waits late.
#pragma once

#include "../device/barrier.cuh"
#include "../device/epilogue.cuh"
#include "../device/few_directions.cuh"
#include "../device/load.cuh"
#include "../device/multiply_halves.cuh"
#include "../device/rotate.cuh"
#include "../device/salient.cuh"

namespace rosaq::cuda {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) fused_gemm_kernel(const GemmParams p) {
    ROSAQ_DYN_SMEM(smem);
    const Lane at;
    const Schedule& schedule = p.schedule;
    const int list = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.x);
    const int first = first_tile_of(schedule, list, part);
    const int tiles = first_tile_of(schedule, list, part + 1) - first;
    constexpr int kAhead = Tile::kStages - 1;

    Cursor now(schedule, list, first), ahead = now;
    WeightStream<Tile> weights(p, now, at);
    for (int i = 0; i < kAhead; ++i) {
        if (i < tiles) weights.fetch(ahead, weight_stage<Tile>(smem, i, at), at);
        ahead.advance(schedule);
    }

    GridBarrier grid(p.counters, schedule.grid);
    auto* s_sums = reinterpret_cast<float*>(x_stage<Tile>(smem, 0));  // free until x is fetched
    if (p.rotation_size != 0) {
        rotate<Tile>(p, s_sums, at);
        grid.arrive();
        grid.wait();
    }
    const bool projects = schedule.projection_parts != 0;
    if (projects) {
        project<Tile>(p, s_sums, at);
        grid.arrive();
    }

    XStream<Tile> x(p, now);
    ahead = now;
    for (int i = 0; i < kAhead; ++i) {
        if (i < tiles) x.fetch(ahead, x_stage<Tile>(smem, i));
        ptx::cp_async_commit();
        ahead.advance(schedule);
    }

    Accumulator<Tile::kTokenTiles> acc;
    acc.clear();
    float s_part[4] = {};  // of projected slices
    int stage = 0;
    for (int left = tiles; left > 0; --left) {
        uint32_t basis[4];
        if constexpr (Tile::kProjectsSlices) {
            static_assert(Tile::kWarps == kBlockK / 32, "a warp projects 32 k of every K-tile");
            if (p.projects_slices) load_basis(p, now.k_tile, at.warp, basis, at);
        }
        ptx::cp_async_wait<kAhead - 1>();
        __syncthreads();
        // With many tokens every register counts: where a lane is is then found anew.
        const Lane here(Tile::kHalves == 1 ? at : Lane(ptx::opaque(static_cast<int>(threadIdx.x))));
        if (left > kAhead) {
            const int free_stage = stage == 0 ? kAhead : stage - 1;
            weights.fetch(ahead, weight_stage<Tile>(smem, free_stage, here), here);
            x.fetch(ahead, x_stage<Tile>(smem, free_stage));
            ahead.advance(schedule);
        }
        ptx::cp_async_commit();

        unsigned char* const w_tile = weight_stage<Tile>(smem, stage, here);
        unsigned char* const x_tile = x_stage<Tile>(smem, stage);
        if (now.k_tile < p.k_blocks) {
            if constexpr (Tile::kProjectsSlices)
                if (p.projects_slices)
                    project_part<typename Tile::T, Tile::kTokenTiles>(p, here.warp, StagedX{x_tile, here},
                                                                      basis, s_part);
            multiply_block<Tile>(p, w_tile, x_tile, acc, here);
        } else {
            if (projects) grid.wait();  // at the first such tile; later ones find it done
            gather_salient<Tile>(p, (now.k_tile - p.k_blocks) * kSalientCols, x_tile);
            __syncthreads();
            multiply_salient<Tile>(p, w_tile, x_tile, acc);
        }
        if (now.k_tile == schedule.k_tiles - 1 || left == 1) {
            if constexpr (Tile::kProjectsSlices)
                if (p.projects_slices)
                    add_directions<Tile>(p, now.row_tile, s_part, acc, x_stage<Tile>(smem, stage), here);
            finish_row_tile<Tile>(p, now.row_tile, acc, x_stage<Tile>(smem, stage));
            acc.clear();
        }
        now.advance(schedule);
        stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
}

}  // namespace rosaq::cuda
