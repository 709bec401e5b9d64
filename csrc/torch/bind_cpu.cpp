// fused_gemm on the CPU: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include "../cpu/gemm.h"
#include "../cpu/isa.h"
#include "../cpu/pages.h"
#include "fused_args.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = kFusedGemm;
constexpr const char* kGemms = "rosaq::fused_gemms";

// Scratch up to here (one token of a 4096-wide layer) lies on the stack: an allocation costs about a
// microsecond.
constexpr int64_t kSmallScratchBytes = 64 << 10;
// From here on malloc may map it anew at every call, and every small page of it is a page fault.
constexpr int64_t kLargeScratchBytes = 8 << 20;

void run_on_torch_threads(int64_t count, int64_t grain, cpu::Parallel::Range range, void* context) {
    ROSAQ_CHECK(torch_parallel_for(0, count, grain, range, context) == 0, kOp,
                ": torch could not run its threads");
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

void run(const FusedGemmArgs* args, int count) {
    const cpu::Precision precision = cpu::active_precision();
    const cpu::KernelTable& kernels = cpu::active_kernels();
    const int64_t bytes = cpu::workspace_bytes(args[0], precision, kernels);
    const cpu::Parallel parallel{run_on_torch_threads};
    alignas(64) char small[kSmallScratchBytes];
    if (bytes <= kSmallScratchBytes) {
        cpu::fused_gemm(args, count, precision, kernels, small, parallel);
    } else {
        const std::vector<int64_t> shape{bytes};
        const Tensor scratch = torch::stable::empty(shape, ScalarType::Byte);
        if (bytes >= kLargeScratchBytes) cpu::ask_huge_pages(scratch.mutable_data_ptr(), bytes);
        cpu::fused_gemm(args, count, precision, kernels, scratch.mutable_data_ptr(), parallel);
    }
}

Tensor fused_gemm(const Tensor& x, const Tensor& packed, std::optional<Tensor> salient_weight,
                  std::optional<Tensor> salient_index, std::optional<Tensor> salient_basis,
                  std::optional<Tensor> rotation, std::optional<Tensor> bias, int64_t out_features,
                  int64_t bits, int64_t group_size, bool symmetric) {
    const PackedWeight weight = check_packed(packed, out_features, bits, group_size, symmetric);
    check_cpu(kOp, "x", x);
    FusedGemmCall call(weight, x, salient_weight, salient_index, salient_basis, rotation, bias);
    check_index(call.args);
    Tensor y = call.empty_y();
    call.args.y = y.mutable_data_ptr();
    run(&call.args, 1);
    return y;
}

std::optional<Tensor> nth(const std::vector<Tensor>& tensors, size_t i) {
    return tensors.empty() ? std::nullopt : std::optional<Tensor>(tensors[i]);
}

std::vector<Tensor> fused_gemms(const Tensor& x, const std::vector<Tensor>& packed,
                                const std::vector<Tensor>& salient_weights,
                                std::optional<Tensor> salient_index, std::optional<Tensor> salient_basis,
                                std::optional<Tensor> rotation, const std::vector<Tensor>& biases,
                                const std::vector<int64_t>& out_features, int64_t bits, int64_t group_size,
                                bool symmetric) {
    const size_t count = packed.size();
    ROSAQ_CHECK(count >= 1 && count <= cpu::kMaxWeights, kGemms, ": packed: got ", count,
                " weights, need 1 to ", cpu::kMaxWeights);
    ROSAQ_CHECK(out_features.size() == count, kGemms, ": out_features: got ", out_features.size(), ", need ",
                count, ", one for each weight");
    for (const auto& [name, tensors] : {std::pair("salient_weights", &salient_weights), {"biases", &biases}})
        ROSAQ_CHECK(tensors->empty() || tensors->size() == count, kGemms, ": ", name, ": got ",
                    tensors->size(), ", need none or ", count, ", one for each weight");
    check_cpu(kGemms, "x", x);
    std::vector<FusedGemmCall> calls;
    std::vector<FusedGemmArgs> args;
    std::vector<Tensor> ys;
    calls.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const PackedWeight weight = check_packed(packed[i], out_features[i], bits, group_size, symmetric);
        const FusedGemmCall& call = calls.emplace_back(weight, x, nth(salient_weights, i), salient_index,
                                                       salient_basis, rotation, nth(biases, i));
        args.push_back(call.args);
        ROSAQ_CHECK(args[i].r == args[0].r, kGemms, ": salient_weights: got ", args[i].r, " columns at [", i,
                    "], need ", args[0].r, " as at [0]");
        ys.push_back(call.empty_y());
        args[i].y = ys[i].mutable_data_ptr();
    }
    check_index(args[0]);
    run(args.data(), static_cast<int>(count));
    return ys;
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CPU, m) {
    m.impl("fused_gemm", TORCH_BOX(&rosaq::bind::fused_gemm));
    m.impl("fused_gemms", TORCH_BOX(&rosaq::bind::fused_gemms));
}
