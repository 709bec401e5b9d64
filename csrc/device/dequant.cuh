// Packed codes to MMA registers, exactly: every weight becomes the integer code - 2^(bits - 1) in T.
//
// OR-ing a code into the mantissa of 2^kMantissa (1024 in float16, 128 in bfloat16) gives a float that is
// larger by code * 2^position; one fused multiply-add takes the bias off and the position out. No integer is
// ever converted. float16 has room for codes up to bit 9, bfloat16 up to bit 6, which costs it some more
// shifts.
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
    if constexpr (kPosition == 0)
        return bits_as<uint32_t>(__hadd2(bits_as<Pair>(biased), bits_as<Pair>(offset)));
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

// How far word kIndex (0-2) of a 3-bit chunk moves right for its field to lie in the mantissa.
template <class T>
constexpr int field_shift(int index, int field) {
    if (Number<T>::kMantissa >= 9) return field < 3 ? 0 : kSpareBit - index;
    return field < 2 ? 0 : field == 2 ? 5 - index : kSpareBit;
}

template <class T, int kIndex, int kField>
ROSAQ_DEVICE uint32_t decode_field(const uint32_t* words) {
    constexpr int shift = field_shift<T>(kIndex, kField);
    return decoded<T, 3, field_bit(kField) - shift>(words[kIndex] >> shift);
}

// The pair in the spare bits: bit i of its codes is the spare bit of word i, shifted as the word's other
// fields are.
template <class T>
ROSAQ_DEVICE uint32_t decode_spare(const uint32_t* words) {
    constexpr int field = Number<T>::kMantissa >= 9 ? 3 : 2, low = kSpareBit - field_shift<T>(0, field);
    uint32_t pair = codes_at<T, 1, low>(words[0] >> field_shift<T>(0, field));
    pair = codes_at<T, 1, low + 1>(words[1] >> field_shift<T>(1, field), pair);
    pair = codes_at<T, 1, low + 2>(words[2] >> field_shift<T>(2, field), pair);
    return unbiased<T, 3, low>(pair);
}

// The registers of two MMA steps (32 k of one row tile), the first or second half of three words of 3-bit
// codes.
template <class T, bool kSecond>
ROSAQ_DEVICE void decode_3bit(const uint32_t* words, uint32_t (&a)[2][4]) {
    if constexpr (!kSecond) {
        a[0][0] = decode_field<T, 0, 0>(words), a[0][1] = decode_field<T, 0, 1>(words);
        a[0][2] = decode_field<T, 0, 2>(words), a[0][3] = decode_field<T, 0, 3>(words);
        a[1][0] = decode_field<T, 0, 4>(words), a[1][1] = decode_field<T, 1, 0>(words);
        a[1][2] = decode_field<T, 1, 1>(words), a[1][3] = decode_field<T, 1, 2>(words);
    } else {
        a[0][0] = decode_field<T, 1, 3>(words), a[0][1] = decode_field<T, 1, 4>(words);
        a[0][2] = decode_field<T, 2, 0>(words), a[0][3] = decode_field<T, 2, 1>(words);
        a[1][0] = decode_field<T, 2, 2>(words), a[1][1] = decode_field<T, 2, 3>(words);
        a[1][2] = decode_field<T, 2, 4>(words), a[1][3] = decode_spare<T>(words);
    }
}

// Registers a[row tile][step] of 32 k, number kSub (0-3) of the block, from a lane's 4 * kBits words of the
// record.
template <class T, int kBits, int kSub>
ROSAQ_DEVICE void decode(const uint32_t (&words)[4 * kBits], uint32_t (&a)[2][2][4]) {
#pragma unroll
    for (int row_tile = 0; row_tile < 2; ++row_tile) {
        if constexpr (kBits == 3) {
            decode_3bit<T, kSub % 2 != 0>(words + words_of_3bit(row_tile, kSub / 2), a[row_tile]);
        } else {
            decode_4bit<T>(words[word_of_4bit(row_tile, 2 * kSub)], a[row_tile][0]);
            decode_4bit<T>(words[word_of_4bit(row_tile, 2 * kSub + 1)], a[row_tile][1]);
        }
    }
}

// zero - 2^(bits - 1), how far the zero point lies above the middle code; twice: the byte of the blob.
template <int kBits>
ROSAQ_DEVICE float zero_shift(uint32_t twice) {
    return fmaf(static_cast<float>(twice), 0.5f, -static_cast<float>(1 << (kBits - 1)));
}

// Takes the shift in both halves of `zero` off what `decode` gives: code - zero, still exact.
template <class T>
ROSAQ_DEVICE uint32_t minus_zero(uint32_t a, typename Number<T>::Pair zero) {
    return bits_as<uint32_t>(__hsub2(bits_as<typename Number<T>::Pair>(a), zero));
}

}  // namespace rosaq::cuda
