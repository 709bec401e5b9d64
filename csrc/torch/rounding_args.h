// The arguments of round_panel and sweep_panel, checked once for every backend, and what they return.
#pragma once

#include <tuple>

#include "../common/params_rounding.h"
#include "checks.h"

namespace rosaq::bind {

// Holds contiguous inputs and the outputs; `args` points into them. Raises unless the tensors fit.
struct RoundingCall {
    RoundingArgs args;
    std::tuple<Tensor, Tensor> outputs() const { return {codes, passed}; }

    static RoundingCall round(const Tensor& columns, const Tensor& factor, const Tensor& scale,
                              const Tensor& zero, int64_t bits);
    static RoundingCall sweep(const Tensor& slope, const Tensor& codes, const Tensor& gram,
                              const Tensor& scale, const Tensor& zero, int64_t bits);

  private:
    RoundingCall(const Tensor& state, const Tensor& links, const Tensor& scale, const Tensor& zero,
                 int64_t bits);
    Tensor state, links, scale, zero, codes, passed;
    std::optional<Tensor> known;
};

constexpr const char* kRoundPanel = "rosaq::round_panel";
constexpr const char* kSweepPanel = "rosaq::sweep_panel";

}  // namespace rosaq::bind
