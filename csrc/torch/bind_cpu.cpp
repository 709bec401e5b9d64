// fused_gemm on the CPU: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include "../cpu/gemm.h"
#include "../cpu/isa.h"
#include "fused_args.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = kFusedGemm;

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

// Devices cannot look at an index without waiting for it; here it costs nothing.
void check_index(const FusedGemmArgs& args) {
    for (int64_t j = 0; args.salient_index != nullptr && j < args.r; ++j)
        ROSAQ_CHECK(args.salient_index[j] >= 0 && args.salient_index[j] < args.weight.k, kOp,
                    ": salient_index: got ", args.salient_index[j], " at [", j, "], need 0 to ",
                    args.weight.k - 1);
}

Tensor fused_gemm(const Tensor& x, const Tensor& packed, std::optional<Tensor> salient_weight,
                  std::optional<Tensor> salient_index, std::optional<Tensor> salient_basis,
                  std::optional<Tensor> rotation, std::optional<Tensor> bias, int64_t out_features,
                  int64_t bits, int64_t group_size, bool symmetric) {
    const PackedWeight weight = check_packed(packed, out_features, bits, group_size, symmetric);
    check_cpu(kOp, "x", x);
    FusedGemmCall call(weight, x, salient_weight, salient_index, salient_basis, rotation, bias);
    FusedGemmArgs& args = call.args;
    check_index(args);

    Tensor y = call.empty_y();
    args.y = y.mutable_data_ptr();
    args.int8_activations = cpu::active_precision() == cpu::Precision::kInt8;
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
