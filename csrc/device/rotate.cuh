// Products of x with a few 16-bit columns, before and beside the main loop: t = x * blockdiag(rotation), and
// the salient projection s = t * salient_basis. Bound by the bytes of the matrix, which is read once.
//
// A task is 16 columns: an MMA with the matrix, transposed on the fly, as its 16-row operand and tokens as
// columns. Where the inner dimension is long the warps of a block take turns over it and add up in shared
// memory, in a fixed order.
#pragma once

#include "schedule.cuh"
#include "tile.cuh"

namespace rosaq::cuda {

constexpr int kTaskCols = 16;

// A row-major matrix [.., ld] of 16-bit numbers and the columns that exist.
struct SkinnyMatrix {
    const uint16_t* data;
    int64_t ld;
    int cols;
    DType dtype;
};

// Columns col and col + 1 of a row, in T; zero past the last column.
template <class T>
ROSAQ_DEVICE uint32_t two_columns(const SkinnyMatrix& w, int64_t row, int col) {
    const uint16_t* from = w.data + row * w.ld + col;
    uint32_t pair = 0;
    if (w.ld % 2 == 0 && col + 1 < w.cols) {
        pair = *reinterpret_cast<const uint32_t*>(from);
    } else {
        if (col < w.cols) pair = from[0];
        if (col + 1 < w.cols) pair |= static_cast<uint32_t>(from[1]) << 16;
    }
    if (w.dtype == Number<T>::kDType) return pair;
    return bits16_in<T>(static_cast<uint16_t>(pair), w.dtype) |
           static_cast<uint32_t>(bits16_in<T>(static_cast<uint16_t>(pair >> 16), w.dtype)) << 16;
}

// sum += x[:, x0 + i] * w[i, col0 .. col0 + 15] over 16 i at a time, from begin on in steps of `step` up to
// end. sum[token tile][j]: column 2 gid + j / 2, token 2 tid + j % 2.
template <class Tile>
ROSAQ_DEVICE void multiply_columns(const typename Tile::T* x, int64_t k, int m, int64_t x0,
                                   const SkinnyMatrix& w, int begin, int end, int step, int col0,
                                   float (&sum)[Tile::kTokenTiles][4], const Lane& at) {
    using T = typename Tile::T;
    for (int i = begin; i < end; i += step) {
        // A lane holds columns 2 * gid and the next, and inner indices 4 * tid .. 4 * tid + 3.
        uint32_t rows[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) rows[j] = two_columns<T>(w, i + at.tid * 4 + j, col0 + at.gid * 2);
        const uint32_t a[4] = {ptx::prmt(rows[0], rows[1], 0x5410), ptx::prmt(rows[0], rows[1], 0x7632),
                               ptx::prmt(rows[2], rows[3], 0x5410), ptx::prmt(rows[2], rows[3], 0x7632)};
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
            const int token = t * 8 + at.gid;
            uint2 v = make_uint2(0, 0);
            if (token < m) v = *reinterpret_cast<const uint2*>(x + token * k + x0 + i + at.tid * 4);
            const uint32_t b[2] = {v.x, v.y};
            ptx::mma_m16n8k16<T>(sum[t], a, b);
        }
    }
}

// x[:, x0 + i] * w[i, col0 .. col0 + 15] over i in [begin, end), a multiple of 16, into the block's shared
// memory as float [warp][16 columns][tokens]; ends with a barrier.
template <class Tile>
ROSAQ_DEVICE void skinny_product(const typename Tile::T* x, int64_t k, int m, int64_t x0,
                                 const SkinnyMatrix& w, int begin, int end, int col0, float* s_sums,
                                 const Lane& at) {
    float sum[Tile::kTokenTiles][4] = {};
    multiply_columns<Tile>(x, k, m, x0, w, begin + at.warp * 16, end, Tile::kWarps * 16, col0, sum, at);
    float* own = s_sums + at.warp * kTaskCols * Tile::kTokens;
#pragma unroll
    for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int col = at.gid * 2 + j / 2, token = t * 8 + at.tid * 2 + j % 2;
            own[col * Tile::kTokens + token] = sum[t][j];
        }
    __syncthreads();
}

template <class Tile>
ROSAQ_DEVICE float sum_over_warps(const float* s_sums, int col, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp)
        sum += s_sums[(warp * kTaskCols + col) * Tile::kTokens + token];
    return sum;
}

