// Which K-tiles a block works on, and which blocks share a row tile. Plain arithmetic, host and device.
#pragma once

#include "../common/params_cuda.h"
#include "cuda_compat.h"

namespace rosaq::cuda {

// The grid is [lists][list_blocks], so that no block has to divide to know its part. Number of this one:
ROSAQ_DEVICE int block_of_grid(const Schedule& s) {
    return static_cast<int>(blockIdx.y) * s.list_blocks + static_cast<int>(blockIdx.x);
}

// First K-tile, counted over all row tiles, of part `part` of a list; part == list_blocks gives the list's
// end.
ROSAQ_DEVICE int first_tile_of(const Schedule& s, int list, int part) {
    return list * s.list_tiles + part * s.tiles_per_block + (part < s.extra ? part : s.extra);
}

// Of one list for all row tiles: the block that has a K-tile.
ROSAQ_DEVICE int block_of_tile(const Schedule& s, int tile) {
    const int long_tiles = s.extra * (s.tiles_per_block + 1);
    if (tile < long_tiles) return tile / (s.tiles_per_block + 1);
    return s.extra + (tile - long_tiles) / s.tiles_per_block;
}

// A position among them.
struct Cursor {
    int row_tile, k_tile;

    ROSAQ_DEVICE Cursor(const Schedule& s, int list, int tile)
        : row_tile(s.lists == 1 ? tile / s.k_tiles : list), k_tile(tile - row_tile * s.k_tiles) {}

    ROSAQ_DEVICE void advance(const Schedule& s) {
        if (++k_tile == s.k_tiles) k_tile = 0, ++row_tile;
    }
};

// The blocks that add up one row tile, in the order in which their partial sums are added.
struct Contributors {
    int first, count;

    ROSAQ_DEVICE Contributors(const Schedule& s, int row_tile)
        : first(row_tile * s.list_blocks), count(s.list_blocks) {
        if (s.lists > 1) return;
        first = block_of_tile(s, row_tile * s.k_tiles);
        count = block_of_tile(s, (row_tile + 1) * s.k_tiles - 1) - first + 1;
    }
};

// Where this block leaves its sums of a row tile. It has at most two that are not whole: the one it starts in
// the middle of, and the one it leaves unfinished.
ROSAQ_DEVICE int partial_slot(const Schedule& s, int row_tile) {
    const int first = first_tile_of(s, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
    return 2 * block_of_grid(s) + (row_tile * s.k_tiles < first ? 0 : 1);
}

}  // namespace rosaq::cuda
