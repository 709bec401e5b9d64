// The two 16-bit floats of the kernels, and the bits of their exactly representable constants.
#pragma once

#include <cstring>

#include "../common/params_cuda.h"
#include "ptx.cuh"

namespace rosaq::cuda {

template <class To, class From>
ROSAQ_DEVICE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation, not a conversion");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// A positive integer as the bits of a float with kMantissa stored bits; exact for less than 2^(kMantissa +
// 1).
constexpr uint32_t float_bits_of(int value, int mantissa, int bias) {
    int exponent = 0;
    while (value >> (exponent + 1)) ++exponent;
    const uint32_t fraction = static_cast<uint32_t>(value - (1 << exponent)) << (mantissa - exponent);
    return static_cast<uint32_t>(bias + exponent) << mantissa | fraction;
}

template <class T>
struct Number;

template <>
struct Number<__half> {
    using Pair = __half2;
    static constexpr int kMantissa = 10, kBias = 15;
    static constexpr DType kDType = DType::kFloat16;
    static ROSAQ_DEVICE __half from_float(float v) { return __float2half_rn(v); }
    static ROSAQ_DEVICE float to_float(__half v) { return __half2float(v); }
    static ROSAQ_DEVICE Pair both(float v) { return __float2half2_rn(v); }
};

template <>
struct Number<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static constexpr int kMantissa = 7, kBias = 127;
    static constexpr DType kDType = DType::kBFloat16;
    static ROSAQ_DEVICE __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
    static ROSAQ_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
    static ROSAQ_DEVICE Pair both(float v) { return __float2bfloat162_rn(v); }
};

// A pair whose halves are both `value` / 2^shift, negated if asked, as register bits.
template <class T>
constexpr uint32_t pair_bits(int value, bool negative = false) {
    const uint32_t half =
        float_bits_of(value, Number<T>::kMantissa, Number<T>::kBias) | (negative ? 0x8000u : 0u);
    return half | half << 16;
}
template <class T>
constexpr uint32_t pair_bits_of_power(int exponent) {
    const uint32_t half = static_cast<uint32_t>(Number<T>::kBias + exponent) << Number<T>::kMantissa;
    return half | half << 16;
}

// 16 bits of a float16 or bfloat16 as float.
ROSAQ_DEVICE float float_of_16(uint32_t bits, bool is_bf16) {
    return is_bf16 ? bits_as<float>(bits << 16) : __half2float(bits_as<__half>(static_cast<uint16_t>(bits)));
}

// Element i of a buffer of any of the three dtypes.
ROSAQ_DEVICE float load_float(const Buffer& b, int64_t i) {
    if (b.dtype == DType::kFloat32) return static_cast<const float*>(b.data)[i];
    return float_of_16(static_cast<const uint16_t*>(b.data)[i], b.dtype == DType::kBFloat16);
}

// 16 bits of `from` rounded to T.
template <class T>
ROSAQ_DEVICE uint16_t bits16_in(uint16_t bits, DType from) {
    if (from == Number<T>::kDType) return bits;
    return bits_as<uint16_t>(Number<T>::from_float(float_of_16(bits, from == DType::kBFloat16)));
}

// Two numbers rounded to T, the first in the lower half.
template <class T>
ROSAQ_DEVICE uint32_t pair_of(float low, float high) {
    return bits_as<uint16_t>(Number<T>::from_float(low)) |
           static_cast<uint32_t>(bits_as<uint16_t>(Number<T>::from_float(high))) << 16;
}

}  // namespace rosaq::cuda
