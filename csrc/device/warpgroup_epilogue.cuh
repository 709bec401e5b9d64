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

// This block's sums of a row tile are complete: store y, or leave them for the last of the blocks that share
// it. sums[4 t + j]: row j / 2, token 8 t + 2 tid + j % 2.
template <class Tile>
ROSAQ_DEVICE void finish_rows(const GemmParams& p, int row_tile, const float (&sums)[Tile::kTokens / 2],
                              const ConsumerLane& at) {
    using T = typename Tile::T;
    constexpr int kConsumerThreads = Tile::kConsumers * Tile::kGroupThreads;
    const Contributors contributors(p.schedule, row_tile);
    const bool is_shared = contributors.count > 1;
    const int row = row_tile * kSlabRows + at.row_in_slab();
    float* own = partial_sums<Tile>(p, is_shared ? partial_slot(p.schedule, row_tile) : 0) + at.row_in_slab();
    float bias[2] = {};
    if (!is_shared && row < p.n && p.bias.data != nullptr)
        bias[0] = load_float(p.bias, row), bias[1] = load_float(p.bias, row + 1);
#pragma unroll
    for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = t * 8 + at.tid * 2 + e;
            const float low = sums[4 * t + e], high = sums[4 * t + 2 + e];
            if (token >= p.m) continue;
            if (is_shared) {
                *reinterpret_cast<float2*>(own + token * Tile::kRows) = make_float2(low, high);
            } else if (row < p.n) {  // n is a multiple of 8: two rows are inside or outside together
                const uint32_t first = bits_as<uint16_t>(Number<T>::from_float(low + bias[0]));
                const uint32_t second = bits_as<uint16_t>(Number<T>::from_float(high + bias[1]));
                T* y = static_cast<T*>(p.y) + static_cast<int64_t>(token) * p.n + row;
                *reinterpret_cast<uint32_t*>(y) = first | second << 16;
            }
        }
    if (!is_shared) return;
    ROSAQ_SHARED(s_is_last, int);
    ptx::bar_sync(kConsumerBarrier, kConsumerThreads);
    if (at.thread == 0) {
        int* counter = p.counters + kFirstTileCounter + row_tile;
        s_is_last = ptx::atom_add_acq_rel(counter, 1) == contributors.count - 1;
        if (s_is_last) *counter = 0;  // ready for the next launch
    }
    ptx::bar_sync(kConsumerBarrier, kConsumerThreads);
    if (s_is_last) add_partials<Tile>(p, row_tile, contributors, at.thread, kConsumerThreads);
}

}  // namespace rosaq::cuda
#endif
