// Many tokens of bfloat16 x: 2 codes - 2 zero and activations as 16-bit integers, the sums of a chunk exact
// in 32 bits and the same bits as those of the digits (stream.h).
//
// A pair product does 2 multiplies per lane where a byte dot of two digits needs two instructions for 4: the
// same number. What is saved is everything around them: codes are unpacked once for kWordTokens instead of
// once per tile, one sum per token instead of two, and one broadcast serves two vectors of rows.
#pragma once

#include "kernels.h"
#include "salient.h"
#include "tile.h"
#include "unpack.h"

namespace rosaq::cpu {
namespace {

// out[16, kTileCols] columns [0, kLanes) = 2 code - twice_zero of one block, words of two neighbouring k per
// lane.
template <class S, int kBits, int kQuad>
__attribute__((always_inline)) inline void unpack_words(const BlockWords<S, kBits>& words,
                                                        typename S::I twice_zero, int32_t* out) {
    const auto codes = S::template shl<1>(words.template quad<kQuad>());  // four bytes, far below 256
    const auto low = S::set_i(0xff), high = S::set_i(0xff0000);
    const auto first = S::or_i(S::and_i(codes, low), S::and_i(S::template shl<8>(codes), high));
    const auto upper = S::template shr<8>(codes);
    const auto second = S::or_i(S::and_i(S::template shr<8>(upper), low), S::and_i(upper, high));
    int32_t* row = out + kQuad * 2 * kTileCols<S>;
    S::store_i(row, S::sub_words(first, twice_zero));
    S::store_i(row + kTileCols<S>, S::sub_words(second, twice_zero));
}

// The chunk of `blocks` blocks from k0 on, for the kLanes rows at `sub` of a panel.
template <class S, int kBits>
void unpack_chunk(const PackedWeight& w, const PanelView& panel, int sub, int64_t k0, int64_t blocks,
                  int32_t* out) {
    const int64_t at = k0 / w.group_size * kPanelRows + sub * S::kLanes;
    const auto zero = panel.template twice_zero<S>(at);
    const auto zeros = S::or_i(zero, S::template shl<16>(zero));
    for (int64_t b = 0; b < blocks; ++b, out += kBlockK / 2 * kTileCols<S>) {
        const BlockWords<S, kBits> words(panel.codes + (k0 / kBlockK + b) * kBits * kLineBytes, sub);
        unpack_words<S, kBits, 0>(words, zeros, out), unpack_words<S, kBits, 1>(words, zeros, out);
        unpack_words<S, kBits, 2>(words, zeros, out), unpack_words<S, kBits, 3>(words, zeros, out);
        unpack_words<S, kBits, 4>(words, zeros, out), unpack_words<S, kBits, 5>(words, zeros, out);
        unpack_words<S, kBits, 6>(words, zeros, out), unpack_words<S, kBits, 7>(words, zeros, out);
    }
}

// y[kRows, kTileCols] += scale * unit * sum over a chunk of weight * value. values [blocks, kRows, 32].
template <class S, int kRows>
void multiply_words(const int32_t* weights, const int16_t* values, int64_t blocks,
                    const typename S::F (&scale)[2], const float* units, float* y) {
    typename S::Sum sum[kRows][2] = {};
    for (int64_t b = 0; b < blocks; ++b, values += kRows * kBlockK)
        for (int64_t pair = 0; pair < kBlockK / 2; ++pair, weights += kTileCols<S>) {
            const auto w0 = S::load_i(weights), w1 = S::load_i(weights + S::kLanes);
            for (int m = 0; m < kRows; ++m) {
                const auto x = S::load_pair(values + m * kBlockK + pair * 2);
                sum[m][0] = S::dot_words(sum[m][0], w0, x);
                sum[m][1] = S::dot_words(sum[m][1], w1, x);
            }
        }
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < 2; ++v) {
            float* out = y + m * kTileCols<S> + v * S::kLanes;
            S::store_f(out,
                       S::mul_add(S::mul_f(S::from_int(reinterpret_cast<typename S::I>(sum[m][v])), scale[v]),
                                  S::set_f(units[m]), S::load_f(out)));
        }
}

// The same for a tile of `size` tokens, a size that tile_size gives.
template <class S, int kRows>
void multiply_word_tile(int64_t size, const int32_t* weights, const int16_t* values, int64_t blocks,
                        const typename S::F (&scale)[2], const float* units, float* y) {
    if (kRows == 1 || size == kRows)
        return multiply_words<S, kRows>(weights, values, blocks, scale, units, y);
    multiply_word_tile<S, largest_power_below(kRows)>(size, weights, values, blocks, scale, units, y);
}

template <class S, int kBits>
void word_unit(const MainLoop& p, int64_t first, int64_t row0, int64_t rows) {
    constexpr int64_t cols = kTileCols<S>;
    const PackedWeight& w = p.args->weight;
    const Words& x = p.words;
    const int64_t chunk = chunk_k(w.group_size), blocks = chunk / kBlockK;
    alignas(64) int32_t weights[kMaxChunkK / 2 * cols];
    alignas(64) float y[kWordTokens * cols];
    std::memset(y, 0, sizeof y);
    for (int64_t k0 = 0; k0 < w.k; k0 += chunk) {
        typename S::F scale[2];
        for (int v = 0; v < 2; ++v) {
            const int64_t lane0 = first + v * S::kLanes, panel_idx = lane0 / kPanelRows;
            // A second panel that does not exist is the first one again; its rows are not stored.
            const PanelView panel(w, panel_idx < w.layout.num_panels ? panel_idx : first / kPanelRows);
            const int sub = static_cast<int>(lane0 % kPanelRows) / S::kLanes;
            unpack_chunk<S, kBits>(w, panel, sub, k0, blocks, weights + v * S::kLanes);
            scale[v] = S::load_any(panel.scales + (k0 / w.group_size * kPanelRows + sub * S::kLanes) * 2,
                                   w.scale_dtype);
        }
        const int16_t* values = x.values + k0 * x.tokens + row0 * chunk;
        const float* units = x.units + k0 / chunk * x.tokens + row0;
        for (int64_t row = 0; row < rows; row += S::kWordRows) {
            const int64_t size = tile_size(rows - row, S::kWordRows);
            multiply_word_tile<S, S::kWordRows>(size, weights, values + row * chunk, blocks, scale,
                                                units + row, y + row * cols);
        }
    }
    add_salient<S, 2>(p, first, row0, rows, y);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < cols && first + c < w.n; c += kPanelRows)
            store_row<S>(*p.args, row0 + i, first + c, panel_rows(w, (first + c) / kPanelRows),
                         y + i * cols + c);
}

template <class S>
void word_gemm(const MainLoop& p, int64_t unit_begin, int64_t unit_end) {
    const int64_t units_per_pass = ceil_div(p.args->weight.n, kTileCols<S>), m = p.args->m;
    const int64_t tokens = word_unit_tokens(m, S::kWordRows);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
        const int64_t row = unit / units_per_pass * tokens, first = unit % units_per_pass * kTileCols<S>;
        const int64_t rows = m - row < tokens ? m - row : tokens;
        p.args->weight.bits == 3 ? word_unit<S, 3>(p, first, row, rows)
                                 : word_unit<S, 4>(p, first, row, rows);
    }
}

}  // namespace
}  // namespace rosaq::cpu
