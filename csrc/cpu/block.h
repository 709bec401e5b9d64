// Many tokens: dequantise kTileDepth x 2 vectors of W into L1 and multiply it with every token, in float32.
// Bound by multiply-adds: dequantising costs about 5 instructions per vector of weights, a tile of m rows
// costs m.
#pragma once

#include "kernels.h"
#include "salient.h"
#include "tile.h"
#include "unpack.h"

namespace rosaq::cpu {
namespace {

constexpr int64_t kBlockRows = 168;  // tokens per pass: a multiple of 14 and 6; their sums (21 KB) stay in L2

// One 4-k quad of kLanes rows as four float vectors (code - zero) * scale. zero * scale has at most 19 bits,
// zero points being eight bits in halves, and the difference is representable, so code * scale - zero * scale
// is exact too.
template <class S, int kBits, int kQuad>
__attribute__((always_inline)) inline void dequantise_quad(const BlockWords<S, kBits>& words,
                                                           typename S::F scale,
                                                           typename S::F minus_zero_scale, float* out) {
    const auto codes = words.template quad<kQuad>();
    constexpr int64_t ld = kTileCols<S>;
    float* row = out + kQuad * kQuadK * ld;
    S::store_f(row, S::mul_add(S::template code_to_float<kBits, 0>(codes), scale, minus_zero_scale));
    S::store_f(row + ld, S::mul_add(S::template code_to_float<kBits, 1>(codes), scale, minus_zero_scale));
    S::store_f(row + 2 * ld, S::mul_add(S::template code_to_float<kBits, 2>(codes), scale, minus_zero_scale));
    S::store_f(row + 3 * ld, S::mul_add(S::template code_to_float<kBits, 3>(codes), scale, minus_zero_scale));
}

// out[depth, kTileCols] columns [col, col + kLanes) = W[rows sub of the panel, k0 : k0 + depth]^T
template <class S, int kBits>
void dequantise(const PackedWeight& w, int64_t panel_idx, int sub, int64_t k0, int64_t depth, float* out) {
    const PanelView panel(w, panel_idx);
    for (int64_t k = k0; k < k0 + depth; k += kBlockK, out += kBlockK * kTileCols<S>) {
        const int64_t at = k / w.group_size * kPanelRows + sub * S::kLanes;
        const auto scale = S::load_any(panel.scales + at * 2, w.scale_dtype);
        const auto twice_zero = S::from_int(panel.template twice_zero<S>(at));
        const auto shift = S::mul_f(S::mul_f(twice_zero, S::set_f(-0.5f)), scale);
        const BlockWords<S, kBits> words(panel.codes + k / kBlockK * kBits * kLineBytes, sub);
        dequantise_quad<S, kBits, 0>(words, scale, shift, out);
        dequantise_quad<S, kBits, 1>(words, scale, shift, out);
        dequantise_quad<S, kBits, 2>(words, scale, shift, out);
        dequantise_quad<S, kBits, 3>(words, scale, shift, out);
        dequantise_quad<S, kBits, 4>(words, scale, shift, out);
        dequantise_quad<S, kBits, 5>(words, scale, shift, out);
        dequantise_quad<S, kBits, 6>(words, scale, shift, out);
        dequantise_quad<S, kBits, 7>(words, scale, shift, out);
    }
}

template <class S, int kBits>
void block_unit(const MainLoop& p, int64_t unit, int64_t row0, int64_t rows) {
    constexpr int64_t cols = kTileCols<S>;
    const FusedGemmArgs& a = *p.args;
    const PackedWeight& w = a.weight;
    const int64_t first = unit * cols;
    alignas(64) float panel[kTileDepth * cols];
    alignas(64) float sums[kBlockRows * cols];
    std::memset(sums, 0, static_cast<size_t>(rows * cols) * sizeof(float));

    for (int64_t k0 = 0; k0 < w.k; k0 += kTileDepth) {
        const int64_t depth = w.k - k0 < kTileDepth ? w.k - k0 : kTileDepth;
        for (int v = 0; v < 2; ++v) {
            const int64_t lane0 = first + v * S::kLanes, panel_idx = lane0 / kPanelRows;
            if (panel_idx < w.layout.num_panels)
                dequantise<S, kBits>(w, panel_idx, int(lane0 % kPanelRows) / S::kLanes, k0, depth,
                                     panel + v * S::kLanes);
            else
                for (int64_t d = 0; d < depth; ++d) S::store_f(panel + d * cols + v * S::kLanes, S::zero_f());
        }
        multiply_tile<S, 2>(rows, p.t + row0 * p.ldt + k0, p.ldt, panel, depth, sums, cols);
    }
    add_salient<S, 2>(p, first, row0, rows, sums);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < cols && first + c < w.n; c += kPanelRows) {
            const int64_t left = w.n - first - c;
            store_row<S>(a, row0 + i, first + c, left < kPanelRows ? left : kPanelRows, sums + i * cols + c);
        }
}

template <class S>
void block_gemm(const MainLoop& p, int64_t unit_begin, int64_t unit_end) {
    const int64_t m = p.args->m;
    for (int64_t row = 0; row < m; row += kBlockRows) {
        const int64_t rows = m - row < kBlockRows ? m - row : kBlockRows;
        for (int64_t unit = unit_begin; unit < unit_end; ++unit)
            p.args->weight.bits == 3 ? block_unit<S, 3>(p, unit, row, rows)
                                     : block_unit<S, 4>(p, unit, row, rows);
    }
}

}  // namespace
}  // namespace rosaq::cpu
