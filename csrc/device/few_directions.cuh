// A salient basis of up to 8 directions, for up to 16 tokens: every block projects the k that it multiplies,
// and adds its part of s C^T. y is linear in s, so nobody has to wait for the sum over all of k.
//
// Here the tokens are the MMA's 16 rows and the directions its columns.
#pragma once

#include "columns.cuh"
#include "load.cuh"
#include "multiply.cuh"

namespace rosaq::cuda {

// U of a lane's 8 k of the 32 number sub of a K-tile, direction at.gid, as they are stored; zero where there
// is none. To be called well before they are used.
ROSAQ_DEVICE void load_basis(const GemmParams& p, int tile, int sub, uint32_t (&pairs)[4], const Lane& at) {
    const int k = tile * kBlockK + sub * 32 + at.tid * 8;
    const auto* from =
        static_cast<const uint16_t*>(p.salient_basis.data) + static_cast<int64_t>(k) * p.r + at.gid;
    const bool exists = at.gid < p.r && k < p.k;  // p.k is a multiple of 8
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32_t low = exists ? from[2 * j * p.r] : 0u, high = exists ? from[(2 * j + 1) * p.r] : 0u;
        pairs[j] = low | high << 16;
    }
}

// sum += x U over 32 k, number sub of a K-tile, for kTiles x 8 tokens: tokens gid and gid + 8, directions 2
// tid and the next. x(token tile, sub) holds 8 k of every 32 for token gid, and so does `basis` for direction
// gid.
template <class T, int kTiles, class X>
ROSAQ_DEVICE void project_part(const GemmParams& p, int sub, const X& x, uint32_t (&basis)[4],
                               float (&sum)[4]) {
    static_assert(kTiles == 1 || kTiles == 2, "the rows of one MMA");
    convert_pairs<T>(basis, p.salient_basis.dtype);
    const XFragment low = x(0, sub);
    const XFragment high = kTiles == 2 ? x(kTiles - 1, sub) : XFragment(make_uint4(0, 0, 0, 0));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        const uint32_t a[4] = {low.step[step][0], high.step[step][0], low.step[step][1], high.step[step][1]};
        const uint32_t b[2] = {basis[2 * step], basis[2 * step + 1]};
        ptx::mma_m16n8k16<T>(sum, a, b);
    }
}

// values of rows row .. row + 3 of one token += C s.
ROSAQ_DEVICE void add_few(const GemmParams& p, int row, const float (&s)[kFewDirections],
                          float (&values)[4]) {
#pragma unroll
    for (int j = 0; j < kFewDirections; ++j) {
        if (j >= p.r) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] += s[j] * load_float(p.salient_weight, static_cast<int64_t>(row + i) * p.r + j);
    }
}

// The sums of a row tile += C s^T for the s that the warps of a block have parts of, which start anew;
// through `shared`, that nobody reads any more once all threads are here. To be called by all threads of the
// block.
template <class Tile>
ROSAQ_DEVICE void add_directions(const GemmParams& p, int row_tile, float (&part)[4],
                                 Accumulator<Tile::kTokenTiles>& acc, unsigned char* shared, const Lane& at) {
    auto* const sums = reinterpret_cast<float*>(shared);  // [warp][token][direction]
    static_assert(Tile::kWarps * 16 * kFewDirections * 4 <= Tile::kXBytes, "parts fit an x stage");
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(sums + ((at.warp * 2 + half) * 8 + at.gid) * kFewDirections + at.tid * 2) =
            make_float2(part[2 * half], part[2 * half + 1]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = 0.0f;
    const int row = first_row<Tile>(row_tile, at) + at.gid * 4;
    if (row >= p.n) return;  // n is a multiple of 8: four rows are inside or outside together
#pragma unroll 1
    for (int j = 0; j < p.r; ++j) {
        float c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            c[i] = load_float(p.salient_weight, static_cast<int64_t>(row + i) * p.r + j);
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float s = 0.0f;
#pragma unroll
                for (int warp = 0; warp < Tile::kWarps; ++warp)
                    s += sums[(warp * 16 + t * 8 + at.tid * 2 + e) * kFewDirections + j];
#pragma unroll
                for (int i = 0; i < 4; ++i) acc.sum[i / 2][t][i % 2 * 2 + e] += c[i] * s;
            }
    }
}

}  // namespace rosaq::cuda
