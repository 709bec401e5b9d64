// Packed codes to MMA registers, exactly: every weight becomes the integer code - 2^(bits - 1) in T.
//
// OR-ing a code into the mantissa of 2^kMantissa (1024 in float16, 128 in bfloat16) gives a float that is larger by
// code * 2^position; one fused multiply-add takes the bias off and the position out. No integer is ever converted.
// float16 has room for codes up to bit 9, bfloat16 up to bit 6, which costs it some more shifts.
#pragma once

#include "number.cuh"

namespace rosaq::cuda {

constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // lop3: (a & b) | c

// The pair of codes at bit kPosition of each half of `word`.
template <class T, int kBits, int kPosition>
ROSAQ_DEVICE uint32_t codes_at(uint32_t word, uint32_t seed = pair_bits_of_power<T>(Number<T>::kMantissa)) {
    static_assert(kPosition + kBits <= Number<T>::kMantissa, "the code must lie in the mantissa");
    constexpr uint32_t mask = ((1u << kBits) - 1u) << kPosition;
    return ptx::lop3<kAndOr>(word, mask | mask << 16, seed);
}

// 2^kMantissa + code * 2^kPosition -> code - 2^(bits - 1), exact.
template <class T, int kBits, int kPosition>
ROSAQ_DEVICE uint32_t unbiased(uint32_t biased) {
    using Pair = typename Number<T>::Pair;
    constexpr uint32_t offset =
        pair_bits<T>((1 << (Number<T>::kMantissa - kPosition)) + (1 << (kBits - 1)), /*negative=*/true);
    if constexpr (kPosition == 0) return bits_as<uint32_t>(__hadd2(bits_as<Pair>(biased), bits_as<Pair>(offset)));
    constexpr uint32_t unit = pair_bits_of_power<T>(-kPosition);
    return bits_as<uint32_t>(ptx::hfma2(bits_as<Pair>(biased), bits_as<Pair>(unit), bits_as<Pair>(offset)));
}

template <class T, int kBits, int kPosition>
ROSAQ_DEVICE uint32_t decoded(uint32_t word) {
    return unbiased<T, kBits, kPosition>(codes_at<T, kBits, kPosition>(word));
}

// The four registers of one MMA from one word of 4-bit codes.
template <class T>
ROSAQ_DEVICE void decode_4bit(uint32_t word, uint32_t (&a)[4]) {
    a[0] = decoded<T, 4, 0>(word);
    if constexpr (Number<T>::kMantissa >= 8) {
        a[1] = decoded<T, 4, 4>(word);
        a[2] = decoded<T, 4, 0>(word >> 8);
        a[3] = decoded<T, 4, 4>(word >> 8);
    } else {
        a[1] = decoded<T, 4, 0>(word >> 4);
        a[2] = decoded<T, 4, 0>(word >> 8);
        a[3] = decoded<T, 4, 0>(word >> 12);
    }
}

// Five pairs of word kIndex (0-2) of a 3-bit chunk; returns the word shifted so that its spare bit is at
// spare_position() + kIndex.
template <class T, int kIndex>
ROSAQ_DEVICE uint32_t decode_3bit_word(uint32_t word, uint32_t* pairs) {
    pairs[0] = decoded<T, 3, field_bit(0)>(word);
    pairs[1] = decoded<T, 3, field_bit(1)>(word);
    if constexpr (Number<T>::kMantissa >= 9) {
        constexpr int shift = kSpareBit - kIndex;
        pairs[2] = decoded<T, 3, field_bit(2)>(word);
        pairs[3] = decoded<T, 3, field_bit(3) - shift>(word >> shift);
        pairs[4] = decoded<T, 3, field_bit(4) - shift>(word >> shift);
        return word >> shift;
    } else {
        constexpr int shift = 5 - kIndex, far = kSpareBit;
        pairs[2] = decoded<T, 3, field_bit(2) - shift>(word >> shift);
        pairs[3] = decoded<T, 3, field_bit(3) - far>(word >> far);
        pairs[4] = decoded<T, 3, field_bit(4) - far>(word >> far);
        return word >> shift;
    }
}

template <class T>
constexpr int spare_position() {
    return Number<T>::kMantissa >= 9 ? 0 : kSpareBit - 5;
}

// The registers of four MMA steps (64 k of one row tile) from three words of 3-bit codes.
template <class T>
ROSAQ_DEVICE void decode_3bit(const uint32_t* words, uint32_t (&a)[4][4]) {
    constexpr int spare = spare_position<T>();
    uint32_t* pairs = &a[0][0];
    const uint32_t first = decode_3bit_word<T, 0>(words[0], pairs);
    const uint32_t second = decode_3bit_word<T, 1>(words[1], pairs + kFieldsPerWord);
    const uint32_t third = decode_3bit_word<T, 2>(words[2], pairs + 2 * kFieldsPerWord);
    uint32_t last = codes_at<T, 1, spare>(first);
    last = codes_at<T, 1, spare + 1>(second, last);
    last = codes_at<T, 1, spare + 2>(third, last);
    pairs[kPairs - 1] = unbiased<T, 3, spare>(last);
}

// Registers a[row tile][step] of half a block (64 k) from a lane's 4 * kBits words of the record.
template <class T, int kBits>
ROSAQ_DEVICE void decode_half_block(const uint32_t (&words)[4 * kBits], int half, uint32_t (&a)[2][4][4]) {
#pragma unroll
    for (int row_tile = 0; row_tile < 2; ++row_tile) {
        if constexpr (kBits == 3) {
            decode_3bit<T>(words + words_of_3bit(row_tile, half), a[row_tile]);
        } else {
#pragma unroll
            for (int step = 0; step < 4; ++step)
                decode_4bit<T>(words[word_of_4bit(row_tile, half * 4 + step)], a[row_tile][step]);
        }
    }
}

// Shifts exact integers by the zero point: a - (zero - 2^(bits - 1)), still exact.
template <class T>
ROSAQ_DEVICE uint32_t minus_zero(uint32_t a, typename Number<T>::Pair zero) {
    return bits_as<uint32_t>(__hsub2(bits_as<typename Number<T>::Pair>(a), zero));
}

}  // namespace rosaq::cuda
