// The values of salient directions: the projection s = t * salient_basis beside the main loop, and channels
// of t or parts of s as a K-tile of x.
#pragma once

#include "columns.cuh"

namespace rosaq::cuda {

// s_parts[part] = t[:, part of k] * salient_basis[part of k, :], shared out over the grid.
template <class Tile>
ROSAQ_DEVICE void project(const GemmParams& p, float* s_sums, const Lane& at) {
    using T = typename Tile::T;
    const SkinnyMatrix w{static_cast<const uint16_t*>(p.salient_basis.data), p.r, p.r, p.salient_basis.dtype};
    const int parts = p.schedule.projection_parts, col_tasks = ceil_div(p.r, kTaskCols);
    const int length = round_up(ceil_div(p.k, parts), 16);
    const T* t = static_cast<const T*>(p.t != nullptr ? p.t : p.x);
    for (int task = block_of_grid(p.schedule); task < parts * col_tasks; task += p.schedule.grid) {
        const int part = task / col_tasks, col0 = task % col_tasks * kTaskCols, begin = part * length;
        skinny_product<Tile>(t, p.k, p.m, 0, w, begin, min(begin + length, p.k), col0, s_sums, at);
        for (int i = static_cast<int>(threadIdx.x); i < p.m * kTaskCols; i += Tile::kThreads) {
            const int token = i / kTaskCols, col = i % kTaskCols;
            if (col0 + col < p.r)
                p.s_parts[(static_cast<int64_t>(part) * p.m + token) * p.r + col0 + col] =
                    sum_over_warps<Tile>(s_sums, col, token);
        }
        __syncthreads();
    }
}

// The salient values of direction col, for tokens token0, token0 + step and on; zero where there is none. All
// loads are under way together: none comes behind a store, which might be to the same address for all that
// the compiler knows.
template <class T, int kCount>
ROSAQ_DEVICE void load_salient(const GemmParams& p, int col, int token0, int step, T (&values)[kCount]) {
    const bool has_col = col < p.r;
    if (p.salient_index != nullptr) {
        const int k = has_col ? p.salient_index[col] : 0;
        // The host cannot look at an index without waiting for the device: a bad one shows as NaN.
        const bool exists = k >= 0 && k < p.k;
        const T* from = static_cast<const T*>(p.t != nullptr ? p.t : p.x) + k;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int token = token0 + i * step;
            values[i] = bits_as<T>(exists ? uint16_t{0} : uint16_t{0x7fff});
            if (has_col && exists && token < p.m) values[i] = from[static_cast<int64_t>(token) * p.k];
        }
        return;
    }
    float sums[kCount] = {};
    for (int part = 0; part < p.schedule.projection_parts; ++part) {
        const float* from = p.s_parts + static_cast<int64_t>(part) * p.m * p.r + col;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int token = token0 + i * step;
            if (has_col && token < p.m) sums[i] += __ldcg(from + token * p.r);
        }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Number<T>::from_float(sums[i]);
}

// Those of directions col0 .. col0 + 31 into an x stage, tokens x 32. A lane has a direction.
template <class Tile>
ROSAQ_DEVICE void gather_salient(const GemmParams& p, int col0, unsigned char* x) {
    using T = typename Tile::T;
    static_assert(kSalientCols == kLanes, "a lane has a direction");
    const Lane at(ptx::opaque(static_cast<int>(threadIdx.x)));
    T values[Tile::kTokens / Tile::kWarps];
    load_salient(p, col0 + at.lane, at.warp, Tile::kWarps, values);
#pragma unroll
    for (int i = 0; i < Tile::kTokens / Tile::kWarps; ++i)
        reinterpret_cast<T*>(x + x_chunk_offset(at.warp + i * Tile::kWarps, at.lane / 8))[at.lane % 8] =
            values[i];
}

}  // namespace rosaq::cuda
