// The CUDA side of a build without nvcc: every op says what is missing and how to get it.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace rosaq::bind {
namespace {

[[noreturn]] void refuse(const char* op) {
    STD_TORCH_CHECK(
        false, op,
        ": got CUDA tensors, but this build of rosaq has no CUDA kernels: it was compiled without nvcc. "
        "Install the CUDA toolkit (nvcc 12.4 or newer on PATH or CUDA_HOME) and run "
        "`ROSAQ_BUILD=cuda pip install --force-reinstall --no-deps .`, or move the model to the CPU");
}

Tensor fused_gemm(const Tensor&, const Tensor&, std::optional<Tensor>, std::optional<Tensor>,
                  std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, int64_t, int64_t,
                  int64_t, bool) {
    refuse("rosaq::fused_gemm");
}

Tensor prepack(const Tensor&, const Tensor&, std::optional<Tensor>, int64_t) {
    refuse("rosaq::prepack");
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> unprepack(const Tensor&) {
    refuse("rosaq::unprepack");
}

Tensor pack(const Tensor&, int64_t) {
    refuse("rosaq::pack");
}

Tensor unpack(const Tensor&, int64_t) {
    refuse("rosaq::unpack");
}

std::tuple<Tensor, Tensor> round_panel(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t) {
    refuse("rosaq::round_panel");
}

std::tuple<Tensor, Tensor> sweep_panel(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, int64_t) {
    refuse("rosaq::sweep_panel");
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CUDA, m) {
    m.impl("fused_gemm", TORCH_BOX(&rosaq::bind::fused_gemm));
    m.impl("prepack", TORCH_BOX(&rosaq::bind::prepack));
    m.impl("unprepack", TORCH_BOX(&rosaq::bind::unprepack));
    m.impl("pack", TORCH_BOX(&rosaq::bind::pack));
    m.impl("unpack", TORCH_BOX(&rosaq::bind::unpack));
    m.impl("round_panel", TORCH_BOX(&rosaq::bind::round_panel));
    m.impl("sweep_panel", TORCH_BOX(&rosaq::bind::sweep_panel));
}
