// Codes of a panel, 4 at a time per row, for any instruction set S.
#pragma once

#include "../common/layout.h"
#include "../common/params.h"

namespace rosaq::cpu {
namespace {

// The `bits` words of one 32-k block, for the kLanes rows that start at row `sub * kLanes` of the panel.
template <class S, int kBits>
struct BlockWords {
    typename S::I word[kBits];

    __attribute__((always_inline)) explicit BlockWords(const uint8_t* block, int sub) {
        for (int i = 0; i < kBits; ++i) word[i] = S::load_i(block + i * kLineBytes + sub * S::kLanes * 4);
    }

    // Byte b of every lane: the code of k = 4 * kQuad + b.
    template <int kQuad>
    __attribute__((always_inline)) typename S::I quad() const {
        constexpr QuadPlace p = quad_place(kBits, kQuad);
        const auto low = S::and_i(S::template shr<p.low_shift>(word[p.low_word]),
                                  S::set_i(static_cast<int32_t>(in_every_byte(p.low_mask))));
        if constexpr (p.high_mask == 0) {
            return low;
        } else {
            const auto high = S::and_i(S::template shr<p.high_shift>(word[kHighWord]),
                                       S::set_i(static_cast<int32_t>(in_every_byte(p.high_mask))));
            return S::or_i(low, high);
        }
    }
};

// One panel's three streams.
struct PanelView {
    const uint8_t *scales, *zeros, *codes;
    int32_t common_zero;  // twice the zero point of a symmetric weight; 0 where zeros has them

    __attribute__((always_inline)) PanelView(const PackedWeight& w, int64_t panel) {
        scales = w.panels + panel * w.layout.panel_bytes;
        zeros = scales + w.layout.zeros_offset;
        codes = scales + w.layout.codes_offset;
        common_zero = w.symmetric ? 1 << w.bits : 0;
    }

    // Of the kLanes rows from `at` on, which counts groups and rows.
    template <class S>
    __attribute__((always_inline)) typename S::I twice_zero(int64_t at) const {
        return common_zero != 0 ? S::set_i(common_zero) : S::load_u8(zeros + at);
    }
};

// Rows of the panel that exist (n is a multiple of 8, so the last panel has 8 or 16).
ROSAQ_INLINE int64_t panel_rows(const PackedWeight& w, int64_t panel) {
    const int64_t left = w.n - panel * kPanelRows;
    return left < kPanelRows ? left : kPanelRows;
}

}  // namespace
}  // namespace rosaq::cpu
