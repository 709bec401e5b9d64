// Few tokens: y[m,n] = sum over chunks of scale * 2^e * sum_k (code - zero) * digit, the inner sum in exact
// integers.
//
// Why integers: a u8 x i8 dot does 4 multiplies per lane where float32 does one, and three (16-bit x) or four
// (float32 x) 8-bit digits carry as many bits as the activations have, so nothing is lost by it. Integer sums
// do not depend on their order: every instruction set, thread count and batch split gives the same bits.
// Bound by reading W once: 0.5 byte per weight for 4 bits, 0.375 for 3.
#pragma once

#include "kernels.h"
#include "salient.h"
#include "unpack.h"

namespace rosaq::cpu {
namespace {

// Into L2, far enough ahead to cover DRAM latency. Into L1 one token took 1.1 to 1.2 times as long at 4096 x
// 4096, with no prefetch 1.3 to 1.4 times (medians on a shared machine, so roughly).
constexpr int64_t kPrefetchBytes = 8192;

template <class S, int kBits, int kDigits, int kRows>
struct StreamTile {
    static constexpr int kSubs = kPanelRows / S::kLanes;
    // Two sets of accumulators for a single token: fewer than 5 chains cannot hide the latency of dot.
    static constexpr int kSets = kRows == 1 && !S::kPairSums ? 2 : 1;
    using I = typename S::I;
    using F = typename S::F;
    using Sums = I[kSets][kRows][kDigits];
    Sums acc;

    // Start at -zero * sum(digit), so that what follows adds up (code - zero) * digit.
    __attribute__((always_inline)) void start(const MainLoop& p, const PanelView& panel, int64_t row0,
                                              int64_t chunk, int64_t num_chunks, int64_t group, int sub) {
        const I zero = p.args->weight.symmetric
                           ? S::set_i(1 << (kBits - 1))
                           : S::load_u8(panel.zeros + group * kPanelRows + sub * S::kLanes);
        for (int m = 0; m < kRows; ++m) {
            const int32_t* sums = p.digits.sums + ((row0 + m) * num_chunks + chunk) * kDigits;
            for (int d = 0; d < kDigits; ++d) {
                acc[0][m][d] = S::mul_i(zero, S::set_i(-sums[d]));
                if constexpr (kSets == 2) acc[1][m][d] = S::zero_i();
            }
        }
    }

    template <int kQuad>
    __attribute__((always_inline)) static void step(Sums& sums, const BlockWords<S, kBits>& words,
                                                    const int8_t* digits, int64_t row_bytes, int64_t chunk) {
        const I codes = words.template quad<kQuad>();
        for (int m = 0; m < kRows; ++m)
            for (int d = 0; d < kDigits; ++d) {
                I& a = sums[kQuad % kSets][m][d];
                a = S::dot(a, codes, digits + m * row_bytes + d * chunk + kQuad * kQuadK);
            }
    }

    __attribute__((always_inline)) static void all_steps(Sums& sums, const BlockWords<S, kBits>& words,
                                                         const int8_t* digits, int64_t row_bytes,
                                                         int64_t chunk) {
        step<0>(sums, words, digits, row_bytes, chunk), step<1>(sums, words, digits, row_bytes, chunk);
        step<2>(sums, words, digits, row_bytes, chunk), step<3>(sums, words, digits, row_bytes, chunk);
        step<4>(sums, words, digits, row_bytes, chunk), step<5>(sums, words, digits, row_bytes, chunk);
        step<6>(sums, words, digits, row_bytes, chunk), step<7>(sums, words, digits, row_bytes, chunk);
    }

    __attribute__((always_inline)) void block(const uint8_t* codes, int sub, const int8_t* digits,
                                              int64_t row_bytes, int64_t chunk) {
        const BlockWords<S, kBits> words(codes, sub);
        if constexpr (!S::kPairSums) {
            all_steps(acc, words, digits, row_bytes, chunk);
        } else {
            // 16-bit sums of pairs, widened once per block: 8 quads of 2 products of at most 15 * 128 fit.
            static_assert(kQuads * 2 * 15 * 128 < 1 << 15, "pair sums of a block must not overflow");
            Sums pairs;
            for (int m = 0; m < kRows; ++m)
                for (int d = 0; d < kDigits; ++d) pairs[0][m][d] = S::zero_i();
            all_steps(pairs, words, digits, row_bytes, chunk);
            for (int m = 0; m < kRows; ++m)
                for (int d = 0; d < kDigits; ++d)
                    acc[0][m][d] = S::add_i(acc[0][m][d], S::widen_pairs(pairs[0][m][d]));
        }
    }

