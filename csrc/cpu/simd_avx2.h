// The vector type of the kernels for AVX2 + FMA + F16C: 8 lanes. The names are those of simd_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/half.h"
#include "../common/params.h"

namespace rosaq::cpu {
namespace {

struct SimdAvx2 {
    static constexpr int kLanes = 8;
    static constexpr bool kByteDot = true;
    static constexpr int kStreamSums = 4;    // tokens x digits per pass: each has a pair sum and an int32 sum
    static constexpr bool kPairSums = true;  // dot sums pairs in 16 bits, widen_pairs makes them int32
    static constexpr int kTileRows = 6;  // 6 x 2 sums + 2 panel vectors + 1 broadcast = 15 of 16 registers
    static constexpr int kRoundingColumns = 4;  // 4 x 2 sums + 2 vectors heard + a broadcast and a product
    static constexpr int kWordRows = 4;         // 4 x 2 sums + 2 weight vectors + a broadcast and a product
    using I = __m256i;
    // I as a vector of int32: g++ keeps whole arrays of these in registers, those of __m256i (int64) also in
    // memory.
    using Sum = int32_t __attribute__((vector_size(32)));
    using F = __m256;

    ROSAQ_INLINE I zero_i() { return _mm256_setzero_si256(); }
    ROSAQ_INLINE I set_i(int32_t a) { return _mm256_set1_epi32(a); }
    ROSAQ_INLINE I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    ROSAQ_INLINE I load_u8(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    template <int kShift>
    ROSAQ_INLINE I shr(I a) {
        return _mm256_srli_epi32(a, kShift);
    }
    template <int kShift>
    ROSAQ_INLINE I shl(I a) {
        return _mm256_slli_epi32(a, kShift);
    }
    template <int kShift>
    ROSAQ_INLINE I sar(I a) {
        return _mm256_srai_epi32(a, kShift);
    }
    ROSAQ_INLINE I and_i(I a, I b) { return _mm256_and_si256(a, b); }
    ROSAQ_INLINE I or_i(I a, I b) { return _mm256_or_si256(a, b); }
    ROSAQ_INLINE I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
    ROSAQ_INLINE I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
    ROSAQ_INLINE I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
    ROSAQ_INLINE I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
    // Codes are at most 15, so the 16-bit pair sums of maddubs stay below 3841: no saturation.
    // Two sums of 2 (unsigned byte of codes) * (signed byte at quad) per lane, 16 bits each, added to pairs.
    ROSAQ_INLINE I dot(I pairs, I codes, const int8_t* quad) {
        int32_t four;
        std::memcpy(&four, quad, sizeof four);
        return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, set_i(four)));
    }
    ROSAQ_INLINE I widen_pairs(I pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
    ROSAQ_INLINE void store_low_bytes(int8_t* p, I a) {
        const I bytes = _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x0c080400));
        const int32_t low = _mm256_cvtsi256_si32(bytes), high = _mm256_extract_epi32(bytes, 4);
        std::memcpy(p, &low, 4);
        std::memcpy(p + 4, &high, 4);
    }
    ROSAQ_INLINE void store_low_words(int16_t* p, I a) {
        const I words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, a), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
    }
    ROSAQ_INLINE void store_i(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
    ROSAQ_INLINE I sub_words(I a, I b) { return _mm256_sub_epi16(a, b); }
    ROSAQ_INLINE I load_pair(const int16_t* pair) {
        int32_t two;
        std::memcpy(&two, pair, sizeof two);
        return set_i(two);
    }
    // acc + sum of 2 products of 16-bit words, per lane.
    ROSAQ_INLINE Sum dot_words(Sum acc, I weights, I x) {
        return acc + reinterpret_cast<Sum>(_mm256_madd_epi16(weights, x));
    }
    ROSAQ_INLINE int32_t sum_i(I a) {
        alignas(32) int32_t v[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(v), a);
        int32_t s = 0;
        for (int i = 0; i < kLanes; ++i) s += v[i];
        return s;
    }
    ROSAQ_INLINE int32_t largest_i(I a) {
        alignas(32) int32_t v[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(v), a);
        int32_t s = v[0];
        for (int i = 1; i < kLanes; ++i) s = v[i] > s ? v[i] : s;
        return s;
    }

    ROSAQ_INLINE F zero_f() { return _mm256_setzero_ps(); }
    ROSAQ_INLINE F set_f(float a) { return _mm256_set1_ps(a); }
    ROSAQ_INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
    ROSAQ_INLINE void store_f(float* p, F a) { _mm256_storeu_ps(p, a); }
    ROSAQ_INLINE F add_f(F a, F b) { return _mm256_add_ps(a, b); }
    ROSAQ_INLINE F mul_f(F a, F b) { return _mm256_mul_ps(a, b); }
    ROSAQ_INLINE F sub_f(F a, F b) { return _mm256_sub_ps(a, b); }
    ROSAQ_INLINE F div_f(F a, F b) { return _mm256_div_ps(a, b); }
    // b where either is NaN.
    ROSAQ_INLINE F min_f(F a, F b) { return _mm256_min_ps(a, b); }
    ROSAQ_INLINE F max_f(F a, F b) { return _mm256_max_ps(a, b); }
    ROSAQ_INLINE F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    // v[i] lane j becomes v[j] lane i.
    ROSAQ_INLINE void transpose(F (&v)[kLanes]) {
        F w[kLanes];  // 4 x 4 within every 128-bit part
        for (int i = 0; i < kLanes; i += 4) {
            const F ab0 = _mm256_unpacklo_ps(v[i], v[i + 1]), ab1 = _mm256_unpackhi_ps(v[i], v[i + 1]);
            const F cd0 = _mm256_unpacklo_ps(v[i + 2], v[i + 3]),
                    cd1 = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
            w[i] = _mm256_shuffle_ps(ab0, cd0, 0x44);
            w[i + 1] = _mm256_shuffle_ps(ab0, cd0, 0xee);
            w[i + 2] = _mm256_shuffle_ps(ab1, cd1, 0x44);
            w[i + 3] = _mm256_shuffle_ps(ab1, cd1, 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_permute2f128_ps(w[i], w[i + 4], 0x20);
            v[i + 4] = _mm256_permute2f128_ps(w[i], w[i + 4], 0x31);
        }
    }
    ROSAQ_INLINE F from_int(I a) { return _mm256_cvtepi32_ps(a); }
    ROSAQ_INLINE I to_int(F a) { return _mm256_cvtps_epi32(a); }
    ROSAQ_INLINE I bits_of(F a) { return _mm256_castps_si256(a); }
    template <int kBits, int kByte>
    ROSAQ_INLINE F code_to_float(I quad) {
        return _mm256_cvtepi32_ps(and_i(_mm256_srli_epi32(quad, 8 * kByte), set_i(255)));
    }
    ROSAQ_INLINE F load_any(const void* p, DType dtype) {
        if (dtype == DType::kFloat32) return load_f(static_cast<const float*>(p));
        const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
        if (dtype == DType::kFloat16) return _mm256_cvtph_ps(h);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    ROSAQ_INLINE void store_any(void* p, DType dtype, F a) {
        if (dtype == DType::kFloat32) return store_f(static_cast<float*>(p), a);
        if (dtype == DType::kFloat16)
            return _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
        alignas(32) float v[kLanes];
        uint16_t h[kLanes];
        _mm256_store_ps(v, a);
        for (int i = 0; i < kLanes; ++i) h[i] = bf16_from_float(v[i]);
        std::memcpy(p, h, sizeof h);
    }
};

}  // namespace
}  // namespace rosaq::cpu
