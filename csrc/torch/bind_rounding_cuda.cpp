// round_panel and sweep_panel on CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../launch/launch.h"
#include "cuda_context.h"
#include "rounding_args.h"

namespace rosaq::bind {
namespace {

std::tuple<Tensor, Tensor> round_panel(const Tensor& columns, const Tensor& factor, const Tensor& scale,
                                       const Tensor& zero, int64_t bits) {
    check_is_cuda(kRoundPanel, "columns", columns);
    const int device = columns.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    device_facts(kRoundPanel, device);
    const RoundingCall call = RoundingCall::round(columns, factor, scale, zero, bits);
    check_cuda(kRoundPanel, cuda::round_panel(call.args, current_stream(kRoundPanel, device)),
               "rounding_kernel");
    return call.outputs();
}

std::tuple<Tensor, Tensor> sweep_panel(const Tensor& slope, const Tensor& codes, const Tensor& gram,
                                       const Tensor& scale, const Tensor& zero, int64_t bits) {
    check_is_cuda(kSweepPanel, "slope", slope);
    const int device = slope.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    device_facts(kSweepPanel, device);
    const RoundingCall call = RoundingCall::sweep(slope, codes, gram, scale, zero, bits);
    check_cuda(kSweepPanel, cuda::sweep_panel(call.args, current_stream(kSweepPanel, device)),
               "rounding_kernel");
    return call.outputs();
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CUDA, m) {
    m.impl("round_panel", TORCH_BOX(&rosaq::bind::round_panel));
    m.impl("sweep_panel", TORCH_BOX(&rosaq::bind::sweep_panel));
}
