// The main loop over 8-bit digits: y[m,n] = sum over chunks of scale * unit * sum_k (2 code - 2 zero) *
// integer, the inner sum in exact integers: zero points may be halves, so an integer is worth two units.
//
// Why integers: a u8 x i8 dot does 4 multiplies per lane where float32 does one and bfloat16 two, codes need
// no conversion, and two (bfloat16 x), three (float16) or four (float32) digits carry the activations
// (DESIGN.md has the errors). Integer sums do not depend on their order: every instruction set, thread count
// and batch split gives the same bits. One token is bound by reading W once, 0.5 byte per weight for 4 bits
// and 0.375 for 3; many tokens by the dots: num_digits per 4 weights, lane and token.
#pragma once

#include "kernels.h"
#include "salient.h"
#include "unpack.h"

namespace rosaq::cpu {
namespace {

// Far enough ahead to cover DRAM latency, and as a stream that is read once: L2 is for the digits.
constexpr int64_t kPrefetchBytes = 8192;
// Digits of this many bytes stay in L2 while all panels pass by.
constexpr int64_t kDigitCacheBytes = 512 << 10;

// Tokens per tile: their sums fill the registers; more than 16 tokens gain nothing.
template <class S>
constexpr int tile_rows(int num_digits) {
    const int rows = S::kStreamSums / num_digits;
    return rows > 16 ? 16 : rows;
}

template <class S, int kBits, int kDigits, int kRows>
struct StreamTile {
    static constexpr int kSubs = kPanelRows / S::kLanes;
    static constexpr int kChains = kRows * kDigits;
    // Sets of accumulators: fewer than 8 chains cannot hide the latency of dot.
    static constexpr int kSets = S::kPairSums || kChains >= 8 ? 1 : kChains >= 4 ? 2 : 4;
    static constexpr int kParts = digit_parts(kDigits);
    static constexpr int64_t kBlockBytes = kRows * kDigits * kBlockK;  // digits per 32 k
    using I = typename S::I;
    using F = typename S::F;
    using Sums = I[kSets][kRows][kDigits];
    Sums acc;

    // Start at -floor(zero) * (sum of integers); `total` takes off what is left of the zero point.
    __attribute__((always_inline)) void start(I twice_zero, const int32_t* offsets) {
        for (int set = 0; set < kSets; ++set)
            for (int m = 0; m < kRows; ++m)
                for (int d = 0; d < kDigits; ++d) acc[set][m][d] = S::zero_i();
        const I whole = S::template shr<1>(twice_zero);
        for (int m = 0; m < kRows; ++m)
            for (int part = 0; part < kParts; ++part)
                acc[0][m][kParts == 2 && part == 0 ? kDigits - 3 : kDigits - 1] =
                    S::mul_i(whole, S::set_i(offsets[m * kParts + part]));
    }

    template <int kQuad>
    __attribute__((always_inline)) static void step(Sums& sums, const BlockWords<S, kBits>& words,
                                                    const int8_t* digits) {
        const I codes = words.template quad<kQuad>();
        for (int m = 0; m < kRows; ++m)
            for (int d = 0; d < kDigits; ++d) {
                I& a = sums[kQuad % kSets][m][d];
                a = S::dot(a, codes, digits + (m * kDigits + d) * kBlockK + kQuad * kQuadK);
            }
    }

    __attribute__((always_inline)) static void all_steps(Sums& sums, const BlockWords<S, kBits>& words,
                                                         const int8_t* digits) {
        step<0>(sums, words, digits), step<1>(sums, words, digits);
        step<2>(sums, words, digits), step<3>(sums, words, digits);
        step<4>(sums, words, digits), step<5>(sums, words, digits);
        step<6>(sums, words, digits), step<7>(sums, words, digits);
    }

