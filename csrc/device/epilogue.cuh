// Sums to y. A row tile that several blocks share is added up by whichever of them finishes last, always in
// the same order: repeatable, and nobody ever waits.
#pragma once

#include "load.cuh"
#include "multiply_halves.cuh"

namespace rosaq::cuda {

// Bias of rows row .. row + 3.
ROSAQ_DEVICE void load_bias(const GemmParams& p, int row, float (&bias)[4]) {
    if (p.bias.data == nullptr) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) bias[j] = load_float(p.bias, row + j);
}

// y[token, row .. row + 3] = values + bias, rounded once.
template <class T>
ROSAQ_DEVICE void store_rows(const GemmParams& p, int token, int row, const float (&values)[4],
                             const float (&bias)[4]) {
    *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + static_cast<int64_t>(token) * p.n + row) =
        make_uint2(pair_of<T>(values[0] + bias[0], values[1] + bias[1]),
                   pair_of<T>(values[2] + bias[2], values[3] + bias[3]));
}

// y of a row tile that nobody else has a part of.
template <class Tile>
ROSAQ_DEVICE void store_y(const GemmParams& p, int row_tile, const Accumulator<Tile::kWarpTiles>& acc,
                          const Lane& at) {
    const int row = first_row<Tile>(row_tile, at) + at.gid * 4;
    if (row >= p.n) return;  // n is a multiple of 8: four rows are inside or outside together
    float bias[4] = {};
    load_bias(p, row, bias);
#pragma unroll
    for (int t = 0; t < Tile::kWarpTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = (at.token_tile<Tile>() + t) * 8 + at.tid * 2 + e;
            if (token >= p.m) continue;
            const float values[4] = {acc.sum[0][t][e], acc.sum[0][t][2 + e], acc.sum[1][t][e],
                                     acc.sum[1][t][2 + e]};
            store_rows<typename Tile::T>(p, token, row, values, bias);
        }
}

// Calls visit(offset of the lane's four rows in a slot of partial sums, token tile, e) for every token in
// range.
template <class Tile, class Visit>
ROSAQ_DEVICE void for_each_partial(const GemmParams& p, const Lane& at, Visit visit) {
    const int row = at.record<Tile>() * kRecordRows + at.gid * 4;
#pragma unroll
    for (int t = 0; t < Tile::kWarpTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = (at.token_tile<Tile>() + t) * 8 + at.tid * 2 + e;
            if (token < p.m) visit(token * Tile::kRows + row, t, e);
        }
}

template <class Tile>
ROSAQ_DEVICE float* partial_sums(const GemmParams& p, int slot) {
    return p.partials + static_cast<int64_t>(slot) * Tile::kTokens * Tile::kRows;
}

// y of a row tile = what its contributors left + bias. Shared out over the block's threads anew, four rows of
// a token each: with one token only a few lanes have sums in their registers.
template <class Tile>
ROSAQ_DEVICE void add_partials(const GemmParams& p, int row_tile, const Contributors& c) {
    using T = typename Tile::T;
    constexpr int kQuads = Tile::kRows / 4, kAtOnce = 8;
    constexpr int64_t kNext = int64_t{2} * Tile::kTokens * Tile::kRows;
    // All but the first begin inside the row tile, so their slots are two apart.
    const float* first = partial_sums<Tile>(p, 2 * c.first + 1);
    const float* others = partial_sums<Tile>(p, 2 * c.first);
    for (int i = static_cast<int>(threadIdx.x); i < p.m * kQuads; i += Tile::kThreads) {
        const int token = i / kQuads, row = row_tile * Tile::kRows + i % kQuads * 4;
        if (row >= p.n) continue;  // n is a multiple of 8: four rows are inside or outside together
        float4 sum = __ldcg(reinterpret_cast<const float4*>(first) + i);
        for (int at = 1; at < c.count; at += kAtOnce) {
            // Several loads are under way at a time; the order of the sum stays.
            float4 part[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
                part[j] = at + j < c.count
                              ? __ldcg(reinterpret_cast<const float4*>(others + (at + j) * kNext) + i)
                              : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
                sum.x += part[j].x, sum.y += part[j].y, sum.z += part[j].z, sum.w += part[j].w;
        }
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        float bias[4] = {};
        load_bias(p, row, bias);
        store_rows<T>(p, token, row, values, bias);
    }
}

// This block's sums of a row tile are complete: store y, or leave them for the last of the blocks that share
// it. `shared`: an x stage that nobody reads any more once all threads
// are here.
template <class Tile>
ROSAQ_DEVICE void finish_row_tile(const GemmParams& p, int row_tile,
                                  const Accumulator<Tile::kTokenTiles>& sums, unsigned char* shared) {
    const Accumulator<Tile::kWarpTiles> acc = add_halves<Tile>(sums, shared);
    const Lane at(
        ptx::opaque(static_cast<int>(threadIdx.x)));  // addresses are not to be kept across the main loop
    const Contributors contributors(p.schedule, row_tile);
    if (contributors.count > 1) {
        float* own = partial_sums<Tile>(p, partial_slot(p.schedule, row_tile));
        for_each_partial<Tile>(p, at, [&](int offset, int t, int e) {
            *reinterpret_cast<float4*>(own + offset) =
                make_float4(acc.sum[0][t][e], acc.sum[0][t][2 + e], acc.sum[1][t][e], acc.sum[1][t][2 + e]);
        });
        ROSAQ_SHARED(s_is_last, int);
        __syncthreads();
        if (threadIdx.x == 0) {
            int* counter = p.counters + kFirstTileCounter + row_tile;
            s_is_last = ptx::atom_add_acq_rel(counter, 1) == contributors.count - 1;
            if (s_is_last) *counter = 0;  // ready for the next launch
        }
        __syncthreads();
        if (s_is_last) add_partials<Tile>(p, row_tile, contributors);
        return;
    }
    store_y<Tile>(p, row_tile, acc, at);
}

}  // namespace rosaq::cuda
