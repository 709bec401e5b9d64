// The arguments of fused_gemm, checked once for every backend.
#pragma once

#include <vector>

#include "checks.h"

namespace rosaq::bind {

constexpr const char* kFusedGemm = "rosaq::fused_gemm";

// What the caller passed, dense and on one device; the tensors keep the buffers of `args` alive.
struct FusedGemmCall {
    FusedGemmArgs args;
    Tensor x;
    std::optional<Tensor> salient_weight, salient_index, salient_basis, rotation, bias;

    // Raises unless everything fits a weight [n, k] on the device of `x`. `args.weight` must be set before.
    FusedGemmCall(const PackedWeight& weight, const Tensor& x, const std::optional<Tensor>& salient_weight,
                  const std::optional<Tensor>& salient_index, const std::optional<Tensor>& salient_basis,
                  const std::optional<Tensor>& rotation, const std::optional<Tensor>& bias);

    // y [..., n], empty, like x.
    Tensor empty_y() const;

  private:
    void take_salient();
    void take_rotation();
    void take_bias();
};

// Raises unless x is [..., k] of a dtype the CPU takes; the CUDA kernels take two of the three.
void check_x(const Tensor& x, int64_t k);

}  // namespace rosaq::bind
