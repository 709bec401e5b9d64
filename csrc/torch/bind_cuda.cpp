// fused_gemm on CUDA: check, plan, allocate, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../launch/launch.h"
#include "cuda_context.h"
#include "cuda_weight.h"
#include "fused_args.h"
#include "many_tokens.h"

namespace rosaq::bind {
namespace {

constexpr const char* kOp = kFusedGemm;

// Addresses that the kernels read 16 bytes at a time. Allocations are aligned; views into them need not be.
void check_aligned(const char* name, const void* data, uintptr_t bytes) {
    const uintptr_t rest = reinterpret_cast<uintptr_t>(data) % bytes;
    ROSAQ_CHECK(rest == 0, kOp, ": ", name, ": got an address ", rest, " bytes past a multiple of ", bytes,
                ", need an aligned tensor (clone() makes one)");
}

void check_call(const FusedGemmCall& call) {
    const FusedGemmArgs& a = call.args;
    check_dtype(kOp, "x", call.x, {ScalarType::Half, ScalarType::BFloat16});
    check_aligned("x", a.x.data, 16);
    check_aligned("salient_weight", a.salient_weight.data, a.r % 8 == 0 ? 16 : 2);
    check_aligned("salient_basis", a.salient_basis.data, a.r % 2 == 0 ? 4 : 2);
    check_aligned("rotation", a.rotation.data, 4);
    ROSAQ_CHECK(a.rotation_size % 16 == 0, kOp, ": rotation: got blocks of size ", a.rotation_size,
                ", need a multiple of 16 on CUDA");
}

std::string text_of(const cuda::Problem& problem, const FusedGemmArgs& a, const cuda::Schedule& s) {
    std::ostringstream out;
    out << "fused_gemm_kernel for m " << problem.m << ", n " << problem.n << ", k " << problem.k << ", r "
        << problem.r << ", " << a.weight.bits << " bits, rotation " << a.rotation_size << ", " << s.grid
        << " blocks";
    return out.str();
}

// Warps of a block of the kernel for a few tokens; 0 where a rotation makes blocks wait for each other and
// not all of them can be resident.
int few_tokens_warps(const FusedGemmArgs& a, const cuda::Instance& instance, const DeviceFacts& facts) {
    const int wanted =
        cuda::few_tokens_warps(a.weight.n, facts.sms, instance.few_warp_bytes, facts.smem_per_block);
    if (a.rotation_size == 0) return wanted;
    for (int warps = wanted; warps >= cuda::kFewMaxWarps / 2; warps /= 2) {
        int per_sm = 0;
        check_cuda(kOp, instance.few_blocks_per_sm(warps, &per_sm), "few_tokens_kernel on this device");
        if (ceil_div<int64_t>(a.weight.n, cuda::kRecordRows) <= int64_t{per_sm} * facts.sms) return warps;
    }
    return 0;
}

// Up to 8 tokens. False if the kernel for them does not take the call.
bool run_few(FusedGemmCall& call, const CudaWeight& weight, Tensor& y, const DeviceFacts& facts,
             cudaStream_t stream) {
    const FusedGemmArgs& a = call.args;
    if (!cuda::is_few_tokens(a)) return false;
    const cuda::Instance* instance =
        cuda::find_instance(a.x.dtype, a.weight.bits, a.weight.symmetric, cuda::kFewTokens);
    ROSAQ_CHECK(instance != nullptr, kOp, ": x: got ", a.m, " tokens, for which no kernel was built");
    const int warps = few_tokens_warps(a, *instance, facts);
    if (warps == 0) return false;
    cuda::GemmParams p = cuda::params_of(a, weight.layout, weight.blob);
    p.m = static_cast<int>(a.m), p.x = a.x.data, p.y = y.mutable_data_ptr();
    p.schedule.k_tiles = cuda::few_tokens_tiles(a);
    std::optional<Tensor> t;
    if (a.rotation_size != 0) {
        const std::vector<int64_t> shape{a.m, a.weight.k};
        t = torch::stable::empty(shape, call.x.scalar_type(), std::nullopt, call.x.device());
        p.t = t->mutable_data_ptr();
        p.counters = launch_counters(kOp, y.get_device_index(), stream);
    }
    const cudaError_t error = instance->launch_few(p, warps, stream);
    check_cuda(kOp, error, "few_tokens_kernel with " + std::to_string(warps) + " warps a block");
    return true;
}

// Up to kMaxFusedTokens tokens: one launch for every 64.
void run_fused(FusedGemmCall& call, const CudaWeight& weight, Tensor& y, const DeviceFacts& facts,
               cudaStream_t stream) {
    const FusedGemmArgs& a = call.args;
    const int device = y.get_device_index();
    const int tokens = cuda::tokens_for(a.m);
    const cuda::Instance* instance = nullptr;
    if (cuda::is_for_warpgroups(a, facts.major))
        instance = cuda::find_warpgroup_instance(a.x.dtype, a.weight.bits, tokens);
    if (instance == nullptr)
        instance = cuda::find_instance(a.x.dtype, a.weight.bits, a.weight.symmetric, tokens);
    ROSAQ_CHECK(instance != nullptr, kOp, ": x: got ", a.m, " tokens, for which no kernel was built");
    cuda::GemmParams p = cuda::params_of(a, weight.layout, weight.blob);
    int per_sm = 0;
    check_cuda(kOp, instance->blocks_per_sm(&per_sm), "fused_gemm_kernel on this device");
    ROSAQ_CHECK(per_sm > 0, kOp, ": x: got ", a.m, " tokens, which need ", instance->shape.smem_bytes,
                " bytes of shared memory, need at most ", facts.smem_per_block, " on this device");

    const cuda::Problem problem = cuda::problem_of(a);
    const cuda::Schedule schedule = cuda::make_schedule(problem, instance->shape, facts.sms * per_sm);
    ROSAQ_CHECK(cuda::kFirstTileCounter + schedule.row_tiles <= kCounterInts, kOp, ": out_features: got ",
                a.weight.n, ", need at most ",
                int64_t{kCounterInts - cuda::kFirstTileCounter} * instance->shape.rows);
    const cuda::Scratch scratch = cuda::scratch_of(problem, instance->shape, schedule);
    const std::vector<int64_t> bytes{scratch.total};
    const Tensor workspace = torch::stable::empty(bytes, ScalarType::Byte, std::nullopt, call.x.device());
    auto* base = static_cast<uint8_t*>(workspace.mutable_data_ptr());

    p.schedule = schedule;
    p.t = problem.has_rotation ? base + scratch.t : nullptr;
    p.s_parts = reinterpret_cast<float*>(base + scratch.s_parts);
    p.partials = reinterpret_cast<float*>(base + scratch.partials);
    p.counters = launch_counters(kOp, device, stream);
    for (int64_t first = 0; first < a.m; first += cuda::kMaxTokens) {
        p.m = static_cast<int>(std::min<int64_t>(a.m - first, cuda::kMaxTokens));
        p.x = static_cast<const uint16_t*>(a.x.data) + first * a.weight.k;
        p.y = static_cast<uint16_t*>(y.mutable_data_ptr()) + first * a.weight.n;
        const cudaError_t error = cuda::fused_gemm(*instance, p, stream);
        if (error != cudaSuccess) check_cuda(kOp, error, text_of(problem, a, schedule));
    }
}

Tensor fused_gemm(const Tensor& x, const Tensor& packed, std::optional<Tensor> salient_weight,
                  std::optional<Tensor> salient_index, std::optional<Tensor> salient_basis,
                  std::optional<Tensor> rotation, std::optional<Tensor> bias, int64_t out_features,
                  int64_t bits, int64_t group_size, bool symmetric) {
    ROSAQ_CHECK(x.is_cuda(), kOp, ": x: got a tensor on the CPU, need it beside the CUDA tensors");
    check_beside(kOp, "packed", packed, x);
    ROSAQ_CHECK(x.dim() >= 1, kOp, ": x: got shape ", shape_text(x), ", need [..., k]");
    const int64_t k = x.size(x.dim() - 1);
    const CudaWeight weight = parse_cuda_blob(kOp, packed, out_features, k, bits, group_size, symmetric);
    FusedGemmCall call(weight.packed, x, salient_weight, salient_index, salient_basis, rotation, bias);
    check_call(call);

    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor y = call.empty_y();
    if (call.args.m == 0) return y;
    const cudaStream_t stream = current_stream(kOp, device);
    const DeviceFacts& facts = device_facts(kOp, device);
    if (run_few(call, weight, y, facts, stream)) return y;
    if (call.args.m <= cuda::kMaxFusedTokens)
        run_fused(call, weight, y, facts, stream);
    else
        many_tokens(call, weight, y, stream);
    return y;
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CUDA, m) {
    m.impl("fused_gemm", TORCH_BOX(&rosaq::bind::fused_gemm));
}
