// fused_gemm on the CPU: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include "../cpu/gemm.h"
#include "checks.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = "rosaq::fused_gemm";

// Scratch up to here (one token of a 4096-wide layer) lies on the stack: an allocation costs about a
// microsecond.
constexpr int64_t kSmallScratchBytes = 64 << 10;

void run_on_torch_threads(int64_t count, int64_t grain, cpu::Parallel::Range range, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, range, context));
}

PackedWeight check_packed(const Tensor& packed, int64_t out_features, int64_t bits, int64_t group_size,
                          bool symmetric) {
    check_bits(kOp, bits);
    const PackedWeight w = parse_blob(kOp, packed);
    ROSAQ_CHECK(w.n == out_features, kOp, ": out_features: got ", out_features, ", need ", w.n, " as packed");
    ROSAQ_CHECK(w.bits == bits, kOp, ": bits: got ", bits, ", need ", w.bits, " as packed");
    ROSAQ_CHECK(w.group_size == (group_size == -1 ? w.k : group_size), kOp, ": group_size: got ", group_size,
                ", need ", w.group_size, " as packed");
    ROSAQ_CHECK(w.symmetric == symmetric, kOp, ": symmetric: got ", symmetric, ", need ", w.symmetric,
                " as packed");
    return w;
}

void check_x(const Tensor& x, int64_t k) {
    check_cpu(kOp, "x", x);
    check_dtype(kOp, "x", x, {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
    ROSAQ_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, kOp, ": x: got shape ", shape_text(x),
                ", need [..., ", k, "]");
}

void check_16_bit(const char* name, const Tensor& t) {
    check_cpu(kOp, name, t);
    check_dtype(kOp, name, t, {ScalarType::Half, ScalarType::BFloat16});
}

// Fills r and the salient buffers of args; the tensors are contiguous and outlive the call.
void check_salient(FusedGemmArgs& args, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& index, const std::optional<Tensor>& basis) {
    const int64_t n = args.weight.n, k = args.weight.k;
    if (!weight.has_value()) {
        ROSAQ_CHECK(!index.has_value() && !basis.has_value(), kOp, ": salient_weight: got none but a ",
                    index.has_value() ? "salient_index" : "salient_basis", ", need both or neither");
        return;
    }
    ROSAQ_CHECK(index.has_value() != basis.has_value(), kOp, ": salient_weight: got ",
                index.has_value() ? "both salient_index and salient_basis"
                                  : "neither salient_index nor salient_basis",
                ", need exactly one of them");
    check_16_bit("salient_weight", *weight);
    ROSAQ_CHECK(weight->dim() == 2 && weight->size(0) == n, kOp, ": salient_weight: got shape ",
                shape_text(*weight), ", need [", n, ", r]");
    args.r = weight->size(1);
    args.salient_weight = buffer_of(*weight);
    if (basis.has_value()) {
        check_16_bit("salient_basis", *basis);
        check_shape(kOp, "salient_basis", *basis, {k, args.r});
        args.salient_basis = buffer_of(*basis);
        return;
    }
    check_cpu(kOp, "salient_index", *index);
    check_dtype(kOp, "salient_index", *index, {ScalarType::Int});
    check_shape(kOp, "salient_index", *index, {args.r});
    args.salient_index = static_cast<const int32_t*>(index->const_data_ptr());
    for (int64_t j = 0; j < args.r; ++j)
        ROSAQ_CHECK(args.salient_index[j] >= 0 && args.salient_index[j] < k, kOp, ": salient_index: got ",
                    args.salient_index[j], " at [", j, "], need 0 to ", k - 1);
}

void check_rotation(FusedGemmArgs& args, const std::optional<Tensor>& rotation) {
    if (!rotation.has_value()) return;
    const int64_t k = args.weight.k;
    check_16_bit("rotation", *rotation);
    const bool square =
        rotation->dim() == 3 && rotation->size(1) == rotation->size(2) && rotation->size(1) > 0;
    const int64_t b = square ? rotation->size(1) : 0, blocks = square ? rotation->size(0) : 0;
    ROSAQ_CHECK(square && k % b == 0 && (blocks == 1 || blocks * b == k), kOp, ": rotation: got shape ",
                shape_text(*rotation), ", need [B, b, b] with b dividing ", k, " and B 1 or ", k, " / b");
    args.rotation_size = b;
    args.rotation_blocks = blocks;
    args.rotation = buffer_of(*rotation);
}

void check_bias(FusedGemmArgs& args, const std::optional<Tensor>& bias) {
    if (!bias.has_value()) return;
    check_cpu(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
    check_shape(kOp, "bias", *bias, {args.weight.n});
    args.bias = buffer_of(*bias);
}

Tensor empty_like_x(const Tensor& x, int64_t n) {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = n;
    return torch::stable::empty(shape, x.scalar_type());
}

Tensor fused_gemm(const Tensor& x, const Tensor& packed, std::optional<Tensor> salient_weight,
                  std::optional<Tensor> salient_index, std::optional<Tensor> salient_basis,
                  std::optional<Tensor> rotation, std::optional<Tensor> bias, int64_t out_features,
                  int64_t bits, int64_t group_size, bool symmetric) {
    FusedGemmArgs args;
    args.weight = check_packed(packed, out_features, bits, group_size, symmetric);
    check_x(x, args.weight.k);
    const Tensor x_dense = dense(x);
    const auto weight = dense(salient_weight), index = dense(salient_index), basis = dense(salient_basis);
    const auto rot = dense(rotation), b = dense(bias);
    check_salient(args, weight, index, basis);
    check_rotation(args, rot);
    check_bias(args, b);

    Tensor y = empty_like_x(x, out_features);
    args.m = x.numel() / args.weight.k;
    args.x = buffer_of(x_dense);
    args.y = y.mutable_data_ptr();
    const int64_t bytes = cpu::workspace_bytes(args);
    const cpu::Parallel parallel{run_on_torch_threads};
    alignas(64) char small[kSmallScratchBytes];
    if (bytes <= kSmallScratchBytes) {
        cpu::fused_gemm(args, small, parallel);
    } else {
        const std::vector<int64_t> shape{bytes};
        const Tensor scratch = torch::stable::empty(shape, ScalarType::Byte);
        cpu::fused_gemm(args, scratch.mutable_data_ptr(), parallel);
    }
    return y;
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CPU, m) {
    m.impl("fused_gemm", TORCH_BOX(&rosaq::bind::fused_gemm));
}
