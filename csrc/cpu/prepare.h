// From x to what the main loops read: float32 rows, digits, words.
#pragma once

#include "kernels.h"
#include "salient.h"

namespace rosaq::cpu {
namespace {

template <class S>
void to_float(const Buffer& x, int64_t row, int64_t k, float* t_row) {
    const char* in = static_cast<const char*>(element(x, row * k));
    for (int64_t i = 0; i < k; i += S::kLanes)
        S::store_f(t_row + i, S::load_any(in + i * dtype_bytes(x.dtype), x.dtype));
}

// A chunk whose largest magnitude is below 2^-90 counts as zero: its powers of two would leave the float
// range.
constexpr int32_t kSmallestExponent = 127 - 90;

// What one chunk's activations are multiplied with to become integers, and what half an integer is worth: the
// main loops multiply them with twice the weights.
struct Fixed {
    float scale, unit;
};

// `largest` is the bit pattern of the largest magnitude, finite and not tiny. One digit: 127 levels of the
// largest magnitude, the rounding that int8 activations mean. More: a power of two, so that the integers are
// exact where the digits suffice. Two digits use 15 bits where the largest magnitude rounds to at most 127 *
// 256 + 127, else 14; three and four leave two bits of headroom.
template <int kDigits>
__attribute__((always_inline)) inline Fixed fixed_point(int32_t largest) {
    const float magnitude = float_from_bits(static_cast<uint32_t>(largest));
    if constexpr (kDigits == 1) return {127.0f / magnitude, magnitude / 254.0f};
    const int32_t biased = largest >> 23;  // magnitude < 2^(biased - 126)
    const bool fits = kDigits == 2 && (largest & 0x7fffff) < 0x7eff00;
    const int32_t bits = fits ? 15 : 8 * kDigits - 2;
    return {float_from_bits(static_cast<uint32_t>(bits + 253 - biased) << 23),
            float_from_bits(static_cast<uint32_t>(biased - bits) << 23)};
}

// Where the digits of one row and chunk go: 32 channels of a digit together, blocks block_bytes apart.
struct DigitRow {
    int8_t* planes;
    int64_t block_bytes;
    int32_t* offsets;
    float* unit;
};

// That of one chunk; scale 0 for a chunk of zeros (unit 0) and for one that is not finite (unit NaN).
template <class S, int kDigits>
__attribute__((always_inline)) inline Fixed fixed_of_chunk(const float* t, int64_t chunk) {
    using I = typename S::I;
    // As integers the magnitudes of floats keep their order, with infinity and NaN on top.
    I largest = S::zero_i();
    const I magnitude_mask = S::set_i(0x7fffffff);
    for (int64_t i = 0; i < chunk; i += S::kLanes)
        largest = S::max_i(largest, S::and_i(S::bits_of(S::load_f(t + i)), magnitude_mask));
    const int32_t magnitude = S::largest_i(largest), biased = magnitude >> 23;
    if (biased == 255) return {0.0f, float_from_bits(0x7fc00000u)};
    if (biased < kSmallestExponent) return {0.0f, 0.0f};
    return fixed_point<kDigits>(magnitude);
}

// One chunk as integers cut into balanced digits (-128..127).
template <class S, int kDigits>
void chunk_digits(const float* t, int64_t chunk, const DigitRow& out) {
    using I = typename S::I;
    const Fixed fixed = fixed_of_chunk<S, kDigits>(t, chunk);
    const bool skip = fixed.scale == 0.0f;  // an infinity times 0 is no integer
    *out.unit = fixed.unit;
    const auto scale = S::set_f(fixed.scale);
    I sum[kDigits];
    for (int d = 0; d < kDigits; ++d) sum[d] = S::zero_i();
    for (int64_t i = 0; i < chunk; i += S::kLanes) {
        int8_t* planes = out.planes + i / kBlockK * out.block_bytes + i % kBlockK;
        I value = skip ? S::zero_i() : S::to_int(S::mul_f(S::load_f(t + i), scale));
        for (int d = kDigits - 1; d >= 0; --d) {
            const I digit = d == 0 ? value : S::template sar<24>(S::template shl<24>(value));
            S::store_low_bytes(planes + d * kBlockK, digit);
            sum[d] = S::add_i(sum[d], digit);
            if (d > 0) value = S::template sar<8>(S::sub_i(value, digit));
        }
    }
    // Two digits of 128 channels are below 2^22, times a zero point of 7 bits below 2^29, and twice that
    // fits.
    int32_t part = 0;
    for (int d = 0; d < kDigits; ++d) {
        part = part * 256 + S::sum_i(sum[d]);
        const bool ends = d == kDigits - 1 || d == kDigits - 3;
        if (!ends) continue;
        *(d == kDigits - 1 ? out.offsets + digit_parts(kDigits) - 1 : out.offsets) = -part;
        part = 0;
    }
}

// The same for a token that only fills a tile up.
ROSAQ_INLINE void zero_digits(int64_t chunk, int64_t token_bytes, int64_t parts, const DigitRow& out) {
    for (int64_t b = 0; b < chunk / kBlockK; ++b)
        std::memset(out.planes + b * out.block_bytes, 0, static_cast<size_t>(token_bytes));
    for (int64_t part = 0; part < parts; ++part) out.offsets[part] = 0;
    *out.unit = 0.0f;
}

template <class S, int kDigits>
void digit_row(const MainLoop& p, int64_t row) {
    const PackedWeight& w = p.args->weight;
    const int64_t chunk = chunk_k(w.group_size), num_chunks = w.k / chunk, blocks = chunk / kBlockK;
    const int64_t row0 = row / p.digits.tile_rows * p.digits.tile_rows, in_tile = row - row0;
    const int64_t rows = tile_size(p.args->m - row0, p.digits.tile_rows);
    constexpr int64_t token_bytes = kDigits * kBlockK, parts = digit_parts(kDigits);
    for (int64_t c = 0; c < num_chunks; ++c) {
        const int64_t at = row0 * num_chunks + c * rows + in_tile;
        const DigitRow out{
            p.digits.planes + row0 * w.k * kDigits + (c * blocks * rows + in_tile) * token_bytes,
            rows * token_bytes, p.digits.offsets + at * parts, p.digits.units + at};
        if (row < p.args->m)
            chunk_digits<S, kDigits>(p.t + row * p.ldt + c * chunk, chunk, out);
        else
            zero_digits(chunk, token_bytes, parts, out);
    }
}

template <class S>
void make_digits(const MainLoop& p, int64_t row) {
    switch (p.digits.num_digits) {
        case 1:
            return digit_row<S, 1>(p, row);
        case 2:
            return digit_row<S, 2>(p, row);
        case 3:
            return digit_row<S, 3>(p, row);
        default:
            return digit_row<S, 4>(p, row);
    }
}

// One token as 16-bit words, the integers of two digits.
template <class S>
void make_words(const MainLoop& p, int64_t row) {
    const PackedWeight& w = p.args->weight;
    const Words& words = p.words;
    const int64_t chunk = chunk_k(w.group_size), row0 = row / words.tile_rows * words.tile_rows;
    const int64_t rows = tile_size(p.args->m - row0, words.tile_rows);
    for (int64_t k0 = 0; k0 < w.k; k0 += chunk) {
        const float* t = p.t + row * p.ldt + k0;
        const Fixed fixed = row < p.args->m ? fixed_of_chunk<S, 2>(t, chunk) : Fixed{0.0f, 0.0f};
        words.units[k0 / chunk * words.tokens + row] = fixed.unit;
        int16_t* out = words.values + k0 * words.tokens + row0 * chunk + (row - row0) * kBlockK;
        for (int64_t i = 0; i < chunk; i += S::kLanes) {
            const auto value = fixed.scale == 0.0f
                                   ? S::zero_i()
                                   : S::to_int(S::mul_f(S::load_f(t + i), S::set_f(fixed.scale)));
            S::store_low_words(out + i / kBlockK * rows * kBlockK + i % kBlockK, value);
        }
    }
}

}  // namespace
}  // namespace rosaq::cpu
