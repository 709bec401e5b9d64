// The stages of one fused GEMM, as each instruction set provides them. No torch, no threads: a stage works on
// a range of units that the caller (gemm.cpp) hands out, and the result of a unit never depends on the range
// it came in.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "../common/params_rounding.h"

namespace rosaq::cpu {

// Activations are cut into chunks of at most this many channels; a chunk lies within one quantisation group.
constexpr int64_t kMaxChunkK = 128;

static constexpr int64_t chunk_k(int64_t group_size) {
    for (int64_t c = kMaxChunkK; c > kBlockK; c -= kBlockK)
        if (group_size % c == 0) return c;
    return kBlockK;
}

constexpr int kMaxDigits = 4;

// t as fixed point: per row and chunk c,  t = 2 units[c] * sum_p digits[p] * 256^(num_digits-1-p).
// Tokens lie in tiles of tile_rows, the last one as tile_size has it, so that the kernel reads one sequential
// stream with distances known at compile time. Tokens past m are zeros.
struct Digits {
    int num_digits = 0;          // signed bytes per activation, 1 to 4
    int64_t tile_rows = 0;       // tokens per tile
    int8_t* planes = nullptr;    // per tile [k / 32, tokens, num_digits, 32]
    int32_t* offsets = nullptr;  // per tile [k / chunk, tokens, parts]: minus the sum of the chunk's integers
    float* units = nullptr;  // per tile [k / chunk, tokens]; 0 for a chunk of zeros, NaN if one is not finite
};

// t as 16-bit integers: per row and chunk c,  t = 2 units[c] * value. Tiles as in Digits, chunks outermost.
struct Words {
    int64_t tokens = 0;         // with those that fill the last tile up
    int64_t tile_rows = 0;      // tokens per tile
    int16_t* values = nullptr;  // per chunk and tile [chunk / 32, tokens, 32]
    float* units = nullptr;     // [k / chunk, tokens]; as those of Digits
};

// Tokens of a tile that begins `left` tokens before the end: a power of two where they do not fill a whole
// one. Every size is an instance of the kernel, and there should be few.
static constexpr int64_t tile_size(int64_t left, int64_t tile_rows) {
    int64_t size = 1;
    while (size < left && size < tile_rows) size *= 2;
    return size < tile_rows ? size : tile_rows;
}

// 192 took 1.05 times as long at 256 tokens, 768 as long as this.
constexpr int64_t kWordTokens = 384;

// At most kWordTokens tokens (a multiple of tile_rows), and as equal shares of m as whole tiles allow:
// threads get as many units each.
static constexpr int64_t word_unit_tokens(int64_t m, int64_t tile_rows) {
    return round_up(ceil_div(m, ceil_div(m, kWordTokens)), tile_rows);
}

static constexpr int largest_power_below(int n) {
    int power = 1;
    while (power * 2 < n) power *= 2;
    return power;
}

// Sums of up to two digits fit 32 bits together; three and four digits are kept as a high and a low part.
static constexpr int digit_parts(int num_digits) {
    return num_digits > 2 ? 2 : 1;
}

// out[m, batch * cols + :] = a[m, batch * rows + :] * b[batch]   (b row-major [rows, cols]; batch 0 for all
// if shared)
struct DenseProduct {
    const float* a = nullptr;
    int64_t lda = 0, m = 0, rows = 0, cols = 0, batches = 1;
    Buffer b;
    bool shared = false;
    float* out = nullptr;
    int64_t ldo = 0;
};

// Not a member, nor the next two: the linker would keep one copy for all instruction sets (README.md).
// One b for several batches: every batch of every token is a row of one product.
static constexpr bool is_flat(const DenseProduct& p) {
    return p.shared && p.batches > 1;
}

static constexpr int64_t num_products(const DenseProduct& p) {
    return p.shared ? 1 : p.batches;
}

static constexpr int64_t rows_each(const DenseProduct& p) {
    return is_flat(p) ? p.m * p.batches : p.m;
}

// Rows of one unit of a dense product: a narrow one has no other way to be shared between threads.
constexpr int64_t kDenseRows = 56;

static constexpr int64_t dense_units(const DenseProduct& p, int64_t cols_per_unit) {
    return ceil_div(rows_each(p), kDenseRows) * num_products(p) * ceil_div(p.cols, cols_per_unit);
}

// Everything the main loops read. t and s are float32 with row strides ldt and lds.
struct MainLoop {
    const FusedGemmArgs* args = nullptr;
    const float* t = nullptr;
    int64_t ldt = 0;
    const float* s = nullptr;
    int64_t lds = 0;
    Digits digits;
    Words words;
};

// The largest m for which stream_gemm beats what comes after it (word_gemm for two digits, else block_gemm),
// by the number of digits (1 to 4). Measured on Zen 4 with 2048 x 2048 and one thread; the kernels_<isa>.cpp
// have it.
struct StreamLimits {
    int64_t tokens[kMaxDigits];
};

struct KernelTable {
    const char* name;
    int64_t block_panels;  // panels per unit of block_gemm
    int64_t dense_cols;    // columns per unit of dense_product, for kDenseRows rows

    void (*to_float)(const Buffer& x, int64_t row, int64_t k, float* t_row);
    void (*dense_product)(const DenseProduct& p, int64_t unit_begin, int64_t unit_end);
    // Many tokens: dequantise a tile into cache, float32 multiply-add. Unit: block_panels panels.
    void (*block_gemm)(const MainLoop& p, int64_t unit_begin, int64_t unit_end);

    // Few tokens: codes x digits in exact integers, every weight byte read from memory once. Unit: one
    // panel. Null with a limit of 0 where there is no byte dot product.
    StreamLimits stream_limits;
    int64_t tile_rows[kMaxDigits];  // tokens per tile, by the number of digits
    void (*make_digits)(const MainLoop& p, int64_t row);
    void (*stream_gemm)(const MainLoop& p, int64_t panel_begin, int64_t panel_end);

    // Many tokens whose activations fit 16 bits (two digits). Unit: word_cols rows of W for word_unit_tokens
    // of the tokens, all rows of W before the next tokens.
    int64_t word_cols, word_tile_rows;
    void (*make_words)(const MainLoop& p, int64_t row);
    void (*word_gemm)(const MainLoop& p, int64_t unit_begin, int64_t unit_end);

    // Codes of a panel, for quantising. Unit: rounding_rows rows of the weight.
    int64_t rounding_rows;
    void (*round_panel)(const RoundingArgs& a, int64_t unit_begin, int64_t unit_end);
    void (*sweep_panel)(const RoundingArgs& a, int64_t unit_begin, int64_t unit_end);
};

extern const KernelTable kPortableKernels;
#ifdef ROSAQ_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VnniKernels;
#endif

}  // namespace rosaq::cpu
