// The emulator's own tests: each case runs a kernel and compares with plain loops in double. Cases are named,
// so that Python (and main, for the build with ASan) can run every one of them in every mode.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "emulator/c_api.h"
#include "emulator/emulator.h"
#include "gemm.cuh"
#include "misuse.cuh"
#include "ring.cuh"
#include "warpgroup.cuh"

#undef threadIdx

namespace emulator_tests {
namespace {

using emu::Access;
using emu::DeviceArray;
using emu::LaunchOptions;

void require_close(double got, double want, double tolerance, const std::string& what) {
    if (!(std::fabs(got - want) <= tolerance))
        throw emu::Error("wrong result: " + what + ": got " + std::to_string(got) + ", want " +
                         std::to_string(want));
}

struct Shape {
    int m, n, k, num_slices;
};

// Where the code of (row, k) is: see gemm.cuh.
void put_code(uint4* packed, int k_total, int row, int k, uint32_t code) {
    const int record = row / kTileN * (k_total / kTileK) + k / kTileK;
    const int r = row % 16, c = k % 16, lane = r % 8 * 4 + c % 8 / 2;
    const int reg = r / 8 + c / 8 * 2, bit = reg * 4 + c % 2 * 16;
    auto* words = reinterpret_cast<uint32_t*>(packed + record * kGemmThreads + row % kTileN / 16 * 32 + lane);
    words[k % kTileK / 16] |= code << bit;
}

template <Bug kBug>
void run_gemm(Shape s, const LaunchOptions& options) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    DeviceArray<__half> x(s.m * s.k, "x", Access::kIn), scales(s.k / kTileK * s.n, "scales", Access::kIn);
    DeviceArray<uint4> w(s.n * s.k / 32, "w", Access::kIn);
    DeviceArray<float> partial(s.m * s.n, "partial", Access::kOut);
    DeviceArray<int> locks(s.n / kTileN, "locks", Access::kInOut);
    DeviceArray<__half> y(s.m * s.n, "y", Access::kOut);
    for (size_t i = 0; i < x.size(); ++i) x[i] = __float2half_rn(normal(random));
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = __float2half_rn(0.05f + 0.01f * (i % 7));
    for (size_t i = 0; i < w.size(); ++i) w[i] = uint4{0, 0, 0, 0};
    for (size_t i = 0; i < locks.size(); ++i) locks[i] = 0;
    std::vector<double> w_hat(s.n * s.k);
    for (int row = 0; row < s.n; ++row)
        for (int k = 0; k < s.k; ++k) {
            const uint32_t code = random() % 16;
            put_code(w.data(), s.k, row, k, code);
            const __half scale = scales[k / kTileK * s.n + row];
            w_hat[row * s.k + k] =
                __half2float(__hmul(__float2half_rn(static_cast<float>(code) - 8.0f), scale));
        }
    const GemmParams p{x.data(), w.data(), scales.data(), partial.data(), locks.data(), y.data(),
                       s.m,      s.n,      s.k,           s.num_slices};
    const int smem_bytes = kGemmSmemBytes - (kBug == Bug::kSmallSmem ? 64 : 0);
    emu::launch(gemm_kernel<kBug>, dim3(s.n / kTileN, s.num_slices), dim3(kGemmThreads), smem_bytes, options,
                p);
    for (int token = 0; token < s.m; ++token)
        for (int row = 0; row < s.n; ++row) {
            double want = 0, size = 0;
            for (int k = 0; k < s.k; ++k) {
                const double product = __half2float(x[token * s.k + k]) * w_hat[row * s.k + k];
                want += product;
                size += std::fabs(product);
            }
            require_close(__half2float(y[token * s.n + row]), want,
                          std::fabs(want) * 0x1p-10 + size * 0x1p-20,
                          "y[" + std::to_string(token) + ", " + std::to_string(row) + "]");
        }
}

template <RingBug kBug>
void run_ring(const LaunchOptions& options) {
    const int rows = 11;
    DeviceArray<float> x(rows * 128, "x", Access::kIn), sums(rows, "sums", Access::kOut);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 97) - 40.0f;
    emu::launch(ring_kernel<kBug>, dim3(1), dim3(kRingThreads), kSlots * kRowBytes, options, x.data(),
                sums.data(), rows);
    for (int row = 0; row < rows; ++row) {
        double want = 0;
        for (int i = 0; i < 128; ++i) want += x[row * 128 + i];
        require_close(sums[row], want, 0, "sums[" + std::to_string(row) + "]");
    }
}

