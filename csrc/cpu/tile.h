// The float32 tile that every dense product shares: acc[rows, kVectors vectors] += a[rows, depth] *
// panel[depth, kVectors vectors].
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
template <class S, int kVectors, int kRows>
void multiply_rows(const float* a, int64_t lda, const float* panel, int64_t depth, float* acc,
                   int64_t ldacc) {
    using F = typename S::F;
    F sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) sum[i][v] = S::zero_f();
    for (int64_t d = 0; d < depth; ++d) {
        F b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = S::load_f(panel + (d * kVectors + v) * S::kLanes);
        for (int i = 0; i < kRows; ++i) {
            const F x = S::set_f(a[i * lda + d]);
            for (int v = 0; v < kVectors; ++v) sum[i][v] = S::mul_add(x, b[v], sum[i][v]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) {
            float* out = acc + i * ldacc + v * S::kLanes;
            S::store_f(out, S::add_f(S::load_f(out), sum[i][v]));
        }
}

template <class S, int kVectors, int kRows>
void multiply_rest(int64_t m, const float* a, int64_t lda, const float* panel, int64_t depth, float* acc,
                   int64_t ldacc) {
    if constexpr (kRows > 0) {
        if (m == kRows) return multiply_rows<S, kVectors, kRows>(a, lda, panel, depth, acc, ldacc);
        multiply_rest<S, kVectors, kRows - 1>(m, a, lda, panel, depth, acc, ldacc);
    }
}

// The same for any number of rows.
template <class S, int kVectors>
void multiply_tile(int64_t m, const float* a, int64_t lda, const float* panel, int64_t depth, float* acc,
                   int64_t ldacc) {
    int64_t i = 0;
    for (; i + S::kTileRows <= m; i += S::kTileRows)
        multiply_rows<S, kVectors, S::kTileRows>(a + i * lda, lda, panel, depth, acc + i * ldacc, ldacc);
    multiply_rest<S, kVectors, S::kTileRows - 1>(m - i, a + i * lda, lda, panel, depth, acc + i * ldacc,
                                                 ldacc);
}

}  // namespace
}  // namespace rosaq::cpu
