#include "rounding_args.h"

namespace rosaq::bind {
namespace {

// [p, n] of a panel.
void check_panel(const char* op, const char* name, const Tensor& t) {
    check_dtype(op, name, t, {ScalarType::Float});
    ROSAQ_CHECK(t.dim() == 2 && t.size(0) >= 1 && t.size(0) <= kMaxPanel, op, ": ", name, ": got shape ",
                shape_text(t), ", need [p, n] with p from 1 to ", kMaxPanel);
}

void check_float(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> want,
                 const Tensor& beside) {
    check_beside(op, name, t, beside);
    check_dtype(op, name, t, {ScalarType::Float});
    check_shape(op, name, t, want);
}

const float* floats(const Tensor& t) {
    return static_cast<const float*>(t.const_data_ptr());
}

}  // namespace

RoundingCall::RoundingCall(const Tensor& state_, const Tensor& links_, const Tensor& scale_,
                           const Tensor& zero_, int64_t bits)
    : state(dense(state_)),
      links(dense(links_)),
      scale(dense(scale_)),
      zero(dense(zero_)),
      codes(torch::stable::empty_like(state)),
      passed(torch::stable::empty_like(state)) {
    args.p = state.size(0), args.n = state.size(1), args.bits = static_cast<int>(bits);
    args.state = floats(state), args.links = floats(links);
    args.scale = floats(scale), args.zero = floats(zero);
    args.codes = static_cast<float*>(codes.mutable_data_ptr());
    args.passed = static_cast<float*>(passed.mutable_data_ptr());
}

RoundingCall RoundingCall::round(const Tensor& columns, const Tensor& factor, const Tensor& scale,
                                 const Tensor& zero, int64_t bits) {
    const char* op = kRoundPanel;
    check_bits(op, bits);
    check_panel(op, "columns", columns);
    const int64_t p = columns.size(0), n = columns.size(1);
    check_float(op, "factor", factor, {p, p}, columns);
    check_float(op, "scale", scale, {n}, columns);
    check_float(op, "zero", zero, {n}, columns);
    return {columns, factor, scale, zero, bits};
}

RoundingCall RoundingCall::sweep(const Tensor& slope, const Tensor& codes, const Tensor& gram,
                                 const Tensor& scale, const Tensor& zero, int64_t bits) {
    const char* op = kSweepPanel;
    check_bits(op, bits);
    check_panel(op, "slope", slope);
    const int64_t p = slope.size(0), n = slope.size(1);
    check_float(op, "codes", codes, {p, n}, slope);
    check_float(op, "gram", gram, {p, p}, slope);
    check_float(op, "scale", scale, {p, n}, slope);
    check_float(op, "zero", zero, {p, n}, slope);
    RoundingCall call(slope, gram, scale, zero, bits);
    call.known = dense(codes);
    call.args.known = floats(*call.known);
    return call;
}

}  // namespace rosaq::bind