    __attribute__((always_inline)) void block(const uint8_t* codes, int sub, const int8_t* digits) {
        const BlockWords<S, kBits> words(codes, sub);
        if constexpr (!S::kPairSums) {
            all_steps(acc, words, digits);
        } else {
            // 16-bit sums of pairs, widened once per block: 8 quads of 2 products of at most 15 * 128 fit.
            static_assert(kQuads * 2 * 15 * 128 < 1 << 15, "pair sums of a block must not overflow");
            Sums pairs;
            for (int m = 0; m < kRows; ++m)
                for (int d = 0; d < kDigits; ++d) pairs[0][m][d] = S::zero_i();
            all_steps(pairs, words, digits);
            for (int m = 0; m < kRows; ++m)
                for (int d = 0; d < kDigits; ++d)
                    acc[0][m][d] = S::add_i(acc[0][m][d], S::widen_pairs(pairs[0][m][d]));
        }
    }

    __attribute__((always_inline)) I digit_sum(int m, int d) const {
        I sum = acc[0][m][d];
        for (int set = 1; set < kSets; ++set) sum = S::add_i(sum, acc[set][m][d]);
        return sum;
    }

    // The chunk's sum of (2 code - 2 zero) * integer as a float: digits pair up in int32 exactly, each part
    // rounds once. is_half: all ones where the zero point is a half. offsets: minus the sums of the token's
    // integers.
    __attribute__((always_inline)) F total(int m, I is_half, const int32_t* offsets) const {
        I low = digit_sum(m, kDigits - 1);
        if constexpr (kDigits >= 2) low = S::add_i(S::template shl<8>(digit_sum(m, kDigits - 2)), low);
        low = doubled(low, is_half, offsets[m * kParts + kParts - 1]);
        if constexpr (kDigits <= 2) {
            return S::from_int(low);
        } else {
            I high = digit_sum(m, kDigits - 3);
            if constexpr (kDigits == 4) high = S::add_i(S::template shl<8>(digit_sum(m, 0)), high);
            high = doubled(high, is_half, offsets[m * kParts]);
            return S::mul_add(S::from_int(high), S::set_f(65536.0f), S::from_int(low));
        }
    }

    __attribute__((always_inline)) static I doubled(I sum, I is_half, int32_t offset) {
        return S::add_i(S::template shl<1>(sum), S::and_i(is_half, S::set_i(offset)));
    }
};

// One panel and one tile of tokens from row0 on.
template <class S, int kBits, int kDigits, int kRows>
void stream_panel(const MainLoop& p, int64_t panel_idx, int64_t row0) {
    using Tile = StreamTile<S, kBits, kDigits, kRows>;
    using F = typename S::F;
    const PackedWeight& w = p.args->weight;
    const PanelView panel(w, panel_idx);
    const int64_t chunk_size = chunk_k(w.group_size), num_chunks = w.k / chunk_size;
    const int64_t chunks_per_group = w.group_size / chunk_size, blocks = chunk_size / kBlockK;
    const int8_t* digits = p.digits.planes + row0 * w.k * kDigits;
    const int32_t* offsets = p.digits.offsets + row0 * num_chunks * Tile::kParts;
    const float* units = p.digits.units + row0 * num_chunks;
    const uint8_t* codes = panel.codes;

    F y[kRows][Tile::kSubs];
    for (int m = 0; m < kRows; ++m)
        for (int sub = 0; sub < Tile::kSubs; ++sub) y[m][sub] = S::zero_f();

    // What lies kPrefetchBytes beyond the scales: the codes' own prefetch begins behind it.
    for (int64_t i = 0; i < w.layout.codes_offset; i += kLineBytes)
        __builtin_prefetch(panel.scales + kPrefetchBytes + i, 0, 0);
    if (p.args->r != 0) prefetch_salient(*p.args, panel_idx * kPanelRows, panel_rows(w, panel_idx));

    int64_t group = 0, left_in_group = chunks_per_group;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        for (int sub = 0; sub < Tile::kSubs; ++sub) {
            Tile tile;
            const int64_t at = group * kPanelRows + sub * S::kLanes;
            tile.start(panel.template twice_zero<S>(at), offsets);
            for (int64_t b = 0; b < blocks; ++b) {
                const uint8_t* block = codes + b * kBits * kLineBytes;
                if (sub == 0)
                    for (int i = 0; i < kBits; ++i)
                        __builtin_prefetch(block + kPrefetchBytes + i * kLineBytes, 0, 0);
                tile.block(block, sub, digits + b * Tile::kBlockBytes);
            }
            const F scale = S::load_any(panel.scales + at * 2, w.scale_dtype);
            const auto is_half = S::template sar<31>(S::template shl<31>(panel.template twice_zero<S>(at)));
            for (int m = 0; m < kRows; ++m) {
                const F total = tile.total(m, is_half, offsets);
                y[m][sub] = S::mul_add(S::mul_f(total, scale), S::set_f(units[m]), y[m][sub]);
            }
        }
        codes += blocks * kBits * kLineBytes;
        digits += blocks * Tile::kBlockBytes;
        offsets += kRows * Tile::kParts;
        units += kRows;
        if (--left_in_group == 0) ++group, left_in_group = chunks_per_group;
    }

