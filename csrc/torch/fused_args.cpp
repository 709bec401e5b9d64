#include "fused_args.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = kFusedGemm;

void check_16_bit(const char* name, const Tensor& t) {
    check_dtype(kOp, name, t, {ScalarType::Half, ScalarType::BFloat16});
}

}  // namespace

void check_x(const Tensor& x, int64_t k) {
    check_dtype(kOp, "x", x, {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
    ROSAQ_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, kOp, ": x: got shape ", shape_text(x),
                ", need [..., ", k, "]");
}

FusedGemmCall::FusedGemmCall(const PackedWeight& weight, const Tensor& x_,
                             const std::optional<Tensor>& salient_weight_,
                             const std::optional<Tensor>& salient_index_,
                             const std::optional<Tensor>& salient_basis_,
                             const std::optional<Tensor>& rotation_, const std::optional<Tensor>& bias_)
    : x(x_) {
    args.weight = weight;
    check_x(x, weight.k);
    check_beside(kOp, "salient_weight", salient_weight_, x);
    check_beside(kOp, "salient_index", salient_index_, x);
    check_beside(kOp, "salient_basis", salient_basis_, x);
    check_beside(kOp, "rotation", rotation_, x);
    check_beside(kOp, "bias", bias_, x);
    x = dense(x_);
    salient_weight = dense(salient_weight_), salient_index = dense(salient_index_);
    salient_basis = dense(salient_basis_), rotation = dense(rotation_), bias = dense(bias_);
    args.m = x.numel() / weight.k;
    args.x = buffer_of(x);
    take_salient();
    take_rotation();
    take_bias();
}

void FusedGemmCall::take_salient() {
    const int64_t n = args.weight.n, k = args.weight.k;
    const bool has_index = salient_index.has_value(), has_basis = salient_basis.has_value();
    if (!salient_weight.has_value()) {
        ROSAQ_CHECK(!has_index && !has_basis, kOp, ": salient_weight: got none but a ",
                    has_index ? "salient_index" : "salient_basis", ", need all or none");
        return;
    }
    ROSAQ_CHECK(
        has_index != has_basis, kOp, ": salient_weight: got ",
        has_index ? "both salient_index and salient_basis" : "neither salient_index nor salient_basis",
        ", need exactly one of them");
    check_16_bit("salient_weight", *salient_weight);
    ROSAQ_CHECK(salient_weight->dim() == 2 && salient_weight->size(0) == n, kOp,
                ": salient_weight: got shape ", shape_text(*salient_weight), ", need [", n, ", r]");
    args.r = salient_weight->size(1);
    args.salient_weight = buffer_of(*salient_weight);
    if (has_basis) {
        check_16_bit("salient_basis", *salient_basis);
        check_shape(kOp, "salient_basis", *salient_basis, {k, args.r});
        args.salient_basis = buffer_of(*salient_basis);
        return;
    }
    check_dtype(kOp, "salient_index", *salient_index, {ScalarType::Int});
    check_shape(kOp, "salient_index", *salient_index, {args.r});
    args.salient_index = static_cast<const int32_t*>(salient_index->const_data_ptr());
}

void FusedGemmCall::take_rotation() {
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

void FusedGemmCall::take_bias() {
    if (!bias.has_value()) return;
    check_dtype(kOp, "bias", *bias, {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
    check_shape(kOp, "bias", *bias, {args.weight.n});
    args.bias = buffer_of(*bias);
}

Tensor FusedGemmCall::empty_y() const {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = args.weight.n;
    return torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device());
}

}  // namespace rosaq::bind
