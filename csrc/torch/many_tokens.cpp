#include "many_tokens.h"

#include "../launch/launch.h"
#include "cuda_context.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = kFusedGemm;
using torch::stable::matmul;
using torch::stable::transpose;

// t [m, k] = x blockdiag(rotation), as one matmul (a shared block) or a batch of them.
Tensor rotated(const Tensor& x, const FusedGemmCall& call) {
    const FusedGemmArgs& a = call.args;
    const Tensor rotation = torch::stable::to(*call.rotation, x.scalar_type());
    const int64_t b = a.rotation_size, k = a.weight.k;
    if (a.rotation_blocks == 1) {
        const Tensor blocks = torch::stable::reshape(x, {a.m * (k / b), b});
        const Tensor one = torch::stable::reshape(rotation, {b, b});
        return torch::stable::reshape(matmul(blocks, one), {a.m, k});
    }
    const Tensor blocks = transpose(torch::stable::reshape(x, {a.m, k / b, b}), 0, 1);  // [B, m, b]
    return torch::stable::reshape(transpose(matmul(blocks, rotation), 0, 1), {a.m, k});
}

}  // namespace

Tensor many_tokens(const FusedGemmCall& call, const CudaWeight& weight, cudaStream_t stream) {
    const FusedGemmArgs& a = call.args;
    const int64_t n = a.weight.n, k = a.weight.k;
    const ScalarType type = call.x.scalar_type();
    Tensor t = torch::stable::reshape(call.x, {a.m, k});
    if (call.rotation.has_value()) t = rotated(t, call);

    const std::vector<int64_t> shape{n, k};
    Tensor w = torch::stable::empty(shape, type, std::nullopt, call.x.device());
    check_cuda(
        kOp,
        cuda::dequantize(weight.blob, weight.shape(), a.weight.bits, a.weight.scale_dtype == DType::kBFloat16,
                         a.x.dtype, w.mutable_data_ptr(), stream),
        "dequantize_kernel");
    const cuda::SalientColumns salient{a.salient_weight, a.salient_index, n, a.r, k};
    if (a.salient_index != nullptr)
        check_cuda(kOp, cuda::add_salient_columns(salient, a.x.dtype, w.mutable_data_ptr(), stream),
                   "add_salient_columns_kernel");
    Tensor y = matmul(t, transpose(w, 0, 1));

    Tensor projected = y;  // of no use without a basis
    const bool has_basis = a.salient_basis.data != nullptr;
    if (has_basis) {
        const Tensor s = matmul(t, torch::stable::to(*call.salient_basis, type));
        projected = matmul(s, transpose(torch::stable::to(*call.salient_weight, type), 0, 1));
    }
    if (has_basis || a.bias.data != nullptr)
        check_cuda(kOp,
                   cuda::add_rows(y.mutable_data_ptr(), has_basis ? projected.const_data_ptr() : nullptr,
                                  a.bias, a.x.dtype, a.m, n, stream),
                   "add_rows_kernel");
    std::vector<int64_t> result(call.x.sizes().begin(), call.x.sizes().end());
    result.back() = n;
    return torch::stable::reshape(y, result);
}

}  // namespace rosaq::bind
