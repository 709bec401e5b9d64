// GPTQ and coordinate descent inside a panel. A unit is two vectors of rows, which go through all columns on
// their own: what they pass on stays in L1, a column is read once, when its turn comes, and hears of all
// before it in registers.
#pragma once

#include "kernels.h"

namespace rosaq::cpu {
namespace {

constexpr int kRoundingVectors = 2;

template <class S>
constexpr int64_t kRoundingRows = kRoundingVectors * S::kLanes;

// `count` of a vector (none if negative), the rest `fill`.
template <class S>
ROSAQ_INLINE typename S::F load_rows(const float* from, int64_t count, float fill) {
    if (count >= S::kLanes) return S::load_f(from);
    float lanes[S::kLanes];
    for (int i = 0; i < S::kLanes; ++i) lanes[i] = i < count ? from[i] : fill;
    return S::load_f(lanes);
}

template <class S>
ROSAQ_INLINE void store_rows(float* to, int64_t count, typename S::F a) {
    if (count >= S::kLanes) return S::store_f(to, a);
    float lanes[S::kLanes];
    S::store_f(lanes, a);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// clamp(round(w / scale + zero), 0, top), half to even, NaN as it is.
template <class S>
ROSAQ_INLINE typename S::F nearest_code(typename S::F w, typename S::F scale, typename S::F zero, float top) {
    const auto place = S::add_f(S::div_f(w, scale), zero);
    const auto inside = S::min_f(S::set_f(top), S::max_f(S::zero_f(), place));
    const auto whole = S::set_f(0x1p23f);  // from here on the next float is the next integer
    return S::sub_f(S::add_f(inside, whole), whole);
}

// (codes - zero) * scale
template <class S>
ROSAQ_INLINE typename S::F from_code(typename S::F code, typename S::F scale, typename S::F zero) {
    return S::mul_f(S::sub_f(code, zero), scale);
}

// Rows of one vector, `count` of them real; padding divides by 1.
template <class S>
struct RoundRows {
    using F = typename S::F;
    F scale, zero;
    float top;
    ROSAQ_INLINE void begin(RoundRows& r, const RoundingArgs& a, int64_t row, int64_t count) {
        r.scale = load_rows<S>(a.scale + row, count, 1.0f);
        r.zero = load_rows<S>(a.zero + row, count, 0.0f);
        r.top = static_cast<float>((1 << a.bits) - 1);
    }
    ROSAQ_INLINE F hear(F state, F product) { return S::sub_f(state, product); }
    // The code of a column, and what it passes on.
    ROSAQ_INLINE F step(const RoundRows& r, const RoundingArgs&, int64_t, int64_t, F state, F diagonal,
                        F& passed) {
        const F code = nearest_code<S>(state, r.scale, r.zero, r.top);
        passed = S::div_f(S::sub_f(state, from_code<S>(code, r.scale, r.zero)), diagonal);
        return code;
    }
};

template <class S>
struct SweepRows {
    using F = typename S::F;
    float top;
    ROSAQ_INLINE void begin(SweepRows& r, const RoundingArgs& a, int64_t, int64_t) {
        r.top = static_cast<float>((1 << a.bits) - 1);
    }
    ROSAQ_INLINE F hear(F state, F product) { return S::add_f(state, product); }
    ROSAQ_INLINE F step(const SweepRows& r, const RoundingArgs& a, int64_t at, int64_t count, F state,
                        F diagonal, F& passed) {
        const F scale = load_rows<S>(a.scale + at, count, 1.0f),
                zero = load_rows<S>(a.zero + at, count, 0.0f);
        const F known = load_rows<S>(a.known + at, count, 0.0f);
        const F best = S::sub_f(from_code<S>(known, scale, zero), S::div_f(state, diagonal));
        const F code = nearest_code<S>(best, scale, zero, r.top);
        passed = S::mul_f(S::sub_f(code, known), scale);
        return code;
    }
};

// Columns [j0, j0 + kColumns) of the rows from `row` on; passed [p, rows of a unit] holds those before j0.
template <class S, class Rows, int kColumns>
void round_columns(const RoundingArgs& a, const Rows (&rows)[kRoundingVectors], int64_t j0, int64_t row,
                   float* passed) {
    constexpr int V = kRoundingVectors;
    typename S::F state[kColumns][V];
    for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < V; ++v) {
            const int64_t first = row + v * S::kLanes;
            state[c][v] = load_rows<S>(a.state + (j0 + c) * a.n + first, a.n - first, 0.0f);
        }
    for (int64_t j = 0; j < j0; ++j) {
        const float *links = a.links + j * a.p + j0, *from = passed + j * kRoundingRows<S>;
        for (int v = 0; v < V; ++v) {
            const auto heard = S::load_f(from + v * S::kLanes);
            for (int c = 0; c < kColumns; ++c)
                state[c][v] = Rows::hear(state[c][v], S::mul_f(S::set_f(links[c]), heard));
        }
    }
    for (int c = 0; c < kColumns; ++c) {
        const int64_t j = j0 + c;
        const float* links = a.links + j * a.p + j0;
        for (int v = 0; v < V; ++v) {
            const int64_t first = row + v * S::kLanes, count = a.n - first, at = j * a.n + first;
            typename S::F told;
            const auto code = Rows::step(rows[v], a, at, count, state[c][v], S::set_f(links[c]), told);
            store_rows<S>(a.codes + at, count, code);
            store_rows<S>(a.passed + at, count, told);
            S::store_f(passed + j * kRoundingRows<S> + v * S::kLanes, told);
            for (int later = c + 1; later < kColumns; ++later)
                state[later][v] = Rows::hear(state[later][v], S::mul_f(S::set_f(links[later]), told));
        }
    }
}

template <class S, class Rows>
void round_units(const RoundingArgs& a, int64_t unit_begin, int64_t unit_end) {
    alignas(64) float passed[kMaxPanel * kRoundingRows<S>];
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
        const int64_t row = unit * kRoundingRows<S>;
        Rows rows[kRoundingVectors];
        for (int v = 0; v < kRoundingVectors; ++v)
            Rows::begin(rows[v], a, row + v * S::kLanes, a.n - row - v * S::kLanes);
        int64_t j = 0;
        for (; j + S::kRoundingColumns <= a.p; j += S::kRoundingColumns)
            round_columns<S, Rows, S::kRoundingColumns>(a, rows, j, row, passed);
        for (; j < a.p; ++j) round_columns<S, Rows, 1>(a, rows, j, row, passed);
    }
}

}  // namespace
}  // namespace rosaq::cpu
