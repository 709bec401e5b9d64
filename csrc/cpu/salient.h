// The 16-bit salient term y += s C^T of one token and one panel, and the store of a finished row.
#pragma once

#include <cstddef>
#include <cstring>

#include "../common/half.h"
#include "kernels.h"

namespace rosaq::cpu {
namespace {

ROSAQ_INLINE float scalar_any(const void* p, DType dtype, int64_t i) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    return dtype == DType::kFloat16 ? float_from_fp16(h) : float_from_bf16(h);
}

ROSAQ_INLINE const void* element(const Buffer& b, int64_t i) {
    return static_cast<const char*>(b.data) + i * dtype_bytes(b.dtype);
}

// row[l] += sum_j s[m, j] * C[panel row l, j]
template <class S>
__attribute__((always_inline)) inline void add_salient_dots(const MainLoop& p, int64_t panel, int64_t m,
                                                            float* row) {
    const FusedGemmArgs& a = *p.args;
    if (a.r == 0) return;
    const float* s = p.s + m * p.lds;
    const int64_t first = panel * kPanelRows,
                  rows = a.weight.n - first < kPanelRows ? a.weight.n - first : kPanelRows;
    const int64_t whole = a.r / S::kLanes * S::kLanes;
    for (int64_t l0 = 0; l0 < rows; l0 += S::kLanes) {
        typename S::F dots[S::kLanes];
        for (int l = 0; l < S::kLanes; ++l) dots[l] = S::zero_f();
        for (int l = 0; l < S::kLanes && l0 + l < rows; ++l)
            for (int64_t j = 0; j < whole; j += S::kLanes)
                dots[l] = S::mul_add(S::load_f(s + j),
                                     S::load_any(element(a.salient_weight, (first + l0 + l) * a.r + j),
                                                 a.salient_weight.dtype),
                                     dots[l]);
        alignas(64) float sums[S::kLanes];
        S::store_f(sums, S::sum_each(dots));
        for (int64_t l = 0; l < S::kLanes && l0 + l < rows; ++l) {
            for (int64_t j = whole; j < a.r; ++j)
                sums[l] += s[j] * scalar_any(a.salient_weight.data, a.salient_weight.dtype,
                                             (first + l0 + l) * a.r + j);
            row[l0 + l] += sums[l];
        }
    }
}

// y[m, first : first + rows] = row + bias, in y's dtype. rows is 8 or 16.
template <class S>
__attribute__((always_inline)) inline void store_row(const FusedGemmArgs& a, int64_t m, int64_t first,
                                                     int64_t rows, float* row) {
    if (a.bias.data != nullptr)
        for (int64_t l = 0; l < rows; ++l) row[l] += scalar_any(a.bias.data, a.bias.dtype, first + l);
    char* y = static_cast<char*>(a.y) + (m * a.weight.n + first) * dtype_bytes(a.x.dtype);
    if (rows % S::kLanes == 0) {
        for (int64_t l = 0; l < rows; l += S::kLanes)
            S::store_any(y + l * dtype_bytes(a.x.dtype), a.x.dtype, S::load_f(row + l));
        return;
    }
    char whole[S::kLanes * 4];  // kLanes is 16 and the panel has 8 rows
    S::store_any(whole, a.x.dtype, S::load_f(row));
    std::memcpy(y, whole, static_cast<size_t>(rows * dtype_bytes(a.x.dtype)));
}

}  // namespace
}  // namespace rosaq::cpu
