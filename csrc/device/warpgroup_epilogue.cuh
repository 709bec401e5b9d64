// Sums of the multiplying warpgroups to y, as in epilogue.cuh, while the first one goes on.
#pragma once

#include "epilogue.cuh"
#include "warpgroup_tile.cuh"

#if ROSAQ_SM90A
namespace rosaq::cuda {

constexpr int kConsumerBarrier = 1;  // named barrier of the multiplying warpgroups

// A multiplying thread's place: record and MMA row tile of the slab, then as in Lane.
struct ConsumerLane {
    int thread, row_tile, record, lane, gid, tid;
    ROSAQ_DEVICE ConsumerLane()
        : thread(static_cast<int>(threadIdx.x) - 128),
          row_tile(thread / 128),
          record(thread / kLanes % kSlabRecords),
          lane(thread % kLanes),
          gid(lane / 4),
          tid(lane % 4) {}

    // The first of its two rows.
    ROSAQ_DEVICE int row_in_slab() const { return record * kRecordRows + gid * 4 + row_tile * 2; }
};

// The partial sums of a row tile lie as its threads hold them: [token tile][thread] of four. Of contributor
// number `part` of a row tile.
template <class Tile>
ROSAQ_DEVICE float4* partial_quads(const GemmParams& p, const Contributors& c, int part,
                                   const ConsumerLane& at) {
    // All but the first begin inside the row tile: epilogue.cuh.
    return reinterpret_cast<float4*>(partial_sums<Tile>(p, 2 * (c.first + part) + (part == 0 ? 1 : 0))) +
           at.thread;
}

// Leaves this block's sums for the last of the blocks that share the row tile. That one gets true, and in
// `sums` what all of them left, added up in their order.
template <class Tile>
ROSAQ_DEVICE bool add_up(const GemmParams& p, int row_tile, const Contributors& c,
                         float (&sums)[Tile::kTokens / 2], const ConsumerLane& at) {
    constexpr int kConsumerThreads = Tile::kConsumers * Tile::kGroupThreads;
    const int own = block_of_grid(p.schedule) - c.first;
    float4* const mine = partial_quads<Tile>(p, c, own, at);
#pragma unroll
    for (int t = 0; t < Tile::kTokenTiles; ++t)
        if (t * 8 < p.m)
            mine[t * kConsumerThreads] =
                make_float4(sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3]);
    ROSAQ_SHARED(s_is_last, int);
    ptx::bar_sync(kConsumerBarrier, kConsumerThreads);
    if (at.thread == 0) {
        int* counter = p.counters + kFirstTileCounter + row_tile;
        s_is_last = ptx::atom_add_acq_rel(counter, 1) == c.count - 1;
        if (s_is_last) *counter = 0;  // ready for the next launch
    }
    ptx::bar_sync(kConsumerBarrier, kConsumerThreads);
    if (!s_is_last) return false;

    float total[Tile::kTokens / 2] = {};
    for (int part = 0; part < c.count; ++part) {
        const float4* const from = partial_quads<Tile>(p, c, part, at);
        float4 quads[Tile::kTokenTiles];  // all loads of a part are under way together
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t)
            quads[t] =
                t * 8 < p.m ? __ldcg(from + t * kConsumerThreads) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
            total[4 * t] += quads[t].x, total[4 * t + 1] += quads[t].y;
            total[4 * t + 2] += quads[t].z, total[4 * t + 3] += quads[t].w;
        }
    }
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 2; ++i) sums[i] = total[i];
    return true;
}

// This block's sums of a row tile are complete: y, or this block's part of it. sums[4 t + j]: row j / 2,
// token 8 t + 2 tid + j % 2.
template <class Tile>
ROSAQ_DEVICE void finish_rows(const GemmParams& p, int row_tile, float (&sums)[Tile::kTokens / 2],
                              const ConsumerLane& at) {
    using T = typename Tile::T;
    const Contributors contributors(p.schedule, row_tile);
    if (contributors.count > 1 && !add_up<Tile>(p, row_tile, contributors, sums, at)) return;
    const int row = row_tile * kSlabRows + at.row_in_slab();
    if (row >= p.n) return;  // n is a multiple of 8: two rows are inside or outside together
    float bias[2] = {};
    if (p.bias.data != nullptr) bias[0] = load_float(p.bias, row), bias[1] = load_float(p.bias, row + 1);
#pragma unroll
    for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = t * 8 + at.tid * 2 + e;
            if (token >= p.m) continue;
            T* y = static_cast<T*>(p.y) + static_cast<int64_t>(token) * p.n + row;
            *reinterpret_cast<uint32_t*>(y) =
                pair_of<T>(sums[4 * t + e] + bias[0], sums[4 * t + 2 + e] + bias[1]);
        }
}

}  // namespace rosaq::cuda
#endif
