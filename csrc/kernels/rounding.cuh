// GPTQ and coordinate descent inside a panel: a thread a row of the weight, columns one by one. What a row
// passes on stays in shared memory, where only its own thread reads it; a column is read once, when its turn
// comes, and hears of all before it in registers.
#pragma once

#include "../common/params_rounding.h"
#include "../device/cuda_compat.h"

namespace rosaq::cuda {

constexpr int kRoundingRows = 64;  // of a block: two warps, so that few rows still spread over many SMs
constexpr int kStripColumns = 16;  // that hear of earlier ones together

// Links into the columns of a strip, from all columns up to its end.
struct alignas(16) Strip {
    float links[kMaxPanel][kStripColumns];
};

// Columns [j0, ...) that the panel has not stay 0.
ROSAQ_DEVICE void load_strip(const RoundingArgs& a, int p, int j0, Strip& strip) {
    const int column = static_cast<int>(threadIdx.x) % kStripColumns, j = j0 + column;
    const int end = min(j0 + kStripColumns, p);
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x) / kStripColumns; i < end; i += kRoundingRows / kStripColumns)
        strip.links[i][column] = j < p ? __ldg(a.links + i * p + j) : 0.0f;
}

// clamp(round(w / scale + zero), 0, top), half to even, NaN as it is.
ROSAQ_DEVICE float nearest_code(float w, float scale, float zero, float top) {
    const float place = __fadd_rn(__fdiv_rn(w, scale), zero);
    const float above = place < 0.0f ? 0.0f : place;
    return rintf(above > top ? top : above);
}

// (code - zero) * scale
ROSAQ_DEVICE float from_code(float code, float scale, float zero) {
    return __fmul_rn(__fsub_rn(code, zero), scale);
}

// What a row has beside its state, and how a column is done. Rows past the last divide by 1.
struct RoundRow {
    float scale, zero, top;
    ROSAQ_DEVICE RoundRow(const RoundingArgs& a, int64_t row, bool inside)
        : scale(inside ? a.scale[row] : 1.0f),
          zero(inside ? a.zero[row] : 0.0f),
          top(static_cast<float>((1 << a.bits) - 1)) {}
    // Loads for columns of a strip, all before the first is used.
    ROSAQ_DEVICE void load(const RoundingArgs&, int, int64_t, bool) {}
    static ROSAQ_DEVICE float hear(float state, float product) { return __fsub_rn(state, product); }
    ROSAQ_DEVICE float step(int, float state, float diagonal, float& passed) const {
        const float code = nearest_code(state, scale, zero, top);
        passed = __fdiv_rn(__fsub_rn(state, from_code(code, scale, zero)), diagonal);
        return code;
    }
};

struct SweepRow {
    float scale[kStripColumns], zero[kStripColumns], known[kStripColumns], top;
    ROSAQ_DEVICE SweepRow(const RoundingArgs& a, int64_t, bool)
        : top(static_cast<float>((1 << a.bits) - 1)) {}
    ROSAQ_DEVICE void load(const RoundingArgs& a, int column, int64_t at, bool inside) {
        scale[column] = inside ? a.scale[at] : 1.0f;
        zero[column] = inside ? a.zero[at] : 0.0f;
        known[column] = inside ? a.known[at] : 0.0f;
    }
    static ROSAQ_DEVICE float hear(float state, float product) { return __fadd_rn(state, product); }
    ROSAQ_DEVICE float step(int column, float state, float diagonal, float& passed) const {
        const float old = from_code(known[column], scale[column], zero[column]);
        const float best = __fsub_rn(old, __fdiv_rn(state, diagonal));
        const float code = nearest_code(best, scale[column], zero[column], top);
        passed = __fmul_rn(__fsub_rn(code, known[column]), scale[column]);
        return code;
    }
};

template <class Row>
__global__ void __launch_bounds__(kRoundingRows) rounding_kernel(RoundingArgs a) {
    ROSAQ_SHARED(strip, Strip);
    ROSAQ_SHARED(passed, float[kMaxPanel][kRoundingRows]);
    const int own = static_cast<int>(threadIdx.x), p = static_cast<int>(a.p);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRoundingRows + own;
    Row step(a, row, row < a.n);
    for (int j0 = 0; j0 < p; j0 += kStripColumns) {
        float state[kStripColumns];
#pragma unroll
        for (int c = 0; c < kStripColumns; ++c) {
            const int64_t at = (j0 + c) * a.n + row;
            const bool inside = j0 + c < p && row < a.n;
            state[c] = inside ? a.state[at] : 0.0f;
            step.load(a, c, at, inside);
        }
        load_strip(a, p, j0, strip);
        __syncthreads();
#pragma unroll 4
        for (int j = 0; j < j0; ++j) {
            const float heard = passed[j][own];
#pragma unroll
            for (int c = 0; c < kStripColumns; ++c)
                state[c] = Row::hear(state[c], __fmul_rn(strip.links[j][c], heard));
        }
#pragma unroll
        for (int c = 0; c < kStripColumns; ++c) {
            if (j0 + c >= p) break;
            const float* links = strip.links[j0 + c];
            float told;
            const float code = step.step(c, state[c], links[c], told);
            passed[j0 + c][own] = told;
            if (row < a.n) a.codes[(j0 + c) * a.n + row] = code, a.passed[(j0 + c) * a.n + row] = told;
#pragma unroll
            for (int later = c + 1; later < kStripColumns; ++later)
                state[later] = Row::hear(state[later], __fmul_rn(links[later], told));
        }
        __syncthreads();  // the next strip takes the place of this one
    }
}

}  // namespace rosaq::cuda
