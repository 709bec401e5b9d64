// t = x * blockdiag(rotation), before the main loop.
#pragma once

#include "columns.cuh"

namespace rosaq::cuda {

// The block of a rotation that makes t's columns around col0.
ROSAQ_DEVICE SkinnyMatrix rotation_around(const GemmParams& p, int col0) {
    const int64_t b = p.rotation_size, block = p.rotation_blocks == 1 ? 0 : col0 / p.rotation_size;
    const auto* first = static_cast<const uint16_t*>(p.rotation.data);
    return {first + block * b * b, b, p.rotation_size, p.rotation.dtype};
}

// 16 columns of t of all tokens, by one warp.
template <class Tile>
ROSAQ_DEVICE void rotate_columns(const GemmParams& p, int col0, const Lane& at) {
    using T = typename Tile::T;
    const auto* x = static_cast<const T*>(p.x);
    auto* t = static_cast<T*>(p.t);
    const int b = p.rotation_size, col = col0 % b;
    const int64_t x0 = col0 - col;
    if constexpr (Tile::kTokenTiles > 2) {
        const int steps = b / 16;
        const HeldColumns<T> columns(rotation_around(p, col0), steps, col, at);
#pragma unroll 2
        for (int tile = 0; tile < Tile::kTokenTiles; ++tile) {
            HeldTokens<T> tokens;
            tokens.load(x, p, tile * 8, x0, steps, at);
            float sum[4] = {};
            tokens.multiply(columns, steps, sum);
            store_columns(p, t, tile * 8, col0, sum, at);
        }
    } else {
        // A part of the matrix at a time: registers are scarce beside the streams that have started.
        float sum[Tile::kTokenTiles][4] = {};
        multiply_columns<Tile, true>(x, p.k, p.m, x0, rotation_around(p, col0), 0, b, 16, col, sum, at);
#pragma unroll
        for (int tile = 0; tile < Tile::kTokenTiles; ++tile)
            store_columns(p, t, tile * 8, col0, sum[tile], at);
    }
}

// t = x * blockdiag(rotation), shared out over the grid.
template <class Tile>
ROSAQ_DEVICE void rotate(const GemmParams& p, float* s_sums, const Lane& at) {
    using T = typename Tile::T;
    const int b = p.rotation_size, tasks = p.k / kTaskCols;
    if (b <= kLargestWarpRotation) {
        // Neighbouring tasks to different blocks, so that all multiprocessors load.
        for (int task = at.warp * p.schedule.grid + block_of_grid(p.schedule); task < tasks;
             task += p.schedule.grid * Tile::kWarps)
            rotate_columns<Tile>(p, task * kTaskCols, at);
        return;
    }
    const auto* x = static_cast<const T*>(p.x);
    auto* t = static_cast<T*>(p.t);
    for (int task = block_of_grid(p.schedule); task < tasks; task += p.schedule.grid) {
        const int col0 = task * kTaskCols, block = col0 / b;
        skinny_product<Tile>(x, p.k, p.m, static_cast<int64_t>(block) * b, rotation_around(p, col0), 0, b,
                             col0 - block * b, s_sums, at);
        for (int i = static_cast<int>(threadIdx.x); i < p.m * kTaskCols; i += Tile::kThreads) {
            const int token = i / kTaskCols, col = i % kTaskCols;
            t[static_cast<int64_t>(token) * p.k + col0 + col] =
                Number<T>::from_float(sum_over_warps<Tile>(s_sums, col, token));
        }
        __syncthreads();
    }
}

}  // namespace rosaq::cuda
