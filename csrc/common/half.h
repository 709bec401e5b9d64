// 16-bit floats to float and back, bit by bit: for machines and places without conversion instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace rosaq {

ROSAQ_INLINE float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ROSAQ_INLINE uint32_t bits_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

ROSAQ_INLINE float float_from_bf16(uint16_t h) {
    return float_from_bits(uint32_t{h} << 16);
}

ROSAQ_INLINE float float_from_fp16(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    // Shifting the 15 low bits up by 13 leaves the exponent 112 too small; 2^112 puts it right, subnormals
    // included.
    if (rest < 0x7c00u)
        return float_from_bits(bits_from_float(float_from_bits(rest << 13) * 0x1p112f) | sign);
    return float_from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
}

// Round to nearest, ties to even; NaN stays NaN.
ROSAQ_INLINE uint16_t bf16_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest, ties to even; too large becomes infinity, NaN stays NaN.
ROSAQ_INLINE uint16_t fp16_from_float(float value) {
    const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up
    if (magnitude <
        0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's integer in the low mantissa bits
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_from_float(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace rosaq
