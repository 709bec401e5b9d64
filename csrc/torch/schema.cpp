// Every op of rosaq, once. What they mean: rosaq/ops.py and DESIGN.md.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(rosaq, m) {
    m.def("prepack(Tensor qweight, Tensor scales, Tensor? zeros, int bits) -> Tensor");
    m.def("unprepack(Tensor packed) -> (Tensor, Tensor, Tensor?)");
    m.def(
        "fused_gemm(Tensor x, Tensor packed, Tensor? salient_weight, Tensor? salient_index, Tensor? "
        "salient_basis, "
        "Tensor? rotation, Tensor? bias, int out_features, int bits, int group_size, bool symmetric) -> "
        "Tensor");
    m.def(
        "fused_gemms(Tensor x, Tensor[] packed, Tensor[] salient_weights, Tensor? salient_index, Tensor? "
        "salient_basis, Tensor? rotation, Tensor[] biases, int[] out_features, int bits, int group_size, "
        "bool "
        "symmetric) -> Tensor[]");
    m.def("pack(Tensor codes, int bits) -> Tensor");
    m.def("unpack(Tensor qweight, int bits) -> Tensor");
    m.def(
        "round_panel(Tensor columns, Tensor factor, Tensor scale, Tensor zero, int bits) -> (Tensor, "
        "Tensor)");
    m.def(
        "sweep_panel(Tensor slope, Tensor codes, Tensor gram, Tensor scale, Tensor zero, int bits) -> "
        "(Tensor, Tensor)");
}
