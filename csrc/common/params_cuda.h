// What a launch of the CUDA kernels needs: plain structs, host and device. Sizes in elements unless named
// _bytes.
#pragma once

#include <cstdint>

#include "layout_cuda.h"
#include "params.h"

namespace rosaq::cuda {

constexpr int kMaxTokens = 64;  // of one launch: eight MMA tiles of 8 tokens
// The kernel for a few tokens: warps of a block at most, and stages of a warp's ring.
constexpr int kFewTokens = 8, kFewMaxWarps = 16, kFewStages = 3;
constexpr int kFewDirections = 8;  // of a salient basis that a block can project on by itself
constexpr int kSalientCols = 32;   // salient directions of one K-tile

// A block of a rotation up to this size is made by one warp: sharing it out over a thread block's would have
// most of them wait.
constexpr int kLargestWarpRotation = 128;

// Words of the per-stream counters. All are zero between launches but for the top bit of the barrier's.
constexpr int kBarrierWord = 0, kFirstTileCounter = 4;

// How the work is cut. A K-tile is 128 k of low-bit weights or 32 salient directions, for `rows` rows of y.
// The K-tiles of a row tile form a list, or those of all row tiles one long list (Stream-K); `list_blocks`
// blocks take a contiguous part of each list. Part of every launch's parameters, so that device and host
// compute with the same numbers.
struct Schedule {
    int row_tiles, k_tiles;  // k_tiles: of one row tile, low-bit tiles first, then salient ones
    int grid;                // blocks, lists x list_blocks
    int lists, list_blocks, list_tiles;
    int tiles_per_block, extra;  // the first `extra` blocks of a list take one K-tile more
    int projection_parts;        // cuts of k in which s = t * salient_basis is computed, 0 without a basis
};

struct GemmParams {
    const void* x;  // [m, k], T
    void* y;        // [m, n], T
    int m, n, k;

    const uint8_t* codes;  // parts of the blob, see layout_cuda.h
    const uint8_t* scales;
    const uint8_t* zeros;
    int slabs, k_blocks, groups;
    int groups_per_block;  // groups of 128 k: 4, 2 or 1; 1 also where a group is longer than 128
    bool scale_is_bf16;

    int r;
    Buffer salient_weight;         // [n, r]
    const int32_t* salient_index;  // [r]
    Buffer salient_basis;          // [k, r]
    int rotation_size;             // b, 0 for none
    int rotation_blocks;
    Buffer rotation;       // [B, b, b]
    bool projects_slices;  // each block projects what it multiplies on salient_basis, and adds its part of s
                           // C^T
    Buffer bias;           // [n]

    Schedule schedule;
    void* t;          // [m, k] T: x rotated; null without a rotation
    float* s_parts;   // [projection_parts, m, r]
    float* partials;  // [grid, 2, tokens, rows]: row tiles that several blocks share
    int* counters;    // kFirstTileCounter + row_tiles
};

}  // namespace rosaq::cuda
