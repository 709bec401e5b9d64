// The stages of one fused GEMM, as each instruction set provides them. No torch, no threads: a stage works on
// a range of units that the caller (gemm.cpp) hands out, and the result of a unit never depends on the range
// it came in.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace rosaq::cpu {

// Activations are cut into chunks of at most this many channels; a chunk lies within one quantisation group.
constexpr int64_t kMaxChunkK = 128;

static constexpr int64_t chunk_k(int64_t group_size) {
    for (int64_t c = kMaxChunkK; c > kBlockK; c -= kBlockK)
        if (group_size % c == 0) return c;
    return kBlockK;
}

// t as fixed point: per row and chunk c,  t = exponent[c] * sum_p digits[p] * 256^(num_digits-1-p).
struct Digits {
    int num_digits = 0;        // 3 or 4 signed bytes
    int8_t* planes = nullptr;  // [m, k / chunk, num_digits, chunk], rows row_bytes apart
    int64_t row_bytes = 0;     // an odd number of cache lines: tokens must not share L1 sets
    int32_t* sums = nullptr;   // [m, k / chunk, num_digits]: sum of each digit over the chunk
    float* exponents =
        nullptr;  // [m, k / chunk]: a power of two; 0 for a chunk of zeros; NaN if one is not finite
};

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

// Everything the main loops read. t and s are float32 with row strides ldt and lds.
struct MainLoop {
    const FusedGemmArgs* args = nullptr;
    const float* t = nullptr;
    int64_t ldt = 0;
    const float* s = nullptr;
    int64_t lds = 0;
    Digits digits;
};

// The largest m for which stream_gemm beats block_gemm, measured: by x of 16 bits (3 digits) and of 32 (4
// digits).
struct StreamLimit {
    int64_t tokens_16bit, tokens_32bit;
};

struct KernelTable {
    const char* name;
    int64_t block_panels;  // panels per unit of block_gemm
    int64_t dense_cols;    // columns per unit of dense_product

    void (*to_float)(const Buffer& x, int64_t row, int64_t k, float* t_row);
    void (*dense_product)(const DenseProduct& p, int64_t unit_begin, int64_t unit_end);
    // Many tokens: dequantise a tile into cache, float32 multiply-add. Unit: block_panels panels.
    void (*block_gemm)(const MainLoop& p, int64_t unit_begin, int64_t unit_end);

    // Few tokens: codes x digits in exact integers, every weight byte read from memory once. Unit: one
    // panel. Null with a limit of 0 where there is no byte dot product.
    StreamLimit stream_limit;
    void (*make_digits)(const float* t, int64_t ldt, int64_t row, int64_t k, int64_t chunk,
                        const Digits& out);
    void (*stream_gemm)(const MainLoop& p, int64_t panel_begin, int64_t panel_end);
};

extern const KernelTable kPortableKernels;
#ifdef ROSAQ_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VnniKernels;
#endif

}  // namespace rosaq::cpu
