#include "many_tokens.h"

#include <array>

#include "../launch/launch.h"
#include "cuda_context.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = kFusedGemm;
using torch::stable::reshape;
using torch::stable::transpose;

// While this lives, nothing is recorded for a backward: fused_gemm has none, and out= refuses to be recorded.
class NoGrad {
  public:
    NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
    ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
    NoGrad(const NoGrad&) = delete;
    NoGrad& operator=(const NoGrad&) = delete;

  private:
    const bool before_ = aoti_torch_grad_mode_is_enabled();
};

// a b of two matrices, or of two batches of them, in a's dtype. By the out= overload, which autocast leaves
// alone: torch.autocast also sees what an op calls, and gives torch::stable::matmul a dtype of its own.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    const char* name = a.dim() == 3 ? "aten::bmm" : "aten::mm";
    ROSAQ_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION) == 0, kOp,
                ": torch could not multiply ", shape_text(a), " with ", shape_text(b));
    torch::stable::detail::to<Tensor>(stack[0]);  // a second handle of out, to be released
}

Tensor product(const Tensor& a, const Tensor& b) {
    std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end());
    shape.back() = b.size(b.dim() - 1);
    const Tensor out = torch::stable::empty(shape, a.scalar_type(), std::nullopt, a.device());
    multiply(a, b, out);
    return out;
}

// t [m, k] = x blockdiag(rotation), as one product (a shared block) or a batch of them.
Tensor rotated(const Tensor& x, const FusedGemmCall& call) {
    const FusedGemmArgs& a = call.args;
    const Tensor rotation = torch::stable::to(*call.rotation, x.scalar_type());
    const int64_t b = a.rotation_size, k = a.weight.k;
    if (a.rotation_blocks == 1)
        return reshape(product(reshape(x, {a.m * (k / b), b}), reshape(rotation, {b, b})), {a.m, k});
    const Tensor blocks = transpose(reshape(x, {a.m, k / b, b}), 0, 1);  // [B, m, b]
    return reshape(transpose(product(blocks, rotation), 0, 1), {a.m, k});
}

}  // namespace

void many_tokens(const FusedGemmCall& call, const CudaWeight& weight, const Tensor& y, cudaStream_t stream) {
    const NoGrad no_grad;
    const FusedGemmArgs& a = call.args;
    const int64_t n = a.weight.n, k = a.weight.k;
    const ScalarType type = call.x.scalar_type();
    Tensor t = reshape(call.x, {a.m, k});
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
    multiply(t, transpose(w, 0, 1), reshape(y, {a.m, n}));

    std::optional<Tensor> projected;
    if (a.salient_basis.data != nullptr) {
        const Tensor s = product(t, torch::stable::to(*call.salient_basis, type));
        projected = product(s, transpose(torch::stable::to(*call.salient_weight, type), 0, 1));
    }
    if (projected.has_value() || a.bias.data != nullptr)
        check_cuda(kOp,
                   cuda::add_rows(y.mutable_data_ptr(), projected ? projected->const_data_ptr() : nullptr,
                                  a.bias, a.x.dtype, a.m, n, stream),
                   "add_rows_kernel");
}

}  // namespace rosaq::bind
