// Fragment layouts of ldmatrix and mma, for a whole warp at once.
#pragma once

#include <cstdint>

namespace emu {

struct LdmatrixOperands {
    uint32_t* r;
    const void* row;
};
void load_matrices(void* const* lanes, int num_matrices, bool transposed);

struct MmaOperands {
    float* d;
    const uint32_t *a, *b;
};
void multiply_m16n8k16(void* const* lanes, bool is_bf16);

// A warp's 16 rows of a wgmma; sums are what the products are added to, in place.
struct WgmmaOperands {
    float* sums;
    const uint32_t* a;
    const char* b;
    int k_step, n_step;
};
void multiply_m16k16(void* const* lanes, int n, bool is_bf16);

}  // namespace emu