    const int64_t rows = p.args->m - row0 < kRows ? p.args->m - row0 : kRows;
    alignas(64) float out[kRows * kPanelRows];
    for (int m = 0; m < kRows; ++m)
        for (int sub = 0; sub < Tile::kSubs; ++sub)
            S::store_f(out + m * kPanelRows + sub * S::kLanes, y[m][sub]);
    if (p.args->r != 0) add_salient<S, Tile::kSubs>(p, panel_idx * kPanelRows, row0, rows, out);
    for (int64_t m = 0; m < rows; ++m)
        store_row<S>(*p.args, row0 + m, panel_idx * kPanelRows, panel_rows(w, panel_idx),
                     out + m * kPanelRows);
}

// The same for the tile that begins `left` tokens before the end: kRows is the largest that it may have.
template <class S, int kBits, int kDigits, int kRows>
void stream_tile(const MainLoop& p, int64_t panel, int64_t row0, int64_t left) {
    constexpr int kSmaller = largest_power_below(kRows);
    if (kRows == 1 || left > kSmaller) return stream_panel<S, kBits, kDigits, kRows>(p, panel, row0);
    stream_tile<S, kBits, kDigits, kSmaller>(p, panel, row0, left);
}

template <class S, int kBits, int kDigits>
void stream_range(const MainLoop& p, int64_t panel_begin, int64_t panel_end) {
    constexpr int kTile = tile_rows<S>(kDigits);
    const int64_t m = p.args->m, tile_bytes = p.args->weight.k * kTile * kDigits;
    const int64_t pass = (kDigitCacheBytes / tile_bytes > 1 ? kDigitCacheBytes / tile_bytes : 1) * kTile;
    for (int64_t first = 0; first < m; first += pass)
        for (int64_t panel = panel_begin; panel < panel_end; ++panel)
            for (int64_t row = first; row < m && row < first + pass; row += kTile)
                stream_tile<S, kBits, kDigits, kTile>(p, panel, row, m - row);
}

template <class S, int kBits>
void stream_bits(const MainLoop& p, int64_t panel_begin, int64_t panel_end) {
    switch (p.digits.num_digits) {
        case 1:
            return stream_range<S, kBits, 1>(p, panel_begin, panel_end);
        case 2:
            return stream_range<S, kBits, 2>(p, panel_begin, panel_end);
        case 3:
            return stream_range<S, kBits, 3>(p, panel_begin, panel_end);
        default:
            return stream_range<S, kBits, 4>(p, panel_begin, panel_end);
    }
}

template <class S>
void stream_gemm(const MainLoop& p, int64_t panel_begin, int64_t panel_end) {
    p.args->weight.bits == 3 ? stream_bits<S, 3>(p, panel_begin, panel_end)
                             : stream_bits<S, 4>(p, panel_begin, panel_end);
}

}  // namespace
}  // namespace rosaq::cpu
