#include "gemm.h"

namespace rosaq::cpu {
namespace {

// Multiply-adds below which a parallel region costs more than it saves.
constexpr int64_t kSerialWork = 1 << 15;
// The same for products in float32, which do a quarter of the multiply-adds in a cycle.
constexpr int64_t kSerialDense = 1 << 18;

// Row strides get an odd number of cache lines: at a power of two the rows of a tile would share one L1 set.
int64_t padded(int64_t k) {
    return (round_up<int64_t>(k, 16) / 16 | 1) * 16;
}

// What x's dtype carries: 8, 11 and 24 bits of mantissa, and room below the largest of a chunk.
int num_digits(const FusedGemmArgs& a, Precision precision) {
    if (precision == Precision::kInt8) return 1;
    return a.x.dtype == DType::kBFloat16 ? 2 : a.x.dtype == DType::kFloat16 ? 3 : 4;
}

enum class Loop { kStream, kWords, kBlock };

Loop choose_loop(const FusedGemmArgs& a, int digits, const KernelTable& kernels) {
    if (kernels.stream_gemm != nullptr && a.m <= kernels.stream_limits.tokens[digits - 1])
        return Loop::kStream;
    return kernels.word_gemm != nullptr && digits == 2 ? Loop::kWords : Loop::kBlock;
}

int64_t padded_tokens(int64_t m, int64_t tile_rows) {
    return m / tile_rows * tile_rows + (m % tile_rows ? tile_size(m % tile_rows, tile_rows) : 0);
}

struct Workspace {
    int64_t t, rotated, s, integers, offsets, units, total;  // byte offsets
};

Workspace plan(const FusedGemmArgs& a, int digits, const KernelTable& kernels) {
    Workspace w{};
    const auto take = [&w](int64_t bytes) {
        const int64_t at = w.total;
        w.total += round_up<int64_t>(bytes, 64);
        return at;
    };
    const int64_t k = a.weight.k, chunks = k / chunk_k(a.weight.group_size);
    const Loop loop = choose_loop(a, digits, kernels);
    w.t = take(a.m * padded(k) * 4);
    w.rotated = take(a.rotation_size ? a.m * padded(k) * 4 : 0);
    w.s = take(a.r ? a.m * padded(a.r) * 4 : 0);
    if (loop == Loop::kBlock) return w;
    const int64_t tile_rows = loop == Loop::kWords ? kernels.word_tile_rows : kernels.tile_rows[digits - 1];
    const int64_t tokens = padded_tokens(a.m, tile_rows);
    w.integers = take(tokens * k * digits);
    w.offsets = take(loop == Loop::kStream ? tokens * chunks * digit_parts(digits) * 4 : 0);
    w.units = take(tokens * chunks * 4);
    return w;
}

struct Steps {
    const FusedGemmArgs& args;  // the first of `count`
    const int count, digits;
    const KernelTable& kernels;
    const Parallel& parallel;

    static int64_t grain(int64_t work_per_unit, int64_t serial = kSerialWork) {
        return serial / (work_per_unit + 1) + 1;
    }

    void dense(const DenseProduct& p) const {
        const int64_t rows = rows_each(p) < kDenseRows ? rows_each(p) : kDenseRows;
        parallel(dense_units(p, kernels.dense_cols), grain(rows * p.rows * kernels.dense_cols, kSerialDense),
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

    // units_of(weight): how many units a weight has; kernel: the main loop that runs them.
    template <class UnitsOf>
    void all_weights(const MainLoop& shared, int64_t least, UnitsOf units_of,
                     void (*kernel)(const MainLoop& p, int64_t begin, int64_t end)) const {
        int64_t first[kMaxWeights + 1] = {0};
        for (int i = 0; i < count; ++i) first[i + 1] = first[i] + units_of((&args)[i].weight);
        parallel(first[count], least, [&](int64_t begin, int64_t end) {
            for (int i = 0; i < count; ++i) {
                const int64_t from = begin > first[i] ? begin : first[i],
                              to = end < first[i + 1] ? end : first[i + 1];
                if (from >= to) continue;
                MainLoop p = shared;
                p.args = &args + i;
                kernel(p, from - first[i], to - first[i]);
            }
        });
    }

    void block(const MainLoop& p) const {
        all_weights(
            p, 1, [&](const PackedWeight& w) { return ceil_div(w.layout.num_panels, kernels.block_panels); },
            kernels.block_gemm);
    }

    void stream(MainLoop& p, char* base, const Workspace& at) const {
        const PackedWeight& w = args.weight;
        p.digits = {digits, kernels.tile_rows[digits - 1], reinterpret_cast<int8_t*>(base + at.integers),
                    reinterpret_cast<int32_t*>(base + at.offsets), reinterpret_cast<float*>(base + at.units)};
        parallel(padded_tokens(args.m, p.digits.tile_rows), grain(w.k), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) kernels.make_digits(p, row);
        });
        all_weights(
            p, grain(w.k * kPanelRows), [](const PackedWeight& each) { return each.layout.num_panels; },
            kernels.stream_gemm);
    }

    void words(MainLoop& p, char* base, const Workspace& at) const {
        p.words = {padded_tokens(args.m, kernels.word_tile_rows), kernels.word_tile_rows,
                   reinterpret_cast<int16_t*>(base + at.integers), reinterpret_cast<float*>(base + at.units)};
        parallel(p.words.tokens, grain(args.weight.k), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) kernels.make_words(p, row);
        });
        const int64_t passes = ceil_div(args.m, word_unit_tokens(args.m, kernels.word_tile_rows));
        all_weights(
            p, 1, [&](const PackedWeight& w) { return ceil_div(w.n, kernels.word_cols) * passes; },
            kernels.word_gemm);
    }
};

}  // namespace

int64_t workspace_bytes(const FusedGemmArgs& args, Precision precision, const KernelTable& kernels) {
    return plan(args, num_digits(args, precision), kernels).total;
}

void fused_gemm(const FusedGemmArgs* all, int count, Precision precision, const KernelTable& kernels,
                void* workspace, const Parallel& parallel) {
    const FusedGemmArgs& args = all[0];
    if (args.m == 0) return;
    const int digits = num_digits(args, precision);
    const Workspace plan_ = plan(args, digits, kernels);
    char* base = static_cast<char*>(workspace);
    const Steps steps{args, count, digits, kernels, parallel};

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
    switch (choose_loop(args, digits, kernels)) {
        case Loop::kStream:
            return steps.stream(p, base, plan_);
        case Loop::kWords:
            return steps.words(p, base, plan_);
        case Loop::kBlock:
            return steps.block(p);
    }
}

}  // namespace rosaq::cpu