template <bool kAcquire>
void run_grid_barrier(LaunchOptions options, int resident_blocks) {
    const int blocks = 5;
    DeviceArray<int> counter(1, "counter", Access::kInOut), stage(blocks, "stage", Access::kOut),
        out(blocks, "out", Access::kOut);
    counter[0] = 0;
    options.resident_blocks = resident_blocks;
    for (int launch = 0; launch < 2; ++launch) {
        emu::launch(grid_barrier_kernel<kAcquire>, dim3(blocks), dim3(64), 0, options, counter.data(),
                    stage.data(), out.data());
        for (int i = 0; i < blocks; ++i) require_close(out[i], blocks * (blocks + 1) / 2, 0, "out");
    }
}

template <bool kFence>
void run_last_block(const LaunchOptions& options) {
    DeviceArray<int> counter(1, "counter", Access::kInOut), parts(4 * 64, "parts", Access::kOut),
        out(1, "out", Access::kOut);
    counter[0] = 0;
    emu::launch(last_block_kernel<kFence>, dim3(4), dim3(64), 0, options, counter.data(), parts.data(),
                out.data());
    require_close(out[0], 4 * 63 * 32, 0, "out");
}

void run_forward_wait(LaunchOptions options, int resident_blocks) {
    DeviceArray<int> flag(1, "flag", Access::kInOut);
    flag[0] = 0;
    options.resident_blocks = resident_blocks;
    emu::launch(forward_wait_kernel, dim3(6), dim3(32), 0, options, flag.data());
    require_close(flag[0], 1, 0, "flag");
}

void run_bf16(const LaunchOptions& options, int threads) {
    DeviceArray<__nv_bfloat16> a(16 * 16, "a", Access::kIn), b(16 * 8, "b", Access::kIn);
    DeviceArray<float> d(16 * 8, "d", Access::kOut);
    for (size_t i = 0; i < a.size(); ++i) a[i] = __float2bfloat16_rn(static_cast<float>(i % 11) - 5.0f);
    for (size_t i = 0; i < b.size(); ++i) b[i] = __float2bfloat16_rn(static_cast<float>(i % 7) - 3.0f);
    emu::launch(bf16_kernel, dim3(1), dim3(threads), 0, options, a.data(), b.data(), d.data());
    for (int i = 0; i < 128; ++i) {
        double want = 0;
        for (int k = 0; k < 16; ++k)
            want += __bfloat162float(a[i / 8 * 16 + k]) * __bfloat162float(b[k * 8 + i % 8]);
        require_close(d[i], want, 0, "d[" + std::to_string(i) + "]");
    }
}

template <WgmmaBug kBug>
void run_wgmma(const LaunchOptions& options) {
    DeviceArray<__half> a(64 * 16, "a", Access::kIn), b(32 * 16, "b", Access::kIn);
    DeviceArray<float> out(2 * 64 * 32, "out", Access::kOut);
    for (size_t i = 0; i < a.size(); ++i) a[i] = __float2half_rn(static_cast<float>(i % 11) - 5.0f);
    for (size_t i = 0; i < b.size(); ++i) b[i] = __float2half_rn(static_cast<float>(i % 7) - 3.0f);
    emu::launch(wgmma_kernel<kBug>, dim3(1), dim3(kWgmmaThreads), kWgmmaSmemBytes, options, a.data(),
                b.data(), out.data());
    for (int i = 0; i < 2 * 64 * 32; ++i) {
        double want = 0;
        for (int k = 0; k < 16; ++k)
            want += __half2float(a[i / 32 % 64 * 16 + k]) * __half2float(b[i % 32 * 16 + k]);
        require_close(out[i], (1 + i / (64 * 32)) * want, 0, "out[" + std::to_string(i) + "]");
    }
}

