// Sums to y. A row tile that several blocks share is added up by whichever of them finishes last, always in
// the same order: repeatable, and nobody ever waits.
#pragma once

#include "load.cuh"
#include "multiply.cuh"

namespace rosaq::cuda {

// y[tokens, 4 rows of the lane] = sum + bias, rounded once.
template <class Tile>
ROSAQ_DEVICE void store_y(const GemmParams& p, int row_tile, const Accumulator<Tile>& acc, const Lane& at) {
    using T = typename Tile::T;
    const WarpRows<Tile> rows(row_tile, at);
    const int row = rows.row0 + at.gid * 4;
    if (row >= p.n) return;  // n is a multiple of 8: four rows are inside or outside together
    float bias[4] = {};
    if (p.bias.data != nullptr) {
#pragma unroll
        for (int j = 0; j < 4; ++j) bias[j] = load_float(p.bias, row + j);
    }
#pragma unroll
    for (int t = 0; t < Tile::kWarpTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = (at.token_tile<Tile>() + t) * 8 + at.tid * 2 + e;
            if (token >= p.m) continue;
            uint32_t bits[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float value = acc.sum[j / 2][t][j % 2 * 2 + e] + bias[j];
                bits[j] = bits_as<uint16_t>(Number<T>::from_float(value));
            }
            *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + static_cast<int64_t>(token) * p.n + row) =
                make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
        }
}

// Calls visit(float4 of the lane's four rows, token tile, e) for every token in range of a partial sum's
// slot.
template <class Tile, class Visit>
ROSAQ_DEVICE void for_each_partial(const GemmParams& p, int slot, const Lane& at, Visit visit) {
    float* base = p.partials + static_cast<int64_t>(slot) * Tile::kTokens * Tile::kRows;
    const int row = at.record<Tile>() * kRecordRows + at.gid * 4;
#pragma unroll
    for (int t = 0; t < Tile::kWarpTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = (at.token_tile<Tile>() + t) * 8 + at.tid * 2 + e;
            if (token < p.m) visit(reinterpret_cast<float4*>(base + token * Tile::kRows + row), t, e);
        }
}

template <class Tile>
ROSAQ_DEVICE void add_partials(const GemmParams& p, int row_tile, const Contributors& c,
                               Accumulator<Tile>& acc, const Lane& at) {
    acc.clear();
    for (int block = c.first; block < c.first + c.count; ++block)
        for_each_partial<Tile>(p, partial_slot(p.schedule, block, row_tile), at,
                               [&](float4* from, int t, int e) {
                                   const float4 v = __ldcg(from);
                                   acc.sum[0][t][e] += v.x, acc.sum[0][t][2 + e] += v.y;
                                   acc.sum[1][t][e] += v.z, acc.sum[1][t][2 + e] += v.w;
                               });
}

// This block's sums of a row tile are complete: store y, or leave them for the last of the blocks that share
// it.
template <class Tile>
ROSAQ_DEVICE void finish_row_tile(const GemmParams& p, int row_tile, Accumulator<Tile>& acc) {
    const Lane at(
        ptx::opaque(static_cast<int>(threadIdx.x)));  // addresses are not to be kept across the main loop
    const Contributors contributors(p.schedule, row_tile);
    if (contributors.count > 1) {
        const int slot = partial_slot(p.schedule, static_cast<int>(blockIdx.x), row_tile);
        for_each_partial<Tile>(p, slot, at, [&](float4* to, int t, int e) {
            *to = make_float4(acc.sum[0][t][e], acc.sum[0][t][2 + e], acc.sum[1][t][e], acc.sum[1][t][2 + e]);
        });
        ROSAQ_SHARED(s_is_last, int);
        __syncthreads();
        if (threadIdx.x == 0) {
            int* counter = p.counters + kFirstTileCounter + row_tile;
            ptx::fence_acq_rel_gpu();
            s_is_last = ptx::atom_add_acq_rel(counter, 1) == contributors.count - 1;
            if (s_is_last) ptx::st_release(counter, 0);  // ready for the next launch
        }
        __syncthreads();
        if (!s_is_last) return;
        add_partials<Tile>(p, row_tile, contributors, acc, at);
    }
    store_y<Tile>(p, row_tile, acc, at);
}

}  // namespace rosaq::cuda
