#include "gemm.h"

#include "isa.h"

namespace rosaq::cpu {
namespace {

// Multiply-adds below which a parallel region costs more than it saves.
constexpr int64_t kSerialWork = 1 << 15;

// Row strides get an odd number of cache lines: at a power of two the rows of a tile would share one L1 set.
int64_t padded(int64_t k) {
    return (round_up<int64_t>(k, 16) / 16 | 1) * 16;
}

// What x's dtype carries: 8, 11 and 24 bits of mantissa, and room below the largest of a chunk.
int num_digits(const FusedGemmArgs& a) {
    if (a.int8_activations) return 1;
    return a.x.dtype == DType::kBFloat16 ? 2 : a.x.dtype == DType::kFloat16 ? 3 : 4;
}

bool streams(const FusedGemmArgs& a, const KernelTable& kernels) {
    return kernels.stream_gemm != nullptr && a.m <= kernels.stream_limits.tokens[num_digits(a) - 1];
}

int64_t padded_tokens(int64_t m, int64_t tile_rows) {
    return m / tile_rows * tile_rows + (m % tile_rows ? tile_size(m % tile_rows, tile_rows) : 0);
}

struct Workspace {
    int64_t t, rotated, s, planes, offsets, units, total;  // byte offsets
};

Workspace plan(const FusedGemmArgs& a) {
    Workspace w{};
    const auto take = [&w](int64_t bytes) {
        const int64_t at = w.total;
        w.total += round_up<int64_t>(bytes, 64);
        return at;
    };
    const int64_t k = a.weight.k, chunks = k / chunk_k(a.weight.group_size);
    const KernelTable& kernels = active_kernels();
    const int64_t digits = streams(a, kernels) ? num_digits(a) : 0;
    w.t = take(a.m * padded(k) * 4);
    w.rotated = take(a.rotation_size ? a.m * padded(k) * 4 : 0);
    w.s = take(a.r ? a.m * padded(a.r) * 4 : 0);
    const int64_t tokens = digits ? padded_tokens(a.m, kernels.tile_rows[digits - 1]) : 0;
    w.planes = take(tokens * k * digits);
    w.offsets = take(tokens * chunks * digit_parts(static_cast<int>(digits)) * 4);
    w.units = take(tokens * chunks * 4);
    return w;
}

struct Steps {
    const FusedGemmArgs& args;
    const KernelTable& kernels;
    const Parallel& parallel;

    int64_t grain(int64_t work_per_unit) const { return kSerialWork / (work_per_unit + 1) + 1; }

    void dense(const DenseProduct& p) const {
        const int64_t units = p.batches * ceil_div(p.cols, kernels.dense_cols);
        parallel(units, grain(p.m * p.rows * kernels.dense_cols),
                 [&](int64_t begin, int64_t end) { kernels.dense_product(p, begin, end); });
    }

    void to_float(float* t, int64_t ldt) const {
        parallel(args.m, grain(args.weight.k), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                kernels.to_float(args.x, row, args.weight.k, t + row * ldt);
        });
    }

    void rotate(const float* t, float* rotated, int64_t ldt) const {
        const int64_t b = args.rotation_size, batches = args.weight.k / b;
        dense({t, ldt, args.m, b, b, batches, args.rotation, args.rotation_blocks == 1, rotated, ldt});
    }

    void project(const float* t, int64_t ldt, float* s, int64_t lds) const {
        if (args.salient_basis.data != nullptr)
            return dense({t, ldt, args.m, args.weight.k, args.r, 1, args.salient_basis, true, s, lds});
        for (int64_t row = 0; row < args.m; ++row)
            for (int64_t j = 0; j < args.r; ++j) s[row * lds + j] = t[row * ldt + args.salient_index[j]];
    }

    void main_loop(MainLoop& p) const {
        const PackedWeight& w = args.weight;
        if (p.digits.num_digits == 0) {
            parallel(ceil_div(w.layout.num_panels, kernels.block_panels), 1,
                     [&](int64_t begin, int64_t end) { kernels.block_gemm(p, begin, end); });
            return;
        }
        parallel(padded_tokens(args.m, p.digits.tile_rows), grain(w.k), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) kernels.make_digits(p, row);
        });
        parallel(w.layout.num_panels, grain(w.k * kPanelRows),
                 [&](int64_t begin, int64_t end) { kernels.stream_gemm(p, begin, end); });
    }
};

}  // namespace

int64_t workspace_bytes(const FusedGemmArgs& args) {
    return plan(args).total;
}

void fused_gemm(const FusedGemmArgs& args, void* workspace, const Parallel& parallel) {
    if (args.m == 0 || args.weight.n == 0) return;
    const Workspace plan_ = plan(args);
    char* base = static_cast<char*>(workspace);
    const Steps steps{args, active_kernels(), parallel};

    const int64_t ldt = padded(args.weight.k);
    float* t = reinterpret_cast<float*>(base + plan_.t);
    steps.to_float(t, ldt);
    if (args.rotation_size != 0) {
        float* rotated = reinterpret_cast<float*>(base + plan_.rotated);
        steps.rotate(t, rotated, ldt);
        t = rotated;
    }

    MainLoop p;
    p.args = &args;
    p.t = t;
    p.ldt = ldt;
    if (args.r != 0) {
        float* s = reinterpret_cast<float*>(base + plan_.s);
        p.s = s;
        p.lds = padded(args.r);
        steps.project(t, ldt, s, p.lds);
    }
    if (streams(args, steps.kernels)) {
        const int digits = num_digits(args);
        p.digits = {digits,
                    steps.kernels.tile_rows[digits - 1],
                    reinterpret_cast<int8_t*>(base + plan_.planes),
                    reinterpret_cast<int32_t*>(base + plan_.offsets),
                    reinterpret_cast<float*>(base + plan_.units),
                    args.weight.symmetric ? 1 << (args.weight.bits - 1) : 1};
    }
    steps.main_loop(p);
}

}  // namespace rosaq::cpu
