// A salient basis of up to 8 directions, for up to 8 tokens: s = x U and s C^T beside the product, in the
// kernel for a few tokens. Here the tokens are the MMA's 16 rows (the last 8 of them zero) and the directions
// its columns.
#pragma once

#include "multiply.cuh"

namespace rosaq::cuda {

// 16 bits of row k of U, direction at.gid, in T; zero where there is none.
template <class T>
ROSAQ_DEVICE uint32_t basis_bits(const GemmParams& p, int k, const Lane& at) {
    if (at.gid >= p.r || k >= p.k) return 0;
    const auto* basis = static_cast<const uint16_t*>(p.salient_basis.data);
    return bits16_in<T>(basis[static_cast<int64_t>(k) * p.r + at.gid], p.salient_basis.dtype);
}

// sum += x U over the 128 k of a tile: tokens gid, directions 2 tid and the next. x holds 8 k of every 32 for
// token gid, as x(0, sub), and so does U for direction gid.
template <class T, class X>
ROSAQ_DEVICE void project_few(const GemmParams& p, int tile, const X& x, float (&sum)[4], const Lane& at) {
#pragma unroll
    for (int sub = 0; sub < 4; ++sub) {
        const int k = tile * kBlockK + sub * 32 + at.tid * 8;
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            pairs[j] = basis_bits<T>(p, k + 2 * j, at) | basis_bits<T>(p, k + 2 * j + 1, at) << 16;
        const XFragment tokens = x(0, sub);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint32_t a[4] = {tokens.step[step][0], 0, tokens.step[step][1], 0};
            const uint32_t b[2] = {pairs[2 * step], pairs[2 * step + 1]};
            ptx::mma_m16n8k16<T>(sum, a, b);
        }
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

}  // namespace rosaq::cuda
