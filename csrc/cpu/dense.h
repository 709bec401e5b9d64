// Products of float32 rows with 16-bit matrices: rotation, salient basis.
#pragma once

#include "kernels.h"
#include "salient.h"
#include "tile.h"

namespace rosaq::cpu {
namespace {

constexpr int64_t kFewRows =
    4;  // up to here converting b again for every row is cheaper than storing it as float32

// acc[kVectors vectors of columns] += one row of a * b for kBlocks tiles of kTileDepth (or one of `depth`) k,
// without a copy of b. The order of the sums is that of multiply_rows, so the bits are too; 8 independent
// ones hide the latency.
template <class S, DType kType, int kVectors, int kBlocks>
void multiply_row(const float* a, const char* b, int64_t row_bytes, int64_t depth, float* acc) {
    typename S::F sum[kBlocks][kVectors];
    for (int i = 0; i < kBlocks; ++i)
        for (int v = 0; v < kVectors; ++v) sum[i][v] = S::zero_f();
    for (int64_t d = 0; d < depth; ++d)
        for (int i = 0; i < kBlocks; ++i) {
            const auto x = S::set_f(a[i * kTileDepth + d]);
            const char* row = b + (i * kTileDepth + d) * row_bytes;
            for (int v = 0; v < kVectors; ++v)
                sum[i][v] =
                    S::mul_add(x, S::load_any(row + v * S::kLanes * dtype_bytes(kType), kType), sum[i][v]);
        }
    for (int i = 0; i < kBlocks; ++i)
        for (int v = 0; v < kVectors; ++v) {
            float* out = acc + v * S::kLanes;
            S::store_f(out, S::add_f(S::load_f(out), sum[i][v]));
        }
}

// The rows of b from k0 on, as many as go into whole runs of kBlocks tiles, then half as many tiles a run.
template <class S, DType kType, int kVectors, int kBlocks>
int64_t multiply_tiles(const float* a, const char* b, int64_t row_bytes, int64_t k0, int64_t rows,
                       float* acc) {
    for (; k0 + kBlocks * kTileDepth <= rows; k0 += kBlocks * kTileDepth)
        multiply_row<S, kType, kVectors, kBlocks>(a + k0, b + k0 * row_bytes, row_bytes, kTileDepth, acc);
    if constexpr (kBlocks > 1)
        k0 = multiply_tiles<S, kType, kVectors, kBlocks / 2>(a, b, row_bytes, k0, rows, acc);
    return k0;
}

// Elements of b.
ROSAQ_INLINE int64_t dense_size(const DenseProduct& p) {
    return num_products(p) * p.rows * p.cols;
}

// out[depth, kVectors vectors] = `depth` rows of b from element `at` on, as float32. Columns past the last
// one are whatever follows in b: they are not stored.
template <class S, int kVectors>
void convert_rows(const DenseProduct& p, int64_t at, int64_t depth, float* out) {
    for (int64_t d = 0; d < depth; ++d)
        for (int v = 0; v < kVectors; ++v)
            S::store_f(out + (d * kVectors + v) * S::kLanes,
                       load_within<S>(p.b, at + d * p.cols + v * S::kLanes, dense_size(p)));
}

// `width` columns of one product, at most kVectors vectors.
template <class S, DType kType, int kVectors>
void multiply_columns(const DenseProduct& p, int64_t product, int64_t first, int64_t width) {
    constexpr int64_t cols = kVectors * S::kLanes;
    const int64_t row_bytes = p.cols * dtype_bytes(kType);
    const int64_t base = product * p.rows * p.cols + first;
    // Rows whose vectors end within b: all of them, but for the last few of a narrow or ragged b.
    const int64_t last = (dense_size(p) - cols - base) / p.cols + 1;
    const int64_t whole = dense_size(p) < cols + base ? 0 : last < p.rows ? last : p.rows;
    const char* b = static_cast<const char*>(element(p.b, base));
    for (int64_t m = 0; m < p.m; ++m) {
        const float* a = p.a + m * p.lda + product * p.rows;
        alignas(64) float sums[cols] = {};
        int64_t k0 = multiply_tiles<S, kType, kVectors, 8 / kVectors>(a, b, row_bytes, 0, whole, sums);
        if (k0 < whole && whole == p.rows) {
            multiply_row<S, kType, kVectors, 1>(a + k0, b + k0 * row_bytes, row_bytes, whole - k0, sums);
            k0 = p.rows;
        }
        for (; k0 < p.rows; k0 += kTileDepth) {
            const int64_t depth = p.rows - k0 < kTileDepth ? p.rows - k0 : kTileDepth;
            alignas(64) float panel[kTileDepth * cols];
            convert_rows<S, kVectors>(p, base + k0 * p.cols, depth, panel);
            multiply_rows<S, kVectors, 1>(a + k0, p.lda, panel, depth, sums, cols);
        }
        std::memcpy(p.out + m * p.ldo + product * p.cols + first, sums,
                    static_cast<size_t>(width) * sizeof(float));
    }
}

// Units [unit, unit_end) of few rows, as many as go together: four that lie in one product, else one. Returns
// their number.
template <class S, DType kType>
int64_t few_rows_units(const DenseProduct& p, int64_t unit, int64_t unit_end) {
    constexpr int64_t cols = kTileCols<S>;
    const int64_t units_each = ceil_div(p.cols, cols), product = unit / units_each;
    const int64_t first = unit % units_each * cols, left = p.cols - first;
    if (unit + 4 <= unit_end && left >= 4 * cols) {
        multiply_columns<S, kType, 8>(p, product, first, 4 * cols);
        return 4;
    }
    if (left <= S::kLanes)
        multiply_columns<S, kType, 1>(p, product, first, left);
    else
        multiply_columns<S, kType, 2>(p, product, first, left < cols ? left : cols);
    return 1;
}

// Calls f(i, count, a, lda, out, ldo) for rows [row0 + i, row0 + i + count) that are evenly spaced in memory.
template <class F>
void each_run(const DenseProduct& p, int64_t product, int64_t row0, int64_t rows, F f) {
    if (!is_flat(p)) {
        const float* a = p.a + row0 * p.lda + product * p.rows;
        return f(0, rows, a, p.lda, p.out + row0 * p.ldo + product * p.cols, p.ldo);
    }
    for (int64_t i = 0, count; i < rows; i += count) {
        const int64_t token = (row0 + i) / p.batches, batch = (row0 + i) % p.batches;
        count = p.batches - batch < rows - i ? p.batches - batch : rows - i;
        f(i, count, p.a + token * p.lda + batch * p.rows, p.rows, p.out + token * p.ldo + batch * p.cols,
          p.cols);
    }
}

// One unit: kTileCols columns of one product (or the last ones, at most kVectors vectors), for some of its
// rows.
template <class S, int kVectors>
void dense_unit(const DenseProduct& p, int64_t product, int64_t first, int64_t row0, int64_t rows) {
    constexpr int64_t cols = kVectors * S::kLanes;
    const int64_t width = p.cols - first < cols ? p.cols - first : cols;
    const int64_t base = product * p.rows * p.cols + first;
    alignas(64) float panel[kTileDepth * cols];
    alignas(64) float sums[kDenseRows * cols];
    std::memset(sums, 0, static_cast<size_t>(rows * cols) * sizeof(float));
    for (int64_t k0 = 0; k0 < p.rows; k0 += kTileDepth) {
        const int64_t depth = p.rows - k0 < kTileDepth ? p.rows - k0 : kTileDepth;
        convert_rows<S, kVectors>(p, base + k0 * p.cols, depth, panel);
        each_run(p, product, row0, rows,
                 [&](int64_t i, int64_t count, const float* a, int64_t lda, float*, int64_t) {
                     multiply_tile<S, kVectors>(count, a + k0, lda, panel, depth, sums + i * cols, cols);
                 });
    }
    each_run(p, product, row0, rows,
             [&](int64_t i, int64_t count, const float*, int64_t, float* out, int64_t ldo) {
                 for (int64_t j = 0; j < count; ++j)
                     std::memcpy(out + j * ldo + first, sums + (i + j) * cols,
                                 static_cast<size_t>(width) * sizeof(float));
             });
}

template <class S>
void dense_product(const DenseProduct& p, int64_t unit_begin, int64_t unit_end) {
    if (p.m <= kFewRows && !is_flat(p)) {
        for (int64_t unit = unit_begin; unit < unit_end;)
            unit += p.b.dtype == DType::kFloat16 ? few_rows_units<S, DType::kFloat16>(p, unit, unit_end)
                                                 : few_rows_units<S, DType::kBFloat16>(p, unit, unit_end);
        return;
    }
    constexpr int64_t cols = kTileCols<S>;
    const int64_t units_each = ceil_div(p.cols, cols), rows = rows_each(p);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
        const int64_t row0 = unit / (num_products(p) * units_each) * kDenseRows;
        const int64_t product = unit / units_each % num_products(p), first = unit % units_each * cols;
        const int64_t count = rows - row0 < kDenseRows ? rows - row0 : kDenseRows;
        p.cols - first <= S::kLanes ? dense_unit<S, 1>(p, product, first, row0, count)
                                    : dense_unit<S, 2>(p, product, first, row0, count);
    }
}

}  // namespace
}  // namespace rosaq::cpu
