// The float32 tile that every dense product shares: acc[rows, 2 vectors] += a[rows, depth] * panel[depth, 2
// vectors].
#pragma once

#include <cstddef>
#include <cstdint>

namespace rosaq::cpu {
namespace {

constexpr int64_t kTileDepth =
    128;  // k per tile: the panel (at most 128 x 128 bytes) stays in a 32 KB L1 beside a's rows

template <class S>
constexpr int64_t kTileCols = 2 * S::kLanes;

// Sums over the depth start at zero and are added to acc once: a blocked sum, more exact than one long chain.
template <class S, int kRows>
void multiply_rows(const float* a, int64_t lda, const float* panel, int64_t depth, float* acc,
                   int64_t ldacc) {
    using F = typename S::F;
    F sum[kRows][2];
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = S::zero_f();
    for (int64_t d = 0; d < depth; ++d) {
        const F b0 = S::load_f(panel + d * kTileCols<S>),
                b1 = S::load_f(panel + d * kTileCols<S> + S::kLanes);
        for (int i = 0; i < kRows; ++i) {
            const F x = S::set_f(a[i * lda + d]);
            sum[i][0] = S::mul_add(x, b0, sum[i][0]);
            sum[i][1] = S::mul_add(x, b1, sum[i][1]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < 2; ++v) {
            float* out = acc + i * ldacc + v * S::kLanes;
            S::store_f(out, S::add_f(S::load_f(out), sum[i][v]));
        }
}

template <class S, int kRows>
void multiply_rest(int64_t m, const float* a, int64_t lda, const float* panel, int64_t depth, float* acc,
                   int64_t ldacc) {
    if constexpr (kRows > 0) {
        if (m == kRows) return multiply_rows<S, kRows>(a, lda, panel, depth, acc, ldacc);
        multiply_rest<S, kRows - 1>(m, a, lda, panel, depth, acc, ldacc);
    }
}

// The same for any number of rows.
template <class S>
void multiply_tile(int64_t m, const float* a, int64_t lda, const float* panel, int64_t depth, float* acc,
                   int64_t ldacc) {
    int64_t i = 0;
    for (; i + S::kTileRows <= m; i += S::kTileRows)
        multiply_rows<S, S::kTileRows>(a + i * lda, lda, panel, depth, acc + i * ldacc, ldacc);
    multiply_rest<S, S::kTileRows - 1>(m - i, a + i * lda, lda, panel, depth, acc + i * ldacc, ldacc);
}

}  // namespace
}  // namespace rosaq::cpu
