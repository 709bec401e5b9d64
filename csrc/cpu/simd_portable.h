// The vector type of the kernels in plain C++: 8 lanes as arrays, I int32 and F float. simd_avx2.h and
// simd_avx512.h provide the same names and those of the integer path (kByteDot). Plain C++ has no byte dot
// product: with multiplies written out that path took 2.4 to 3.1 times as long at one token as dequantising
// does.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/half.h"
#include "../common/params.h"

namespace rosaq::cpu {
namespace {

struct SimdPortable {
    static constexpr int kLanes = 8;
    static constexpr bool kByteDot = false;
    static constexpr int kTileRows = 2;  // rows of the float32 tile: 2 x 2 vectors fill the 16 SSE registers
    static constexpr int kRoundingColumns = 2;
    struct I {
        int32_t v[kLanes];
    };
    struct F {
        float v[kLanes];
    };

#define ROSAQ_LANES for (int i = 0; i < kLanes; ++i)
    ROSAQ_INLINE I set_i(int32_t a) {
        I r;
        ROSAQ_LANES r.v[i] = a;
        return r;
    }
    ROSAQ_INLINE I load_i(const void* p) {
        I r;
        std::memcpy(&r, p, sizeof r);
        return r;
    }
    ROSAQ_INLINE I load_u8(const uint8_t* p) {
        I r;
        ROSAQ_LANES r.v[i] = p[i];
        return r;
    }
    template <int kShift>
    ROSAQ_INLINE I shr(I a) {
        ROSAQ_LANES a.v[i] = int32_t(uint32_t(a.v[i]) >> kShift);
        return a;
    }
    ROSAQ_INLINE I and_i(I a, I b) {
        ROSAQ_LANES a.v[i] &= b.v[i];
        return a;
    }
    ROSAQ_INLINE I or_i(I a, I b) {
        ROSAQ_LANES a.v[i] |= b.v[i];
        return a;
    }

    ROSAQ_INLINE F zero_f() { return {}; }
    ROSAQ_INLINE F set_f(float a) {
        F r;
        ROSAQ_LANES r.v[i] = a;
        return r;
    }
    ROSAQ_INLINE F load_f(const float* p) {
        F r;
        std::memcpy(&r, p, sizeof r);
        return r;
    }
    ROSAQ_INLINE void store_f(float* p, F a) { std::memcpy(p, &a, sizeof a); }
    ROSAQ_INLINE F add_f(F a, F b) {
        ROSAQ_LANES a.v[i] += b.v[i];
        return a;
    }
    ROSAQ_INLINE F mul_f(F a, F b) {
        ROSAQ_LANES a.v[i] *= b.v[i];
        return a;
    }
    ROSAQ_INLINE F sub_f(F a, F b) {
        ROSAQ_LANES a.v[i] -= b.v[i];
        return a;
    }
    ROSAQ_INLINE F div_f(F a, F b) {
        ROSAQ_LANES a.v[i] /= b.v[i];
        return a;
    }
    // b where either is NaN.
    ROSAQ_INLINE F min_f(F a, F b) {
        ROSAQ_LANES b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
        return b;
    }
    ROSAQ_INLINE F max_f(F a, F b) {
        ROSAQ_LANES b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return b;
    }
    ROSAQ_INLINE F mul_add(F a, F b, F c) {
        ROSAQ_LANES c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    // v[i] lane j becomes v[j] lane i.
    ROSAQ_INLINE void transpose(F (&v)[kLanes]) {
        for (int i = 0; i < kLanes; ++i)
            for (int j = 0; j < i; ++j) {
                const float kept = v[i].v[j];
                v[i].v[j] = v[j].v[i], v[j].v[i] = kept;
            }
    }
    ROSAQ_INLINE F from_int(I a) {
        F r;
        ROSAQ_LANES r.v[i] = float(a.v[i]);
        return r;
    }
    template <int kBits, int kByte>
    ROSAQ_INLINE F code_to_float(I quad) {
        F r;
        ROSAQ_LANES r.v[i] = float((quad.v[i] >> (8 * kByte)) & 255);
        return r;
    }
    ROSAQ_INLINE F load_any(const void* p, DType dtype) {
        if (dtype == DType::kFloat32) return load_f(static_cast<const float*>(p));
        uint16_t h[kLanes];
        std::memcpy(h, p, sizeof h);
        F r;
        if (dtype == DType::kFloat16)
            ROSAQ_LANES r.v[i] = float_from_fp16(h[i]);
        else
            ROSAQ_LANES r.v[i] = float_from_bf16(h[i]);
        return r;
    }
    ROSAQ_INLINE void store_any(void* p, DType dtype, F a) {
        if (dtype == DType::kFloat32) return store_f(static_cast<float*>(p), a);
        uint16_t h[kLanes];
        if (dtype == DType::kFloat16)
            ROSAQ_LANES h[i] = fp16_from_float(a.v[i]);
        else
            ROSAQ_LANES h[i] = bf16_from_float(a.v[i]);
        std::memcpy(p, h, sizeof h);
    }
#undef ROSAQ_LANES
};

}  // namespace
}  // namespace rosaq::cpu
