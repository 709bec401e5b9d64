// The packed weight layout, bit by bit. Packer and kernels both take their index maps from here.
//
//   blob   = header (64 bytes) | panel 0 | panel 1 | ...             every part starts on a 64-byte line
//   panel  = 16 rows of W:  scales [groups][16] 16-bit | zeros [groups][16] uint8 (asymmetric only) | codes
//   codes  = for every block of 32 k:  `bits` lines of 16 uint32, word i of lane l belongs to row 16 * panel
//   + l
//
// A block holds 8 quads of 4 consecutive k. In a word, byte b of a quad belongs to k = 4 * quad + b, so
// masking a word gives 4 bytes that a u8 x i8 dot instruction takes as they are, against 4 consecutive
// activations.
//
//   4 bits: word w holds quad 2w in bits 0-3 and quad 2w+1 in bits 4-7 of every byte.
//   3 bits: words 0-2 hold quads 0-5 in bits 0-2 and 3-5; the spare bits 6-7 of words 0 and 1 are bits 0-1 of
//   quads 6
//           and 7, and bits 6 and 7 of word 2 are their bit 2. So 32 codes take exactly 96 bits.
//
// Rows past n in the last panel have code 0 and scale 0.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rosaq {

constexpr int kPanelRows = 16;
constexpr int kBlockK = 32;
constexpr int kQuadK = 4;
constexpr int kQuads = kBlockK / kQuadK;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kHeaderBytes = 64;
constexpr uint32_t kLayoutVersion = 2;
constexpr char kMagic[8] = {'R', 'O', 'S', 'A', 'Q', 'p', 'k', '\n'};

static_assert(kPanelRows * 4 == kLineBytes, "a line is one uint32 per row of the panel");

// A zero point on disk is a byte: a whole number in bits 0-6, and bit 7 is one half. Packed it is the number
// of halves, the same byte turned by one bit.
static constexpr uint8_t twice_zero_of_disk(uint8_t zero) {
    return static_cast<uint8_t>(zero << 1 | zero >> 7);
}

static constexpr uint8_t disk_of_twice_zero(uint8_t twice) {
    return static_cast<uint8_t>(twice >> 1 | twice << 7);
}

// Where one quad of a block is: ((word[low_word] >> low_shift) & low_mask) | ((word[2] >> high_shift) &
// high_mask), per byte.
struct QuadPlace {
    int low_word, low_shift;
    uint32_t low_mask;
    int high_shift;
    uint32_t high_mask;  // 0: the quad is whole in low_word
};
constexpr int kHighWord = 2;

static constexpr QuadPlace quad_place(int bits, int quad) {
    if (bits == 4) return {quad / 2, 4 * (quad % 2), 0x0fu, 0, 0u};
    if (quad < 6) return {quad / 2, 3 * (quad % 2), 0x07u, 0, 0u};
    return {quad - 6, 6, 0x03u, quad - 2,
            0x04u};  // bit 6 (quad 6) or 7 (quad 7) of word 2 comes down to bit 2
}

static constexpr uint32_t in_every_byte(uint32_t mask) {
    return mask * 0x01010101u;
}

// The code of in-block position j (0-31) from the block's `bits` words of one row.
static constexpr uint32_t extract_code(int bits, const uint32_t* words, int j) {
    const QuadPlace p = quad_place(bits, j / kQuadK);
    const int byte_shift = 8 * (j % kQuadK);
    const uint32_t low = (words[p.low_word] >> (byte_shift + p.low_shift)) & p.low_mask;
    if (p.high_mask == 0) return low;
    return low | ((words[kHighWord] >> (byte_shift + p.high_shift)) & p.high_mask);
}

// Puts a code at in-block position j; the words must hold 0 there.
static constexpr void deposit_code(int bits, uint32_t* words, int j, uint32_t code) {
    const QuadPlace p = quad_place(bits, j / kQuadK);
    const int byte_shift = 8 * (j % kQuadK);
    words[p.low_word] |= (code & p.low_mask) << (byte_shift + p.low_shift);
    if (p.high_mask != 0) words[kHighWord] |= (code & p.high_mask) << (byte_shift + p.high_shift);
}

// The disk layout (hardware neutral): a dense little-endian bit string per row, code j at bits [j * bits,
// (j+1) * bits). 32 codes take exactly `bits` words, so a block never straddles a word of its neighbour.
static constexpr uint32_t extract_disk_code(int bits, const uint32_t* words, int j) {
    const int bit = j * bits, word = bit / 32, shift = bit % 32;
    uint32_t code = words[word] >> shift;
    if (shift + bits > 32) code |= words[word + 1] << (32 - shift);
    return code & ((1u << bits) - 1u);
}

static constexpr void deposit_disk_code(int bits, uint32_t* words, int j, uint32_t code) {
    const int bit = j * bits, word = bit / 32, shift = bit % 32;
    words[word] |= code << shift;
    if (shift + bits > 32) words[word + 1] |= code >> (32 - shift);
}

static constexpr bool layout_round_trips(int bits) {
    for (int j = 0; j < kBlockK; ++j) {
        uint32_t packed[4] = {}, disk[4] = {};
        const uint32_t code = (1u << bits) - 1u;
        deposit_code(bits, packed, j, code);
        deposit_disk_code(bits, disk, j, code);
        for (int i = 0; i < kBlockK; ++i) {
            if (extract_code(bits, packed, i) != (i == j ? code : 0u)) return false;
            if (extract_disk_code(bits, disk, i) != (i == j ? code : 0u)) return false;
        }
    }
    return true;
}
static_assert(layout_round_trips(3) && layout_round_trips(4), "no two codes may share a bit");

// Byte counts and offsets of a blob.
struct PanelLayout {
    int64_t num_panels, groups, zeros_offset, codes_offset, panel_bytes, total_bytes;
};

static constexpr PanelLayout panel_layout(int64_t n, int64_t k, int bits, int64_t group_size,
                                          bool symmetric) {
    PanelLayout l{};
    l.num_panels = ceil_div<int64_t>(n, kPanelRows);
    l.groups = k / group_size;
    l.zeros_offset = round_up(l.groups * kPanelRows * 2, kLineBytes);
    l.codes_offset = l.zeros_offset + (symmetric ? 0 : round_up(l.groups * kPanelRows, kLineBytes));
    l.panel_bytes = l.codes_offset + k / kBlockK * bits * kLineBytes;
    l.total_bytes = kHeaderBytes + l.num_panels * l.panel_bytes;
    return l;
}

// Opens every blob. Plain little-endian integers, no padding.
struct PackedHeader {
    char magic[8];
    uint32_t layout_version;
    uint32_t bits;
    uint32_t symmetric;
    uint32_t scale_dtype;  // DType of params.h
    int64_t n, k, group_size, total_bytes;
    uint64_t reserved;
};
static_assert(sizeof(PackedHeader) == kHeaderBytes, "the first panel must start on a 64-byte line");

}  // namespace rosaq
