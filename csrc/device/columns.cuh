// Products of x with 16 columns of a 16-bit matrix: what rotations and salient projections are made of. Bound
// by latency: the bytes of the matrix are few, so what counts is that all loads are under way together.
//
// An MMA has the columns, transposed on the fly, as its 16-row operand and tokens as columns. Where the inner
// dimension is long the warps of a block take turns over it and add up in shared memory, in a fixed order.
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

// Bits of columns col and col + 1 of a row, as they are stored; zero past the last column. kPaired: rows have
// an even length, so that two columns are one load.
template <bool kPaired>
ROSAQ_DEVICE uint32_t stored_columns(const SkinnyMatrix& w, int64_t row, int col) {
    const uint16_t* from = w.data + row * w.ld + col;
    if constexpr (kPaired) {
        return col < w.cols ? *reinterpret_cast<const uint32_t*>(from) : 0u;
    } else {
        const uint32_t low = col < w.cols ? from[0] : 0u, high = col + 1 < w.cols ? from[1] : 0u;
        return low | high << 16;
    }
}

// Stored bits in T. A loop of its own behind all loads of a batch: a branch between two loads, and the second
// waits for the first.
template <class T, int kCount>
ROSAQ_DEVICE void convert_pairs(uint32_t (&pairs)[kCount], DType from) {
    if (from == Number<T>::kDType) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        pairs[i] = bits16_in<T>(static_cast<uint16_t>(pairs[i]), from) |
                   static_cast<uint32_t>(bits16_in<T>(static_cast<uint16_t>(pairs[i] >> 16), from)) << 16;
}

// The MMA's 16-row operand of two columns of four rows: a lane has columns 2 * gid and the next of rows 4 *
// tid .. 4 * tid + 3.
ROSAQ_DEVICE void transpose_columns(const uint32_t* rows, uint32_t (&a)[4]) {
    a[0] = ptx::prmt(rows[0], rows[1], 0x5410), a[1] = ptx::prmt(rows[0], rows[1], 0x7632);
    a[2] = ptx::prmt(rows[2], rows[3], 0x5410), a[3] = ptx::prmt(rows[2], rows[3], 0x7632);
}

constexpr int kMaxWarpSteps = kLargestWarpRotation / 16;

// 16 columns of up to 128 rows of a rotation as a warp's MMA operands; all loads are under way together.
template <class T>
struct HeldColumns {
    uint32_t rows[kMaxWarpSteps * 4];

    ROSAQ_DEVICE HeldColumns(const SkinnyMatrix& w, int steps, int col0, const Lane& at) {
        const uint16_t* from = w.data + at.tid * 4 * w.ld + col0 + at.gid * 2;
#pragma unroll
        for (int step = 0; step < kMaxWarpSteps; ++step)
#pragma unroll
            for (int j = 0; j < 4; ++j, from += j == 4 ? 13 * w.ld : w.ld)
                rows[step * 4 + j] = step < steps ? *reinterpret_cast<const uint32_t*>(from) : 0u;
        convert_pairs<T>(rows, w.dtype);
    }
};

// As many inner indices of 8 tokens, the other operand.
template <class T>
struct HeldTokens {
    uint2 b[kMaxWarpSteps];

    // x[token0 .. + 7, x0 .. + 16 steps)
    ROSAQ_DEVICE void load(const T* x, const GemmParams& p, int token0, int64_t x0, int steps,
                           const Lane& at) {
        const int token = token0 + at.gid;
        const T* from = x + static_cast<int64_t>(token) * p.k + x0 + at.tid * 4;
#pragma unroll
        for (int step = 0; step < kMaxWarpSteps; ++step) {
            b[step] = make_uint2(0, 0);
            if (token < p.m && step < steps) b[step] = *reinterpret_cast<const uint2*>(from + step * 16);
        }
    }

    // Column 2 gid + j / 2 of token 2 tid + j % 2 of the product.
    ROSAQ_DEVICE void multiply(const HeldColumns<T>& columns, int steps, float (&sum)[4]) const {
        float odd[4] = {};  // two chains, of half the length
#pragma unroll
        for (int step = 0; step < kMaxWarpSteps; ++step) {
            if (step >= steps) break;
            uint32_t a[4];
            transpose_columns(columns.rows + step * 4, a);
            const uint32_t operand[2] = {b[step].x, b[step].y};
            ptx::mma_m16n8k16<T>(step % 2 == 0 ? sum : odd, a, operand);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += odd[j];
    }
};

// Columns 2 gid and the next of 16, of tokens 2 tid and the next, to t.
template <class T>
ROSAQ_DEVICE void store_columns(const GemmParams& p, T* t, int token0, int col0, const float (&sum)[4],
                                const Lane& at) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int token = token0 + at.tid * 2 + e;
        if (token >= p.m) continue;
        *reinterpret_cast<uint32_t*>(t + static_cast<int64_t>(token) * p.k + col0 + at.gid * 2) =
            pair_of<T>(sum[e], sum[2 + e]);
    }
}

// sum += x[:, x0 + i] * w[i, col0 .. col0 + 15] over 16 i at a time, from begin on in steps of `step` up to
// end. sum[token tile][j]: column 2 gid + j / 2, token 2 tid + j % 2.
template <class Tile, bool kPaired>
ROSAQ_DEVICE void multiply_columns(const typename Tile::T* x, int64_t k, int m, int64_t x0,
                                   const SkinnyMatrix& w, int begin, int end, int step, int col0,
                                   float (&sum)[Tile::kTokenTiles][4], const Lane& at) {
    using T = typename Tile::T;
    constexpr int kAtOnce = Tile::kTokenTiles == 1 ? 4 : Tile::kTokenTiles <= 4 ? 2 : 1;
    for (int first = begin; first < end; first += kAtOnce * step) {
        uint32_t rows[kAtOnce * 4];
        uint2 tokens[kAtOnce][Tile::kTokenTiles];
#pragma unroll
        for (int s = 0; s < kAtOnce; ++s) {
            const int i = first + s * step + at.tid * 4;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                rows[s * 4 + j] = i < end ? stored_columns<kPaired>(w, i + j, col0 + at.gid * 2) : 0u;
#pragma unroll
            for (int t = 0; t < Tile::kTokenTiles; ++t) {
                const int token = t * 8 + at.gid;
                tokens[s][t] = make_uint2(0, 0);
                if (i < end && token < m)
                    tokens[s][t] = *reinterpret_cast<const uint2*>(x + token * k + x0 + i);
            }
        }
        convert_pairs<T>(rows, w.dtype);
#pragma unroll
        for (int s = 0; s < kAtOnce; ++s) {
            uint32_t a[4];
            transpose_columns(rows + s * 4, a);
#pragma unroll
            for (int t = 0; t < Tile::kTokenTiles; ++t) {
                const uint32_t b[2] = {tokens[s][t].x, tokens[s][t].y};
                ptx::mma_m16n8k16<T>(sum[t], a, b);
            }
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
    if (w.ld % 2 == 0)
        multiply_columns<Tile, true>(x, k, m, x0, w, begin + at.warp * 16, end, Tile::kWarps * 16, col0, sum,
                                     at);
    else
        multiply_columns<Tile, false>(x, k, m, x0, w, begin + at.warp * 16, end, Tile::kWarps * 16, col0, sum,
                                      at);
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

}  // namespace rosaq::cuda
