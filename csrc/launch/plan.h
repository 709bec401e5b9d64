// Which kernel, how many blocks, how much scratch: pure host functions of numbers, testable without a GPU.
#pragma once

#include <algorithm>

#include "../common/params_cuda.h"

namespace rosaq::cuda {

// From here on it is cheaper to dequantise W once and use the framework's matmul than to stream it for every
// 64 tokens.
constexpr int64_t kMaxFusedTokens = 128;

// What a compiled instance of the kernel takes; kTokenTiles, rows and shared memory follow from its Tile.
struct InstanceShape {
    DType dtype;
    int bits;
    bool symmetric_only;
    int tokens, rows, threads, smem_bytes;
};

// Tokens of the smallest instance that takes m tokens at once, of 8, 16, 32 and 64.
inline int tokens_for(int64_t m) {
    int tokens = 8;
    while (tokens < m && tokens < kMaxTokens) tokens *= 2;
    return tokens;
}

struct Problem {
    int64_t m, n, k, r;
    bool has_basis;
    bool has_rotation;
};

// Whether blocks project their own slices on the basis: few tokens and few directions, which each block can
// do for its own k, since y is linear in s.
inline bool projects_slices(const FusedGemmArgs& a) {
    return a.salient_basis.data != nullptr && a.r <= kFewDirections && a.m <= 16;
}

// Of a launch for up to 64 of a call's tokens.
inline Problem problem_of(const FusedGemmArgs& a) {
    const bool projects = projects_slices(a);
    return {std::min<int64_t>(a.m, kMaxTokens),           a.weight.n,          a.weight.k, projects ? 0 : a.r,
            a.salient_basis.data != nullptr && !projects, a.rotation_size != 0};
}

// K-tiles of one row tile.
inline int k_tiles_of(int64_t k, int64_t r) {
    return static_cast<int>(ceil_div<int64_t>(k, kBlockK) + ceil_div<int64_t>(r, kSalientCols));
}

// Whether the kernel for a few tokens takes a call; a rotation if all of its blocks can be resident.
inline bool is_few_tokens(const FusedGemmArgs& a) {
    return a.m <= kFewTokens && a.rotation_size <= kLargestWarpRotation &&
           (a.salient_basis.data == nullptr || projects_slices(a));
}

// K-tiles of one of its records: directions of a basis are no channels, and need none.
inline int few_tokens_tiles(const FusedGemmArgs& a) {
    return k_tiles_of(a.weight.k, problem_of(a).r);
}

// Whether the kernel of warpgroups takes a call, on a device that has them: with fewer tokens it would pad
// them, and nothing but the bytes of W would count.
inline bool is_for_warpgroups(const FusedGemmArgs& a, int compute_major) {
    return compute_major == 9 && a.m > 16;
}

// Warps of one of its blocks on a device of so many multiprocessors: all that a block may have where there
// are not two blocks for each of them.
inline int few_tokens_warps(int64_t n, int64_t sms, int64_t smem_per_warp, int64_t smem_per_block) {
    const bool has_room = kFewMaxWarps * smem_per_warp <= smem_per_block;
    return has_room && ceil_div<int64_t>(n, kRecordRows) < 2 * sms ? kFewMaxWarps : kFewMaxWarps / 2;
}

// Whether blocks wait for each other, so that all of them have to be resident.
inline bool needs_all_blocks(const GemmParams& p) {
    return p.rotation_size != 0 || p.schedule.projection_parts != 0;
}

// Fewer K-tiles for a block, and adding up partial sums costs more than it spreads.
constexpr int64_t least_tiles_per_block(int tokens) {
    return tokens > 16 ? 8 : 4;
}
// What it costs a block to have parts of two row tiles instead of one, in K-tiles.
constexpr int64_t kSecondRowTile = 2;
constexpr int64_t kMaxProjectionParts = 16, kProjectionK = 512;

// The schedule of one launch of m <= shape.tokens tokens on a device that holds `resident` blocks at a time.
inline Schedule make_schedule(const Problem& problem, const InstanceShape& shape, int resident) {
    Schedule s{};
    s.row_tiles = static_cast<int>(ceil_div<int64_t>(problem.n, shape.rows));
    s.k_tiles = k_tiles_of(problem.k, problem.r);
    const int64_t tiles = int64_t{s.row_tiles} * s.k_tiles;
    const int64_t least = least_tiles_per_block(shape.tokens);
    const int64_t most = std::clamp<int64_t>(ceil_div(tiles, least), 1, resident);
    // The same number of blocks for every row tile, or one list of all K-tiles where that leaves too many
    // idle.
    const int64_t parts = std::min<int64_t>(most / s.row_tiles, s.k_tiles);
    const bool is_even =
        parts > 0 && ceil_div<int64_t>(s.k_tiles, parts) <= ceil_div(tiles, most) + kSecondRowTile;
    s.lists = is_even ? s.row_tiles : 1;
    s.list_blocks = static_cast<int>(is_even ? parts : most);
    s.list_tiles = static_cast<int>(is_even ? s.k_tiles : tiles);
    s.grid = s.lists * s.list_blocks;
    s.tiles_per_block = s.list_tiles / s.list_blocks;
    s.extra = s.list_tiles % s.list_blocks;
    if (problem.has_basis)
        s.projection_parts =
            static_cast<int>(std::clamp<int64_t>(problem.k / kProjectionK, 1, kMaxProjectionParts));
    return s;
}

// Scratch of one launch, byte offsets into one allocation.
struct Scratch {
    int64_t t, s_parts, partials, total;
};

inline Scratch scratch_of(const Problem& problem, const InstanceShape& shape, const Schedule& s) {
    Scratch w{};
    const auto take = [&w](int64_t bytes) {
        const int64_t at = w.total;
        w.total += round_up<int64_t>(bytes, 256);
        return at;
    };
    w.t = take(problem.has_rotation ? problem.m * problem.k * 2 : 0);
    w.s_parts = take(problem.has_basis ? int64_t{s.projection_parts} * problem.m * problem.r * 4 : 0);
    w.partials = take(int64_t{s.grid} * 2 * shape.tokens * shape.rows * 4);
    return w;
}

// Everything of a launch but its tokens, schedule and scratch, from the checked arguments of the op.
inline GemmParams params_of(const FusedGemmArgs& a, const BlobLayout& layout, const uint8_t* blob) {
    GemmParams p{};
    p.n = static_cast<int>(a.weight.n), p.k = static_cast<int>(a.weight.k);
    p.codes = blob + layout.codes_offset;
    p.scales = blob + layout.scales_offset;
    p.zeros = a.weight.symmetric ? nullptr : blob + layout.zeros_offset;
    p.slabs = static_cast<int>(layout.slabs), p.k_blocks = static_cast<int>(layout.k_blocks);
    p.groups = static_cast<int>(layout.groups);
    p.groups_per_block = layout.groups == 1 ? 1 : static_cast<int>(layout.groups / layout.k_blocks);
    p.scale_is_bf16 = a.weight.scale_dtype == DType::kBFloat16;
    p.r = static_cast<int>(a.r);
    p.salient_weight = a.salient_weight, p.salient_index = a.salient_index, p.salient_basis = a.salient_basis;
    p.rotation_size = static_cast<int>(a.rotation_size),
    p.rotation_blocks = static_cast<int>(a.rotation_blocks);
    p.rotation = a.rotation;
    p.projects_slices = projects_slices(a);
    p.bias = a.bias;
    return p;
}

}  // namespace rosaq::cuda
