// The vector type of the kernels for AVX-512 F/BW/VL/DQ, with VNNI's dot where the file is compiled for it:
// 16 lanes. The names are those of simd_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../common/half.h"
#include "../common/params.h"

namespace rosaq::cpu {
namespace {

struct SimdAvx512 {
    static constexpr int kLanes = 16;
    static constexpr bool kByteDot = true;
    static constexpr int kTileRows =
        14;  // 14 x 2 sums + 2 panel vectors = 30 of 32 registers; broadcasts are operands
    static constexpr int kRoundingColumns = 8;  // 8 x 2 sums + 2 vectors heard + a broadcast and a product
    static constexpr int kWordRows = 12;        // 12 x 2 sums + 2 weight vectors + a broadcast and a product
    using I = __m512i;
    // I as a vector of int32: g++ keeps whole arrays of these in registers, those of __m512i (int64) also in
    // memory.
    using Sum = int32_t __attribute__((vector_size(64)));
    using F = __m512;

    ROSAQ_INLINE I zero_i() { return _mm512_setzero_si512(); }
    ROSAQ_INLINE I set_i(int32_t a) { return _mm512_set1_epi32(a); }
    ROSAQ_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
    ROSAQ_INLINE I load_u8(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    template <int kShift>
    ROSAQ_INLINE I shr(I a) {
        return _mm512_srli_epi32(a, kShift);
    }
    template <int kShift>
    ROSAQ_INLINE I shl(I a) {
        return _mm512_slli_epi32(a, kShift);
    }
    template <int kShift>
    ROSAQ_INLINE I sar(I a) {
        return _mm512_srai_epi32(a, kShift);
    }
    ROSAQ_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
    ROSAQ_INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
    ROSAQ_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
    ROSAQ_INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
    ROSAQ_INLINE I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
    ROSAQ_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
#ifdef __AVX512VNNI__
    static constexpr int kStreamSums = 24;  // tokens x digits per pass over a panel: of 32 registers
    static constexpr bool kPairSums = false;
    // acc + sum of 4 (unsigned byte of codes) * (signed byte at quad), per lane.
    ROSAQ_INLINE I dot(I acc, I codes, const int8_t* quad) {
        int32_t four;
        std::memcpy(&four, quad, sizeof four);
        return _mm512_dpbusd_epi32(acc, codes, set_i(four));
    }
    // acc + sum of 2 products of 16-bit words, per lane.
    ROSAQ_INLINE Sum dot_words(Sum acc, I weights, I x) {
        return reinterpret_cast<Sum>(_mm512_dpwssd_epi32(reinterpret_cast<I>(acc), weights, x));
    }
#else
    static constexpr int kStreamSums = 4;  // tokens x digits per pass: each has a pair sum and an int32 sum
    static constexpr bool kPairSums = true;
    // Two sums of 2 (unsigned byte of codes) * (signed byte at quad) per lane, 16 bits each, added to pairs.
    ROSAQ_INLINE I dot(I pairs, I codes, const int8_t* quad) {
        int32_t four;
        std::memcpy(&four, quad, sizeof four);
        return _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes, set_i(four)));
    }
    ROSAQ_INLINE I widen_pairs(I pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
    ROSAQ_INLINE Sum dot_words(Sum acc, I weights, I x) {
        return acc + reinterpret_cast<Sum>(_mm512_madd_epi16(weights, x));
    }
#endif
    ROSAQ_INLINE void store_low_bytes(int8_t* p, I a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
    }
    ROSAQ_INLINE void store_low_words(int16_t* p, I a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
    }
    ROSAQ_INLINE void store_i(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
    ROSAQ_INLINE I sub_words(I a, I b) { return _mm512_sub_epi16(a, b); }
    ROSAQ_INLINE I load_pair(const int16_t* pair) {
        int32_t two;
        std::memcpy(&two, pair, sizeof two);
        return set_i(two);
    }
    ROSAQ_INLINE int32_t sum_i(I a) { return _mm512_reduce_add_epi32(a); }
    ROSAQ_INLINE int32_t largest_i(I a) { return _mm512_reduce_max_epi32(a); }

    ROSAQ_INLINE F zero_f() { return _mm512_setzero_ps(); }
    ROSAQ_INLINE F set_f(float a) { return _mm512_set1_ps(a); }
    ROSAQ_INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
    ROSAQ_INLINE void store_f(float* p, F a) { _mm512_storeu_ps(p, a); }
    ROSAQ_INLINE F add_f(F a, F b) { return _mm512_add_ps(a, b); }
    ROSAQ_INLINE F mul_f(F a, F b) { return _mm512_mul_ps(a, b); }
    ROSAQ_INLINE F sub_f(F a, F b) { return _mm512_sub_ps(a, b); }
    ROSAQ_INLINE F div_f(F a, F b) { return _mm512_div_ps(a, b); }
    // b where either is NaN.
    ROSAQ_INLINE F min_f(F a, F b) { return _mm512_min_ps(a, b); }
    ROSAQ_INLINE F max_f(F a, F b) { return _mm512_max_ps(a, b); }
    ROSAQ_INLINE F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    // v[i] lane j becomes v[j] lane i.
    ROSAQ_INLINE void transpose(F (&v)[kLanes]) {
        F w[kLanes];  // 4 x 4 within every 128-bit part
        for (int i = 0; i < kLanes; i += 4) {
            const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
            const __m512d ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
            const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2], v[i + 3]));
            const __m512d cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2], v[i + 3]));
            w[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0));
            w[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0));
            w[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1));
            w[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1));
        }
        for (int i = 0; i < 4; ++i) {  // then the parts, as a 4 x 4 of their own
            const F even0 = _mm512_shuffle_f32x4(w[i], w[i + 4], 0x88);
            const F odd0 = _mm512_shuffle_f32x4(w[i], w[i + 4], 0xdd);
            const F even1 = _mm512_shuffle_f32x4(w[i + 8], w[i + 12], 0x88);
            const F odd1 = _mm512_shuffle_f32x4(w[i + 8], w[i + 12], 0xdd);
            v[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
            v[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
            v[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
            v[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
        }
    }
    ROSAQ_INLINE F from_int(I a) { return _mm512_cvtepi32_ps(a); }
    ROSAQ_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
    ROSAQ_INLINE I bits_of(F a) { return _mm512_castps_si512(a); }
    // vpermps looks at 4 index bits only and the upper half of every byte of a quad is 0: no mask.
    template <int kBits, int kByte>
    ROSAQ_INLINE F code_to_float(I quad) {
        const F codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(quad, 8 * kByte), codes);
    }
    ROSAQ_INLINE F load_any(const void* p, DType dtype) {
        if (dtype == DType::kFloat32) return load_f(static_cast<const float*>(p));
        const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
        if (dtype == DType::kFloat16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    ROSAQ_INLINE void store_any(void* p, DType dtype, F a) {
        if (dtype == DType::kFloat32) return store_f(static_cast<float*>(p), a);
        auto* out = static_cast<__m256i*>(p);
        if (dtype == DType::kFloat16)
            return _mm256_storeu_si256(out, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
        // Round to nearest even on the bits; a NaN would round away, so it gets its quiet bit instead.
        const I bits = _mm512_castps_si512(a), odd = and_i(shr<16>(bits), set_i(1));
        const I rounded = shr<16>(add_i(bits, add_i(odd, set_i(0x7fff))));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        const I quiet = or_i(shr<16>(bits), set_i(0x40));
        _mm256_storeu_si256(out, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
    }
};

}  // namespace
}  // namespace rosaq::cpu
