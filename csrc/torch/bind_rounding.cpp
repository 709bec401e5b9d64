// round_panel and sweep_panel on the CPU.
#include <torch/csrc/stable/library.h>

#include "../cpu/isa.h"
#include "rounding_args.h"

namespace rosaq::bind {
namespace {

std::tuple<Tensor, Tensor> run(const RoundingCall& call,
                               void (*kernel)(const RoundingArgs&, int64_t, int64_t), int64_t rows) {
    torch::stable::parallel_for(0, ceil_div(call.args.n, rows), 1,
                                [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
    return call.outputs();
}

std::tuple<Tensor, Tensor> round_panel(const Tensor& columns, const Tensor& factor, const Tensor& scale,
                                       const Tensor& zero, int64_t bits) {
    check_cpu(kRoundPanel, "columns", columns);
    const cpu::KernelTable& kernels = cpu::active_kernels();
    return run(RoundingCall::round(columns, factor, scale, zero, bits), kernels.round_panel,
               kernels.rounding_rows);
}

std::tuple<Tensor, Tensor> sweep_panel(const Tensor& slope, const Tensor& codes, const Tensor& gram,
                                       const Tensor& scale, const Tensor& zero, int64_t bits) {
    check_cpu(kSweepPanel, "slope", slope);
    const cpu::KernelTable& kernels = cpu::active_kernels();
    return run(RoundingCall::sweep(slope, codes, gram, scale, zero, bits), kernels.sweep_panel,
               kernels.rounding_rows);
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CPU, m) {
    m.impl("round_panel", TORCH_BOX(&rosaq::bind::round_panel));
    m.impl("sweep_panel", TORCH_BOX(&rosaq::bind::sweep_panel));
}
