// Register arithmetic, and who a thread is.
#include <cmath>
#include <cstring>

#include "cuda_vocabulary.h"
#include "instructions.h"
#include "machine.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emu {
namespace {

// a b + c rounded to odd: a later rounding to half the digits then gives what a single rounding would have
// given. a b is exact, since 16-bit floats have at most 11 digits.
double fma_to_odd(double a, double b, double c) {
    const double product = a * b, sum = product + c;
    const double back = sum - product, error = (product - (sum - back)) + (c - back);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if (!std::isfinite(sum) || error == 0 || (bits & 1u) != 0) return sum;
    return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

// The hardware has one NaN per format.
__half fma_fp16(__half a, __half b, __half c) {
    const double r = fma_to_odd(__half2float(a), __half2float(b), __half2float(c));
    return std::isnan(r) ? __ushort_as_half(0x7fff) : __double2half(r);
}

__nv_bfloat16 fma_bf16(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    const double r = fma_to_odd(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c));
    return std::isnan(r) ? __ushort_as_bfloat16(0x7fff) : __double2bfloat16(r);
}

}  // namespace

uint3 thread_index() {
    return self().thread_index;
}

uint3 block_index() {
    return self().block->index;
}

dim3 block_size() {
    return machine->launch.block;
}

dim3 grid_size() {
    return machine->launch.grid;
}

__half2 hfma2(__half2 a, __half2 b, __half2 c) {
    return __halves2half2(fma_fp16(__low2half(a), __low2half(b), __low2half(c)),
                          fma_fp16(__high2half(a), __high2half(b), __high2half(c)));
}

__nv_bfloat162 hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return __halves2bfloat162(fma_bf16(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                              fma_bf16(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}

uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int lut) {
    uint32_t d = 0;
    for (uint32_t minterm = 0; minterm < 8; ++minterm)
        if ((lut >> minterm & 1) != 0)
            d |= (minterm & 4u ? a : ~a) & (minterm & 2u ? b : ~b) & (minterm & 1u ? c : ~c);
    return d;
}

uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> (4 * i) & 15u;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 0xffu;
        if ((nibble & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
        d |= byte << (8 * i);
    }
    return d;
}

}  // namespace emu