    // The chunk's sum as a float: digits pair up in int32 exactly, two conversions round once each.
    __attribute__((always_inline)) F total(int m) const {
        I a[kDigits];
        for (int d = 0; d < kDigits; ++d) {
            a[d] = acc[0][m][d];
            if constexpr (kSets == 2) a[d] = S::add_i(a[d], acc[1][m][d]);
        }
        const I low = S::add_i(S::template shl<8>(a[kDigits - 2]), a[kDigits - 1]);
        I high = a[0];
        if constexpr (kDigits == 4) high = S::add_i(S::template shl<8>(a[0]), a[1]);
        return S::add_f(S::mul_f(S::from_int(high), S::set_f(65536.0f)), S::from_int(low));
    }
};

template <class S, int kBits, int kDigits, int kRows>
void stream_panel(const MainLoop& p, int64_t panel_idx, int64_t row0) {
    using Tile = StreamTile<S, kBits, kDigits, kRows>;
    using F = typename S::F;
    const PackedWeight& w = p.args->weight;
    const PanelView panel(w, panel_idx);
    const int64_t chunk_size = chunk_k(w.group_size), num_chunks = w.k / chunk_size;
    const int64_t chunks_per_group = w.group_size / chunk_size, blocks = chunk_size / kBlockK;
    const int8_t* digits = p.digits.planes + row0 * p.digits.row_bytes;
    const uint8_t* codes = panel.codes;

    F y[kRows][Tile::kSubs];
    for (int m = 0; m < kRows; ++m)
        for (int sub = 0; sub < Tile::kSubs; ++sub) y[m][sub] = S::zero_f();

    int64_t group = 0, left_in_group = chunks_per_group;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        for (int sub = 0; sub < Tile::kSubs; ++sub) {
            Tile tile;
            tile.start(p, panel, row0, chunk, num_chunks, group, sub);
            for (int64_t b = 0; b < blocks; ++b) {
                const uint8_t* block = codes + b * kBits * kLineBytes;
                if (sub == 0)
                    for (int i = 0; i < kBits; ++i)
                        __builtin_prefetch(block + kPrefetchBytes + i * kLineBytes, 0, 2);
                tile.block(block, sub, digits + b * kBlockK, p.digits.row_bytes, chunk_size);
            }
            const F scale =
                S::load_any(panel.scales + (group * kPanelRows + sub * S::kLanes) * 2, w.scale_dtype);
            for (int m = 0; m < kRows; ++m) {
                const F unit = S::set_f(p.digits.exponents[(row0 + m) * num_chunks + chunk]);
                y[m][sub] = S::add_f(y[m][sub], S::mul_f(S::mul_f(tile.total(m), unit), scale));
            }
        }
        codes += blocks * kBits * kLineBytes;
        digits += kDigits * chunk_size;
        if (--left_in_group == 0) ++group, left_in_group = chunks_per_group;
    }

    for (int m = 0; m < kRows; ++m) {
        alignas(64) float row[kPanelRows];
        for (int sub = 0; sub < Tile::kSubs; ++sub) S::store_f(row + sub * S::kLanes, y[m][sub]);
        add_salient_dots<S>(p, panel_idx, row0 + m, row);
        store_row<S>(*p.args, row0 + m, panel_idx * kPanelRows, panel_rows(w, panel_idx), row);
    }
}

template <class S, int kBits, int kDigits, int kRows>
void stream_rest(const MainLoop& p, int64_t panel, int64_t row) {
    if constexpr (kRows > 0) {
        if (p.args->m - row == kRows) return stream_panel<S, kBits, kDigits, kRows>(p, panel, row);
        stream_rest<S, kBits, kDigits, kRows - 1>(p, panel, row);
    }
}

template <class S, int kBits, int kDigits>
void stream_range(const MainLoop& p, int64_t panel_begin, int64_t panel_end) {
    constexpr int kRows = S::kStreamRows;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        int64_t row = 0;
        for (; row + kRows <= p.args->m; row += kRows) stream_panel<S, kBits, kDigits, kRows>(p, panel, row);
        stream_rest<S, kBits, kDigits, kRows - 1>(p, panel, row);
    }
}

template <class S>
void stream_gemm(const MainLoop& p, int64_t panel_begin, int64_t panel_end) {
    const bool three = p.digits.num_digits == 3;
    if (p.args->weight.bits == 3)
        return three ? stream_range<S, 3, 3>(p, panel_begin, panel_end)
                     : stream_range<S, 3, 4>(p, panel_begin, panel_end);
    return three ? stream_range<S, 4, 3>(p, panel_begin, panel_end)
                 : stream_range<S, 4, 4>(p, panel_begin, panel_end);
}

}  // namespace
}  // namespace rosaq::cpu
