#pragma once

// Everything in common/ and in the per-ISA headers of cpu/ must be inlined into its caller: the same header
// is compiled several times with different -m flags, and an out-of-line copy built for AVX-512 could
// otherwise be the one the linker keeps for a machine without it.
#define ROSAQ_INLINE static inline __attribute__((always_inline))

namespace rosaq {

template <class T>
static constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

template <class T>
static constexpr T round_up(T a, T multiple) {
    return ceil_div(a, multiple) * multiple;
}

}  // namespace rosaq
