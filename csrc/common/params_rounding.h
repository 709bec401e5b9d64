// Rounding inside a panel of GPTQ: columns that depend on each other one by one, rows that do not at all.
#pragma once

#include <cstdint>

namespace rosaq {

constexpr int kMaxPanel = 128;  // columns, p

// Row-major float32. "Columns are read one by one": row j of [p, n] is column j of the weight.
//
// Every product, sum and quotient is rounded on its own and comes in the order of the columns, so each
// backend gives the same bits.
struct RoundingArgs {
    int64_t p = 0, n = 0;
    int bits = 0;
    const float* state = nullptr;  // [p, n] round: the weight now; sweep: half the gradient of the loss
    const float* links = nullptr;  // [p, p] links[i, j] leads from column i to j > i: factor or gram
    const float* scale = nullptr;  // round: [n]; sweep: [p, n]
    const float* zero = nullptr;   // as scale
    const float* known = nullptr;  // sweep: [p, n] the codes so far
    float* codes = nullptr;        // [p, n]
    float* passed = nullptr;       // [p, n] what later columns hear of: errors or moves
};

}  // namespace rosaq