void run_count(const LaunchOptions& options, int largest, int shift, int index) {
    DeviceArray<int> values(100, "values", Access::kIn), counts(8, "counts", Access::kOut);
    for (int i = 0; i < 100; ++i) values[i] = i == 50 ? largest : i % 8;
    emu::launch(count_kernel, dim3(1), dim3(64), 0, options, values.data(), 100, counts.data(), shift, index);
    double total = 0;
    for (int i = 0; i < 8; ++i) total += counts[i];
    require_close(total, 100 << (index == 0 ? shift : 0), 0, "total");
}

template <Misuse kMisuse>
void run_misuse(const LaunchOptions& options) {
    DeviceArray<uint4> in(kMisuseThreads, "in", Access::kIn), out(kMisuseThreads, "out", Access::kOut);
    for (unsigned i = 0; i < kMisuseThreads; ++i) in[i] = uint4{i, i + 1, i + 2, i + 3};
    emu::launch(misuse_kernel<kMisuse>, dim3(1), dim3(kMisuseThreads), kMisuseThreads * 16 + 16, options,
                in.data(), out.data());
    for (int i = 0; i < kMisuseThreads; ++i) require_close(out[i].x, i, 0, "out[" + std::to_string(i) + "]");
}

using Case = std::function<void(const LaunchOptions&)>;

template <Bug kBug>
Case gemm(Shape shape = {13, 128, 512, 2}) {
    return [shape](const LaunchOptions& options) { run_gemm<kBug>(shape, options); };
}