// A block of a rotation up to this size is a task of one warp: sharing it out over a block's would have most
// of them wait.
constexpr int kLargestWarpRotation = 128;

// t = x * blockdiag(rotation), shared out over the grid.
template <class Tile>
ROSAQ_DEVICE void rotate(const GemmParams& p, float* s_sums, const Lane& at) {
    using T = typename Tile::T;
    const int b = p.rotation_size, tasks = p.k / kTaskCols;
    const auto* x = static_cast<const T*>(p.x);
    auto* t = static_cast<T*>(p.t);
    const auto matrix_of = [&](int block) {
        const int64_t first = p.rotation_blocks == 1 ? 0 : static_cast<int64_t>(block) * b * b;
        return SkinnyMatrix{static_cast<const uint16_t*>(p.rotation.data) + first, b, b, p.rotation.dtype};
    };
    if (b <= kLargestWarpRotation) {
        for (int task = block_of_grid(p.schedule) * Tile::kWarps + at.warp; task < tasks;
             task += p.schedule.grid * Tile::kWarps) {
            const int col0 = task * kTaskCols, block = col0 / b;
            float sum[Tile::kTokenTiles][4] = {};
            multiply_columns<Tile>(x, p.k, p.m, static_cast<int64_t>(block) * b, matrix_of(block), 0, b, 16,
                                   col0 - block * b, sum, at);
#pragma unroll
            for (int tile = 0; tile < Tile::kTokenTiles; ++tile)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int token = tile * 8 + at.tid * 2 + e;
                    if (token >= p.m) continue;
                    const uint32_t low = bits_as<uint16_t>(Number<T>::from_float(sum[tile][e]));
                    const uint32_t high = bits_as<uint16_t>(Number<T>::from_float(sum[tile][2 + e]));
                    T* to = t + static_cast<int64_t>(token) * p.k + col0 + at.gid * 2;
                    *reinterpret_cast<uint32_t*>(to) = low | high << 16;
                }
        }
        return;
    }
    for (int task = block_of_grid(p.schedule); task < tasks; task += p.schedule.grid) {
        const int col0 = task * kTaskCols, block = col0 / b;
        skinny_product<Tile>(x, p.k, p.m, static_cast<int64_t>(block) * b, matrix_of(block), 0, b,
                             col0 - block * b, s_sums, at);
        for (int i = static_cast<int>(threadIdx.x); i < p.m * kTaskCols; i += Tile::kThreads) {
            const int token = i / kTaskCols, col = i % kTaskCols;
            t[static_cast<int64_t>(token) * p.k + col0 + col] =
                Number<T>::from_float(sum_over_warps<Tile>(s_sums, col, token));
        }
        __syncthreads();
    }
}

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

// The salient values of directions col0 .. col0 + 31 into an x stage, tokens x 32. A thread has one
// direction and every so many tokens, so its loads do not wait for each other.
template <class Tile>
ROSAQ_DEVICE void gather_salient(const GemmParams& p, int col0, unsigned char* x) {
    using T = typename Tile::T;
    const Lane at(ptx::opaque(static_cast<int>(threadIdx.x)));
    static_assert(kSalientCols == kLanes, "a lane has a direction");
    const bool has_col = col0 + at.lane < p.r;
    const T* t = static_cast<const T*>(p.t != nullptr ? p.t : p.x);
    // The host cannot look at an index without waiting for the device: a bad one shows as NaN.
    const int k = has_col && p.salient_index != nullptr ? p.salient_index[col0 + at.lane] : 0;
    const bool exists = k >= 0 && k < p.k;
#pragma unroll
    for (int i = 0; i < Tile::kTokens / Tile::kWarps; ++i) {
        const int token = at.warp + i * Tile::kWarps;
        T value = Number<T>::from_float(0.0f);
        if (token < p.m && has_col) {
            if (p.salient_index != nullptr) {
                value = exists ? t[static_cast<int64_t>(token) * p.k + k] : bits_as<T>(uint16_t{0x7fff});
            } else {
                float sum = 0.0f;
                for (int part = 0; part < p.schedule.projection_parts; ++part)
                    sum +=
                        __ldcg(p.s_parts + (static_cast<int64_t>(part) * p.m + token) * p.r + col0 + at.lane);
                value = Number<T>::from_float(sum);
            }
        }
        reinterpret_cast<T*>(x + x_chunk_offset(token, at.lane / 8))[at.lane % 8] = value;
    }
}

}  // namespace rosaq::cuda
