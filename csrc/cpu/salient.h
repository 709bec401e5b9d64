// The 16-bit salient term y += s C^T of some rows of W, and the store of a finished row of y.
#pragma once

#include <cstddef>
#include <cstring>

#include "../common/half.h"
#include "kernels.h"
#include "tile.h"

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

// kLanes elements from i on, with zeros for those past the `size` elements of the buffer.
template <class S>
__attribute__((always_inline)) inline typename S::F load_within(const Buffer& b, int64_t i, int64_t size) {
    if (i + S::kLanes <= size) return S::load_any(element(b, i), b.dtype);
    alignas(64) float rest[S::kLanes] = {};
    for (int64_t l = 0; i + l < size; ++l) rest[l] = scalar_any(b.data, b.dtype, i + l);
    return S::load_f(rest);
}

// Rows of C that are needed when their panel is done.
ROSAQ_INLINE void prefetch_salient(const FusedGemmArgs& a, int64_t first, int64_t rows) {
    const char* at = static_cast<const char*>(element(a.salient_weight, first * a.r));
    for (int64_t i = 0; i < rows * a.r * dtype_bytes(a.salient_weight.dtype); i += kLineBytes)
        __builtin_prefetch(at + i, 0, 3);
}

// out[depth, kVectors vectors] = C[first : first + kVectors * kLanes, j0 : j0 + depth]^T, zero past n
template <class S, int kVectors>
void transpose_salient(const FusedGemmArgs& a, int64_t first, int64_t j0, int64_t depth, float* out) {
    const int64_t size = a.weight.n * a.r;
    for (int v = 0; v < kVectors; ++v)
        for (int64_t j = 0; j < depth; j += S::kLanes) {
            typename S::F rows[S::kLanes];
            for (int l = 0; l < S::kLanes; ++l)
                rows[l] = load_within<S>(a.salient_weight, (first + v * S::kLanes + l) * a.r + j0 + j, size);
            S::transpose(rows);
            for (int i = 0; i < S::kLanes && j + i < depth; ++i)
                S::store_f(out + ((j + i) * kVectors + v) * S::kLanes, rows[i]);
        }
}

// acc[m, kVectors vectors] += s[row0 : row0 + m] * C[first : first + kVectors * kLanes]^T. Every loop adds it
// in this order, so that a token has the same bits in any batch.
template <class S, int kVectors>
__attribute__((noinline)) void add_salient(const MainLoop& p, int64_t first, int64_t row0, int64_t m,
                                           float* acc) {
    const int64_t r = p.args->r;
    alignas(64) float panel[kTileDepth * kVectors * S::kLanes];
    for (int64_t j0 = 0; j0 < r; j0 += kTileDepth) {
        const int64_t depth = r - j0 < kTileDepth ? r - j0 : kTileDepth;
        transpose_salient<S, kVectors>(*p.args, first, j0, depth, panel);
        multiply_tile<S, kVectors>(m, p.s + row0 * p.lds + j0, p.lds, panel, depth, acc,
                                   kVectors * S::kLanes);
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
