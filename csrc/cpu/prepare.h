// From x to what the main loops read: float32 rows, the products with 16-bit matrices (rotation, salient
// basis), digits.
#pragma once

#include "kernels.h"
#include "salient.h"
#include "tile.h"

namespace rosaq::cpu {
namespace {

template <class S>
void to_float(const Buffer& x, int64_t row, int64_t k, float* t_row) {
    const char* in = static_cast<const char*>(element(x, row * k));
    for (int64_t i = 0; i < k; i += S::kLanes)
        S::store_f(t_row + i, S::load_any(in + i * dtype_bytes(x.dtype), x.dtype));
}

constexpr int64_t kDenseRows = 168;  // as kBlockRows: their sums stay in L2

// A chunk whose largest magnitude is below 2^-90 counts as zero: its powers of two would leave the float
// range.
constexpr int32_t kSmallestExponent = 127 - 90;

// One chunk as fixed point with 8 * kDigits - 2 bits under the largest magnitude, cut into balanced digits
// (-128..127). Two bits of headroom: the top digit of a balanced number reaches 127 only.
template <class S, int kDigits>
__attribute__((always_inline)) inline void chunk_digits(const float* t, int64_t chunk, int8_t* planes,
                                                        int32_t* sums, float* exponent) {
    using I = typename S::I;
    constexpr int32_t kFixedBits = 8 * kDigits - 2;
    // As integers the magnitudes of floats keep their order, with infinity and NaN on top.
    I largest = S::zero_i();
    const I magnitude_mask = S::set_i(0x7fffffff);
    for (int64_t i = 0; i < chunk; i += S::kLanes)
        largest = S::max_i(largest, S::and_i(S::bits_of(S::load_f(t + i)), magnitude_mask));
    const int32_t biased = S::largest_i(largest) >> 23;  // largest magnitude < 2^(biased - 126)
    if (biased == 255 || biased < kSmallestExponent) {
        *exponent = biased == 255 ? float_from_bits(0x7fc00000u) : 0.0f;
        for (int d = 0; d < kDigits; ++d) {
            sums[d] = 0;
            std::memset(planes + d * chunk, 0, static_cast<size_t>(chunk));
        }
        return;
    }
    *exponent = float_from_bits(static_cast<uint32_t>(biased + 1 - kFixedBits) << 23);
    const auto scale = S::set_f(float_from_bits(static_cast<uint32_t>(kFixedBits + 253 - biased) << 23));
    I sum[kDigits];
    for (int d = 0; d < kDigits; ++d) sum[d] = S::zero_i();
    for (int64_t i = 0; i < chunk; i += S::kLanes) {
        I value = S::to_int(S::mul_f(S::load_f(t + i), scale));
        for (int d = kDigits - 1; d >= 0; --d) {
            const I digit = S::template sar<24>(S::template shl<24>(value));
            S::store_low_bytes(planes + d * chunk + i, digit);
            sum[d] = S::add_i(sum[d], digit);
            value = S::template sar<8>(S::sub_i(value, digit));
        }
    }
    for (int d = 0; d < kDigits; ++d) sums[d] = S::sum_i(sum[d]);
}

template <class S>
void make_digits(const float* t, int64_t ldt, int64_t row, int64_t k, int64_t chunk, const Digits& out) {
    const int64_t num_chunks = k / chunk, digits = out.num_digits;
    int8_t* planes = out.planes + row * out.row_bytes;
    for (int64_t c = 0; c < num_chunks; ++c) {
        int32_t* sums = out.sums + (row * num_chunks + c) * digits;
        float* exponent = out.exponents + row * num_chunks + c;
        const float* in = t + row * ldt + c * chunk;
        if (digits == 3)
            chunk_digits<S, 3>(in, chunk, planes + c * digits * chunk, sums, exponent);
        else
            chunk_digits<S, 4>(in, chunk, planes + c * digits * chunk, sums, exponent);
    }
}

// One unit: kTileCols columns of one batch.
template <class S>
void dense_unit(const DenseProduct& p, int64_t unit, int64_t row0, int64_t rows) {
    constexpr int64_t cols = kTileCols<S>;
    const int64_t units_per_batch = ceil_div(p.cols, cols), batch = unit / units_per_batch;
    const int64_t first = unit % units_per_batch * cols,
                  width = p.cols - first < cols ? p.cols - first : cols;
    const int64_t base = (p.shared ? 0 : batch * p.rows * p.cols) + first;
    alignas(64) float panel[kTileDepth * cols];
    alignas(64) float sums[kDenseRows * cols];
    std::memset(sums, 0, static_cast<size_t>(rows * cols) * sizeof(float));
    for (int64_t k0 = 0; k0 < p.rows; k0 += kTileDepth) {
        const int64_t depth = p.rows - k0 < kTileDepth ? p.rows - k0 : kTileDepth;
        for (int64_t d = 0; d < depth; ++d) {
            const int64_t at = base + (k0 + d) * p.cols;
            float* out = panel + d * cols;
            if (width == cols) {
                S::store_f(out, S::load_any(element(p.b, at), p.b.dtype));
                S::store_f(out + S::kLanes, S::load_any(element(p.b, at + S::kLanes), p.b.dtype));
            } else {
                for (int64_t c = 0; c < cols; ++c)
                    out[c] = c < width ? scalar_any(p.b.data, p.b.dtype, at + c) : 0.0f;
            }
        }
        multiply_tile<S>(rows, p.a + row0 * p.lda + batch * p.rows + k0, p.lda, panel, depth, sums, cols);
    }
    for (int64_t i = 0; i < rows; ++i)
        std::memcpy(p.out + (row0 + i) * p.ldo + batch * p.cols + first, sums + i * cols,
                    static_cast<size_t>(width) * sizeof(float));
}

template <class S>
void dense_product(const DenseProduct& p, int64_t unit_begin, int64_t unit_end) {
    for (int64_t row = 0; row < p.m; row += kDenseRows) {
        const int64_t rows = p.m - row < kDenseRows ? p.m - row : kDenseRows;
        for (int64_t unit = unit_begin; unit < unit_end; ++unit) dense_unit<S>(p, unit, row, rows);
    }
}

}  // namespace
}  // namespace rosaq::cpu
