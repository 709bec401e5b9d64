// The packed layout of the CUDA kernels, bit by bit. Packer, kernels and the emulator take their maps from
// here.
//
//   blob    = header (128 bytes) | codes | scales | zeros (asymmetric only) | trailer
//   codes   = slabs of 128 rows; in a slab the blocks of 128 k one after another; in a block 4 records
//   record  = 32 rows x 128 k, what one warp multiplies between two barriers: `bits` planes of 32 lanes x 16
//   bytes,
//             so a lane fetches its part with `bits` conflict-free 16-byte loads
//   scales  = [slab][group][128 rows] 16-bit, zeros the same in bytes; groups are padded to whole blocks of k
//
// Which weights a lane holds follows from mma.m16n8k16 with W as its 16-row operand. Lane 4 * gid + tid holds
// rows 4 * gid .. 4 * gid + 3 of the record: two MMA row tiles (rows gid and gid + 8 of each), numbered so
// that the four rows of a lane are neighbours in y and their scales one 8-byte load. In every 32 k it holds 8
// neighbours, 8 * tid .. 8 * tid + 7: the sum over k does not care about the order, and so a lane reads its
// activations 16 bytes at a time.
//
// A pair is two codes of one row and neighbouring k, in the two halves of a word, as the halves of an MMA
// register.
//   4 bits: a word holds the 4 pairs of one MMA at bits 0, 4, 8, 12 of each half.
//   3 bits: a half of 16 bits holds five codes and one spare bit: codes at 0, 3, 6, 10, 13, the spare bit
//   at 9. Three
//           words hold 15 pairs, their spare bits the 16th (bit i in word i): 16 pairs, 64 k of one row tile,
//           in exactly 96 bits. Shifting word i right by 9 - i brings its last two codes into the mantissa
//           range and its spare bit to bit i: 16 pairs cost 18 lop3 and 3 shifts.
#pragma once

#include <cstdint>

#include "layout.h"
#include "macros.h"

