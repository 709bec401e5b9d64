// rosaq._C for Python: what only introspects the build, the machine and the layout. What computes is an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <tuple>

#include "../common/layout.h"
#include "../cpu/isa.h"
#include "../launch/plan.h"

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
#ifdef ROSAQ_CUDA_ARCHS
    info["cuda"] = true;
    info["cuda_archs"] = ROSAQ_CUDA_ARCHS;
#else
    info["cuda"] = false;
    info["cuda_archs"] = "";
#endif
    info["layout_version"] = rosaq::kLayoutVersion;
    return info;
}

int64_t packed_bytes(int64_t n, int64_t k, int bits, int64_t group_size, bool symmetric, bool cuda,
                     bool bf16_scales) {
    check_bits(bits);
    if (group_size == -1) group_size = k;
    if (n <= 0 || n % 8)
        throw std::invalid_argument("n: got " + std::to_string(n) + ", need a positive multiple of 8");
    if (k <= 0 || k % 32)
        throw std::invalid_argument("k: got " + std::to_string(k) + ", need a positive multiple of 32");
    if (group_size <= 0 || group_size % 32 || k % group_size)
        throw std::invalid_argument("group_size: got " + std::to_string(group_size) +
                                    ", need a multiple of 32 that divides k " + std::to_string(k));
    if (!cuda) return rosaq::panel_layout(n, k, bits, group_size, symmetric).total_bytes;
    if (!rosaq::cuda::is_group_size(group_size, k))
        throw std::invalid_argument("group_size: got " + std::to_string(group_size) + " for k " +
                                    std::to_string(k) + ", need 32, 64, 128 or k on CUDA");
    return rosaq::cuda::blob_layout(n, k, bits, group_size, symmetric, bf16_scales ? 1 : 0).total_bytes;
}

// The same for a record (32 rows x 128 k) of the CUDA layout: (lane, word, bit).
std::vector<std::tuple<int, int, int>> cuda_code_bits(int bits, int row, int k) {
    check_bits(bits);
    if (row < 0 || row >= rosaq::cuda::kRecordRows)
        throw std::invalid_argument("row: got " + std::to_string(row) + ", need 0 to 31");
    if (k < 0 || k >= rosaq::cuda::kBlockK)
        throw std::invalid_argument("k: got " + std::to_string(k) + ", need 0 to 127");
    std::vector<std::tuple<int, int, int>> places;
    for (int b = 0; b < bits; ++b) {
        const rosaq::cuda::BitPlace p = rosaq::cuda::bit_place(bits, row, k, b);
        places.emplace_back(p.lane, p.word, p.bit);
    }
    return places;
}

// How fused_gemm would cut a problem on a device that holds `resident` blocks of `rows` rows at a time.
py::dict cuda_schedule(int64_t m, int64_t n, int64_t k, int64_t r, bool has_basis, bool has_rotation,
                       int rows, int resident) {
    if (resident < 1 || rows < 1)
        throw std::invalid_argument("resident, rows: got " + std::to_string(resident) + ", " +
                                    std::to_string(rows) + ", need at least 1");
    const rosaq::cuda::Problem problem{m, n, k, r, has_basis, has_rotation};
    const int tokens = rosaq::cuda::tokens_for(m);
    const rosaq::cuda::InstanceShape shape{rosaq::DType::kFloat16, 3, false, tokens, rows, 0, 0};
    const rosaq::cuda::Schedule s = rosaq::cuda::make_schedule(problem, shape, resident);
    py::dict made;
    made["tokens"] = tokens;
    made["row_tiles"] = s.row_tiles;
    made["k_tiles"] = s.k_tiles;
    made["grid"] = s.grid;
    made["lists"] = s.lists, made["list_blocks"] = s.list_blocks, made["list_tiles"] = s.list_tiles;
    made["tiles_per_block"] = s.tiles_per_block;
    made["extra"] = s.extra;
    made["projection_parts"] = s.projection_parts;
    made["scratch_bytes"] = rosaq::cuda::scratch_of(problem, shape, s).total;
    return made;
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
    m.def("cpu_precision", &rosaq::cpu::precision_name);
    m.def("set_cpu_precision", &rosaq::cpu::set_precision, py::arg("name"));
    m.def("set_isa", &rosaq::cpu::set_isa, py::arg("name"));
    m.def("packed_bytes", &packed_bytes, py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"),
          py::arg("symmetric"), py::arg("cuda") = false, py::arg("bf16_scales") = false);
    m.def("cuda_code_bits", &cuda_code_bits, py::arg("bits"), py::arg("row"), py::arg("k"));
    m.def("cuda_schedule", &cuda_schedule, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"),
          py::arg("has_basis"), py::arg("has_rotation"), py::arg("rows"), py::arg("resident"));
    m.def("code_bits", &code_bits, py::arg("bits"), py::arg("j"));
    m.attr("PANEL_ROWS") = rosaq::kPanelRows;
    m.attr("HEADER_BYTES") = rosaq::kHeaderBytes;
}
