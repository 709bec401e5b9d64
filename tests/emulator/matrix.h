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

}  // namespace emu