namespace rosaq::cuda {

constexpr int kRecordRows = 32;
constexpr int kBlockK = 128;
constexpr int kSlabRows = 128;
constexpr int kSlabRecords = kSlabRows / kRecordRows;
constexpr int kLanes = 32;
constexpr int kLoadBytes = 16;
constexpr int kPairs = 16;  // of a 3-bit chunk
constexpr int64_t kHeaderBytes = 128;
constexpr uint32_t kLayoutVersion = 2;
// A blob's size tells the host, which may not wait for the device to read the header, what it holds: blobs of
// the CPU are multiples of 64 bytes, these are not, and the remainder tells layout version and scale dtype.
constexpr int64_t kTrailerUnit = 16;
static_assert(kLayoutVersion <= 2, "a third version needs a trailer of more than 128 bytes");

static_assert(kLanes * kLoadBytes * 8 == kRecordRows * kBlockK,
              "one plane of a record is one bit per weight");

// Where one weight of a record is: bit `bit` of 32-bit word `word` (of the lane's 4 * bits words), and the
// lane.
struct CodePlace {
    int lane, row_tile, row_half;  // the MMA's row gid + 8 * row_half in row tile row_tile
    int step;                      // which of the 8 MMA steps of the block
    int k_half;                    // 0: registers a0, a1; 1: a2, a3
    int high;                      // 1: the upper half of the register
};

constexpr CodePlace code_place(int row, int k) {
    CodePlace p{};
    const int tid = k % 32 / 8;
    p.lane = row / 4 * 4 + tid;
    p.row_tile = row % 4 / 2;
    p.row_half = row % 2;
    p.step = k / 32 * 2 + k % 8 / 4;
    p.k_half = k % 4 / 2;
    p.high = k % 2;
    return p;
}

// Register a0..a3 of the MMA that a place belongs to.
constexpr int mma_register(const CodePlace& p) {
    return p.k_half * 2 + p.row_half;
}

// 4 bits: word of (row tile, step); pair i of it is register a_i, at bit 4 * i of each half.
constexpr int word_of_4bit(int row_tile, int step) {
    return step / 2 * 4 + row_tile * 2 + step % 2;
}

// 3 bits: first of the three words of (row tile, half of the block); pair number of (step within the half,
// register).
constexpr int words_of_3bit(int row_tile, int k_half_block) {
    return (k_half_block * 2 + row_tile) * 3;
}
constexpr int kFieldsPerWord = 5;
constexpr int kSpareBit = 9;
constexpr int field_bit(int field) {
    return field < 3 ? 3 * field : 10 + 3 * (field - 3);
}

// Bit number `b` of the code at (row, k) of a record: lane, word (0 .. 4 * bits - 1), bit of the word.
struct BitPlace {
    int lane, word, bit;
};
constexpr BitPlace bit_place(int bits, int row, int k, int b) {
    const CodePlace p = code_place(row, k);
    const int reg = mma_register(p), high = 16 * p.high;
    if (bits == 4) return {p.lane, word_of_4bit(p.row_tile, p.step), high + 4 * reg + b};
    const int first = words_of_3bit(p.row_tile, p.step / 4), pair = p.step % 4 * 4 + reg;
    if (pair == kPairs - 1) return {p.lane, first + b, high + kSpareBit};
    return {p.lane, first + pair / kFieldsPerWord, high + field_bit(pair % kFieldsPerWord) + b};
}

// Byte offset of word `word` of a lane inside its record.
constexpr int word_offset(int lane, int word) {
    return (word / 4 * kLanes + lane) * kLoadBytes + word % 4 * 4;
}

constexpr bool layout_is_a_bijection(int bits) {
    bool used[kLanes * 16 * 32] = {};
    for (int row = 0; row < kRecordRows; row += 7)  // a sample of rows: the compiler counts steps
        for (int k = 0; k < kBlockK; ++k)
            for (int b = 0; b < bits; ++b) {
                const BitPlace p = bit_place(bits, row, k, b);
                bool& slot = used[(p.lane * 16 + p.word) * 32 + p.bit];
                if (slot || p.word >= 4 * bits) return false;
                slot = true;
            }
    return true;
}
static_assert(layout_is_a_bijection(3) && layout_is_a_bijection(4), "no two codes may share a bit");

// Sizes and offsets of a blob, in bytes from its start.
struct BlobLayout {
    int64_t slabs, k_blocks;  // n / 128 and k / 128, rounded up
    int64_t group_size;       // 32, 64, 128, or k: one group for the whole row
    int64_t groups;           // of a padded row
    int64_t codes_offset, scales_offset, zeros_offset, total_bytes;
    int64_t record_bytes, block_bytes;
};

constexpr BlobLayout blob_layout(int64_t n, int64_t k, int bits, int64_t group_size, bool symmetric,
                                 uint32_t scale_dtype) {
    BlobLayout l{};
    l.slabs = ceil_div<int64_t>(n, kSlabRows);
    l.k_blocks = ceil_div<int64_t>(k, kBlockK);
    l.group_size = group_size;
    l.groups = group_size >= k ? 1 : l.k_blocks * (kBlockK / group_size);
    l.record_bytes = int64_t{kLanes} * kLoadBytes * bits;
    l.block_bytes = l.record_bytes * kSlabRecords;
    l.codes_offset = kHeaderBytes;
    l.scales_offset = l.codes_offset + l.slabs * l.k_blocks * l.block_bytes;
    l.zeros_offset = l.scales_offset + l.slabs * l.groups * kSlabRows * 2;
    const int64_t zeros_bytes = symmetric ? 0 : l.slabs * l.groups * kSlabRows;
    l.total_bytes = round_up<int64_t>(l.zeros_offset + zeros_bytes, 128) +
                    kTrailerUnit * (4 * (kLayoutVersion - 1) + 1 + (scale_dtype != 0 ? 1 : 0));
    return l;
}

// The group sizes the kernels have a path for.
constexpr bool is_group_size(int64_t group_size, int64_t k) {
    return group_size == 32 || group_size == 64 || group_size == 128 || group_size == k;
}

}  // namespace rosaq::cuda