const std::map<std::string, Case>& cases() {
    static const std::map<std::string, Case> all = {
        {"gemm", gemm<Bug::kNone>()},
        {"gemm one slice", gemm<Bug::kNone>({1, 64, 64, 1})},
        {"gemm timed", gemm<Bug::kNone>({16, 256, 512, 1})},
        {"gemm short wait", gemm<Bug::kShortWait>()},
        {"gemm no barrier", gemm<Bug::kNoBarrier>()},
        {"gemm early prefetch", gemm<Bug::kEarlyPrefetch>()},
        {"gemm no split order", gemm<Bug::kNoSplitOrder>({13, 128, 512, 4})},
        {"gemm relaxed release", gemm<Bug::kRelaxedRelease>()},
        {"gemm early release", gemm<Bug::kEarlyRelease>()},
        {"gemm store past end", gemm<Bug::kStorePastEnd>()},
        {"gemm small smem", gemm<Bug::kSmallSmem>()},
        {"gemm misaligned", gemm<Bug::kMisaligned>()},
        {"gemm no scales", gemm<Bug::kNoScales>()},
        {"gemm no accumulators", gemm<Bug::kNoAccumulators>()},
        {"gemm divergent barrier", gemm<Bug::kDivergentBarrier>()},
        {"gemm divergent ldmatrix", gemm<Bug::kDivergentLdmatrix>()},
        {"gemm early exit", gemm<Bug::kEarlyExit>()},
        {"ring", run_ring<RingBug::kNone>},
        {"ring no full wait", run_ring<RingBug::kNoFullWait>},
        {"ring no empty wait", run_ring<RingBug::kNoEmptyWait>},
        {"ring no named barrier", run_ring<RingBug::kNoNamedBarrier>},
        {"ring bad mask", run_ring<RingBug::kBadMask>},
        {"grid barrier", [](const LaunchOptions& o) { run_grid_barrier<true>(o, 5); }},
        {"grid barrier too few blocks", [](const LaunchOptions& o) { run_grid_barrier<true>(o, 4); }},
        {"grid barrier relaxed", [](const LaunchOptions& o) { run_grid_barrier<false>(o, 5); }},
        {"last block", run_last_block<true>},
        {"last block no fence", run_last_block<false>},
        {"forward wait", [](const LaunchOptions& o) { run_forward_wait(o, 6); }},
        {"forward wait too few blocks", [](const LaunchOptions& o) { run_forward_wait(o, 1); }},
        {"bf16", [](const LaunchOptions& o) { run_bf16(o, 32); }},
        {"bf16 half a warp", [](const LaunchOptions& o) { run_bf16(o, 16); }},
        {"wgmma", run_wgmma<WgmmaBug::kNone>},
        {"wgmma no wait", run_wgmma<WgmmaBug::kNoWait>},
        {"wgmma short wait", run_wgmma<WgmmaBug::kShortWait>},
        {"wgmma no barrier", run_wgmma<WgmmaBug::kNoBarrier>},
        {"wgmma global", run_wgmma<WgmmaBug::kGlobal>},
        {"wgmma past end", run_wgmma<WgmmaBug::kPastEnd>},
        {"wgmma unaligned", run_wgmma<WgmmaBug::kUnaligned>},
        {"wgmma divergent", run_wgmma<WgmmaBug::kDivergent>},
        {"misuse none", run_misuse<Misuse::kNone>},
        {"misuse stale load", run_misuse<Misuse::kStaleLoad>},
        {"misuse write input", run_misuse<Misuse::kWriteInput>},
        {"misuse barrier short", run_misuse<Misuse::kBarrierShort>},
        {"misuse barrier sizes", run_misuse<Misuse::kBarrierSizes>},
        {"misuse no mbarrier", run_misuse<Misuse::kNoMbarrier>},
        {"misuse bulk size", run_misuse<Misuse::kBulkSize>},
        {"misuse bulk in flight", run_misuse<Misuse::kBulkInFlight>},
        {"misuse shuffle exited", run_misuse<Misuse::kShuffleExited>},
        {"misuse misaligned copy", run_misuse<Misuse::kMisalignedCopy>},
        {"count", [](const LaunchOptions& o) { run_count(o, 3, 4, 0); }},
        {"count past shared", [](const LaunchOptions& o) { run_count(o, 8, 0, 0); }},
        {"count far past shared", [](const LaunchOptions& o) { run_count(o, 4000, 0, 0); }},
        {"count shift", [](const LaunchOptions& o) { run_count(o, 3, 32, 0); }},
        {"count nothing",
         [](const LaunchOptions& o) {
             emu::launch(count_kernel, dim3(1), dim3(64), 0, o, nullptr, 100, nullptr, 0, 0);
         }},
        {"count index", [](const LaunchOptions& o) { run_count(o, 3, 0, 4); }},
    };
    return all;
}

void run(const std::string& name, const LaunchOptions& options) {
    const auto found = cases().find(name);
    if (found == cases().end()) throw std::invalid_argument("no case named " + name);
    found->second(options);
}

}  // namespace
}  // namespace emulator_tests

extern "C" int emu_selftest(const emu::LaunchOptions* options, const char* name) {
    return emu::guarded([&] { emulator_tests::run(name, *options); });
}

// selftest NAME SEED COMPLETION: 0 if the case passes, 1 with a message if not.
int main(int argc, char** argv) {
    if (argc != 4) return 2;
    emu::LaunchOptions options;
    options.seed = std::strtoull(argv[2], nullptr, 10);
    options.completion = static_cast<emu::Completion>(std::atoi(argv[3]));
    const int failed = emu_selftest(&options, argv[1]);
    if (failed != 0) std::fprintf(stderr, "%s\n", emu_last_error());
    return failed;
}
