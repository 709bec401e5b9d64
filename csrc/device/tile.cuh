// One thread block's share of the work, and where things lie in its shared memory.
//
// - weights, kStages x kWeightBytes: per warp its record, or its rows of salient_weight; then scales, zeros;
// - x, kStages x kXBytes: tokens x 128 k, or tokens x 32 salient values.
#pragma once

#include "number.cuh"

namespace rosaq::cuda {

template <class T_, int kBits_, bool kSymmetric_, int kTokenTiles_>
struct Tile {
    using T = T_;
    static constexpr int kBits = kBits_, kTokenTiles = kTokenTiles_;
    static constexpr bool kSymmetric = kSymmetric_;  // false: zero points where the blob has them
    // The sums of more than 32 tokens are all that the registers of a warp hold: two warps share a record,
    // each for half of its k, so that no weight is decoded twice. In the end each brings half of the tokens
    // to y.
    static constexpr int kHalves = kTokenTiles <= 4 ? 1 : 2;
    static constexpr int kRowWarps = 4, kWarps = kRowWarps * kHalves;
    static constexpr int kWarpTiles = kTokenTiles / kHalves;  // of 8 tokens, that a warp brings to y
    static constexpr int kThreads = kWarps * kLanes, kRows = kRowWarps * kRecordRows,
                         kTokens = 8 * kTokenTiles;
    static_assert(kRows == kSlabRows, "a row tile is a slab of the packed weight");
    static constexpr int kStages = kTokenTiles <= 2 || kHalves == 2 ? 3 : 4;
    // Blocks for which the registers of a multiprocessor have to do.
    static constexpr int kBlocksPerSm = kTokenTiles <= 2 ? 4 : kTokenTiles == 4 ? 3 : 1;

    static constexpr int kMaxGroups = kBlockK / 32;  // of one block of k
    static constexpr int kRecordBytes = kLanes * kLoadBytes * kBits;
    static constexpr int kScaleBytes = kMaxGroups * kRecordRows * 2;
    static constexpr int kZeroBytes = kSymmetric ? 0 : kMaxGroups * kRecordRows;
    static constexpr int kSalientBytes = kRecordRows * kSalientCols * 2;
    static constexpr int kLowBitBytes = kRecordBytes + kScaleBytes + kZeroBytes;
    static constexpr int kWarpBytes = kLowBitBytes > kSalientBytes ? kLowBitBytes : kSalientBytes;
    static constexpr int kWeightBytes = kRowWarps * kWarpBytes;
    static constexpr int kXBytes = kTokens * kBlockK * 2;
    static constexpr int kSmemBytes = kStages * (kWeightBytes + kXBytes);
    static constexpr bool kProjectsSlices = kTokenTiles <= 2;

    static_assert(kTokenTiles == 1 || kTokenTiles == 2 || kTokenTiles == 4 || kTokenTiles == 8,
                  "see instances");
    static_assert(kWarpBytes % kLoadBytes == 0, "every part starts 16-byte aligned");
    static_assert(kSmemBytes <= 99 * 1024, "one block must fit the 100 KB of an sm_86 or sm_120 SM");
    static_assert(kWarps * 16 * kTokens * 4 <= kStages * kXBytes, "skinny products add up in the x stages");
    static_assert(kHalves == 1 || kRowWarps * kWarpTiles * kLanes * 32 == kXBytes,
                  "halves meet in an x stage");
};

// Byte offset of the 16-byte chunk (8 k) of a token in an x stage. A quarter warp reads two neighbouring
// tokens x 4 chunks: without the swizzle both tokens would meet in the same banks.
ROSAQ_DEVICE int x_chunk_offset(int token, int chunk) {
    return token * (kBlockK * 2) + ((chunk ^ ((token & 1) << 2)) << 4);
}

// Row slot of a record's row in a salient tile: the rows that a quarter warp reads together lie side by side.
ROSAQ_DEVICE int salient_slot(int row) {
    return row % 4 * 8 + row / 4;
}

// A thread's place in its block.
struct Lane {
    int warp, lane, gid, tid;  // gid, tid: group and thread in group of the MMA's fragments
    ROSAQ_DEVICE explicit Lane(int thread)
        : warp(thread / kLanes), lane(thread % kLanes), gid(lane / 4), tid(lane % 4) {}
    ROSAQ_DEVICE Lane() : Lane(static_cast<int>(threadIdx.x)) {}

    // Which record of the block's rows, which half of its k, and from which token tile of 8 on it brings sums
    // to y.
    template <class Tile>
    ROSAQ_DEVICE int record() const {
        return warp % Tile::kRowWarps;
    }
    template <class Tile>
    ROSAQ_DEVICE int half() const {
        // Where k is not halved a block may have more warps than records of rows (few_tokens.cuh).
        return Tile::kHalves == 1 ? 0 : warp / Tile::kRowWarps;
    }
    template <class Tile>
    ROSAQ_DEVICE int token_tile() const {
        return half<Tile>() * Tile::kWarpTiles;
    }
};

}  // namespace rosaq::cuda
