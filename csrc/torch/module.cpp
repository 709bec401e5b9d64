// rosaq._C for Python: what only introspects the build, the machine and the layout. What computes is an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <stdexcept>

#include "../common/layout.h"
#include "../cpu/isa.h"

namespace py = pybind11;

namespace {

void check_bits(int bits) {
    if (bits != 3 && bits != 4)
        throw std::invalid_argument("bits: got " + std::to_string(bits) + ", need 3 or 4");
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["torch_headers"] = TORCH_VERSION;
    info["torch_target"] = "2.10";
    info["cuda"] = false;
    info["layout_version"] = rosaq::kLayoutVersion;
    return info;
}

int64_t packed_bytes(int64_t n, int64_t k, int bits, int64_t group_size, bool symmetric) {
    check_bits(bits);
    if (group_size == -1) group_size = k;
    if (n <= 0 || n % 8)
        throw std::invalid_argument("n: got " + std::to_string(n) + ", need a positive multiple of 8");
    if (k <= 0 || k % 32)
        throw std::invalid_argument("k: got " + std::to_string(k) + ", need a positive multiple of 32");
    if (group_size <= 0 || group_size % 32 || k % group_size)
        throw std::invalid_argument("group_size: got " + std::to_string(group_size) +
                                    ", need a multiple of 32 that divides k " + std::to_string(k));
    return rosaq::panel_layout(n, k, bits, group_size, symmetric).total_bytes;
}

// For each bit of the code at in-block position j (0-31): (word, bit of that word).
std::vector<std::pair<int, int>> code_bits(int bits, int j) {
    check_bits(bits);
    if (j < 0 || j >= rosaq::kBlockK)
        throw std::invalid_argument("j: got " + std::to_string(j) + ", need 0 to 31");
    std::vector<std::pair<int, int>> places;
    for (int b = 0; b < bits; ++b) {
        uint32_t words[4] = {};
        rosaq::deposit_code(bits, words, j, 1u << b);
        for (int w = 0; w < bits; ++w)
            if (words[w] != 0) places.emplace_back(w, __builtin_ctz(words[w]));
    }
    return places;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of rosaq (registered as torch.ops.rosaq.*) and facts about this build.";
    m.def("build_info", &build_info);
    m.def("available_isas", &rosaq::cpu::available_isas);
    m.def("active_isa", [] { return std::string(rosaq::cpu::active_kernels().name); });
    m.def("set_isa", &rosaq::cpu::set_isa, py::arg("name"));
    m.def("packed_bytes", &packed_bytes, py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"),
          py::arg("symmetric"));
    m.def("code_bits", &code_bits, py::arg("bits"), py::arg("j"));
    m.attr("PANEL_ROWS") = rosaq::kPanelRows;
    m.attr("HEADER_BYTES") = rosaq::kHeaderBytes;
}
