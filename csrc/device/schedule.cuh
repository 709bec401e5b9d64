// Stream-K: which K-tiles a block works on, and which blocks share a row tile. Plain arithmetic, host and
// device.
#pragma once

#include "../common/params_cuda.h"
#include "cuda_compat.h"

namespace rosaq::cuda {

// First K-tile (of the list over all row tiles) of a block; block == grid gives the end of the list.
ROSAQ_DEVICE int first_tile_of(const Schedule& s, int block) {
    return block * s.tiles_per_block + (block < s.extra ? block : s.extra);
}

ROSAQ_DEVICE int block_of_tile(const Schedule& s, int tile) {
    const int long_tiles = s.extra * (s.tiles_per_block + 1);
    if (tile < long_tiles) return tile / (s.tiles_per_block + 1);
    return s.extra + (tile - long_tiles) / s.tiles_per_block;
}

// A position in the list.
struct Cursor {
    int row_tile, k_tile;

    ROSAQ_DEVICE Cursor(const Schedule& s, int tile) : row_tile(tile / s.k_tiles), k_tile(tile % s.k_tiles) {}

    ROSAQ_DEVICE void advance(const Schedule& s) {
        if (++k_tile == s.k_tiles) k_tile = 0, ++row_tile;
    }
};

// The blocks that add up one row tile, in the order in which their partial sums are added.
struct Contributors {
    int first, count;

    ROSAQ_DEVICE Contributors(const Schedule& s, int row_tile)
        : first(block_of_tile(s, row_tile * s.k_tiles)),
          count(block_of_tile(s, (row_tile + 1) * s.k_tiles - 1) - first + 1) {}
};

// A block has at most two partial row tiles: the one it starts in the middle of, and the one it leaves
// unfinished.
ROSAQ_DEVICE int partial_slot(const Schedule& s, int block, int row_tile) {
    return 2 * block + (row_tile * s.k_tiles < first_tile_of(s, block) ? 0 : 1);
}

}  // namespace rosaq::cuda
