// What Python calls: the ops of csrc/launch, on the emulator instead of a stream.
#include "fused.h"

#include "emulator/c_api.h"
#include "kernels/dense.cuh"
#include "kernels/repack.cuh"

namespace emulator_tests {

template <>
EmulatedInstance find_instance<__half, 3>(bool, int, bool);
template <>
EmulatedInstance find_instance<__half, 4>(bool, int, bool);
template <>
EmulatedInstance find_instance<__nv_bfloat16, 3>(bool, int, bool);
template <>
EmulatedInstance find_instance<__nv_bfloat16, 4>(bool, int, bool);

namespace {

using namespace rosaq;
using namespace rosaq::cuda;
using emu::LaunchOptions;

EmulatedInstance find(const FusedGemmArgs& a, int compute_major) {
    const auto instance_of =
        a.x.dtype == DType::kFloat16
            ? (a.weight.bits == 3 ? find_instance<__half, 3> : find_instance<__half, 4>)
            : (a.weight.bits == 3 ? find_instance<__nv_bfloat16, 3> : find_instance<__nv_bfloat16, 4>);
    return instance_of(a.weight.symmetric, tokens_for(a.m), is_for_warpgroups(a, compute_major));
}

BlobShape blob_shape(const PackedWeight& w) {
    return {w.n,
            w.k,
            w.group_size,
            w.k / w.group_size,
            blob_layout(w.n, w.k, w.bits, w.group_size, w.symmetric, static_cast<uint32_t>(w.scale_dtype)),
            w.symmetric};
}

template <class... Params, class... Args>
void launch_units(void (*kernel)(Params...), int64_t threads, const LaunchOptions& options,
                  const Args&... args) {
    if (threads > 0) emu::launch(kernel, dim3(blocks_for(threads)), dim3(kUnitThreads), 0, options, args...);
}

// Scratch as the op allocates it: uninitialised, and guarded.
struct Workspace {
    emu::DeviceArray<uint8_t> bytes;
    explicit Workspace(int64_t size) : bytes(static_cast<size_t>(size), "workspace", emu::Access::kOut) {}
};

void run_fused(const FusedGemmArgs& a, const uint8_t* blob, int* counters, int resident, int compute_major,
               LaunchOptions options) {
    const BlobShape shape = blob_shape(a.weight);
    const EmulatedInstance instance = find(a, compute_major);
    const Problem problem = problem_of(a);
    GemmParams p = params_of(a, shape.layout, blob);
    const auto records = static_cast<int>(ceil_div<int64_t>(a.weight.n, kRecordRows));
    if (is_few_tokens(a) && (a.rotation_size == 0 || records <= resident)) {
        p.m = static_cast<int>(a.m), p.x = a.x.data, p.y = a.y;
        p.schedule.k_tiles = few_tokens_tiles(a);
        const Workspace workspace(a.rotation_size != 0 ? a.m * a.weight.k * 2 : 0);
        if (a.rotation_size != 0) {
            p.t = workspace.bytes.data(), p.counters = counters;
            options.resident_blocks = records;  // a cooperative launch
        }
        // As on a device of so many multiprocessors: few of them, and blocks have half of the warps.
        instance.launch_few(p, few_tokens_warps(a.weight.n, resident, 1, kFewMaxWarps), options);
        return;
    }
    p.schedule = make_schedule(problem, instance.shape, resident);
    if (needs_all_blocks(p)) options.resident_blocks = p.schedule.grid;  // a cooperative launch
    const Scratch scratch = scratch_of(problem, instance.shape, p.schedule);
    const Workspace workspace(scratch.total);
    p.t = problem.has_rotation ? workspace.bytes.data() + scratch.t : nullptr;
    p.s_parts = reinterpret_cast<float*>(workspace.bytes.data() + scratch.s_parts);
    p.partials = reinterpret_cast<float*>(workspace.bytes.data() + scratch.partials);
    p.counters = counters;
    for (int64_t first = 0; first < a.m; first += kMaxTokens) {
        p.m = static_cast<int>(std::min<int64_t>(a.m - first, kMaxTokens));
        p.x = static_cast<const uint16_t*>(a.x.data) + first * a.weight.k;
        p.y = static_cast<uint16_t*>(a.y) + first * a.weight.n;
        instance.launch(p, options);
    }
}

template <class T>
void run_dequantize(const PackedWeight& w, const uint8_t* blob, T* weight, const LaunchOptions& options) {
    const BlobShape shape = blob_shape(w);
    const auto kernel = w.bits == 3 ? dequantize_kernel<T, 3> : dequantize_kernel<T, 4>;
    launch_units(kernel, record_threads(shape.layout), options, blob, shape,
                 w.scale_dtype == DType::kBFloat16, weight);
}

}  // namespace
}  // namespace emulator_tests

using namespace emulator_tests;

extern "C" {

// The structs of csrc/common/params.h come from Python as ctypes; their sizes are compared there.
int64_t fused_sizeof_args() {
    return sizeof(FusedGemmArgs);
}

int64_t fused_blob_bytes(const PackedWeight* w) {
    return blob_shape(*w).layout.total_bytes;
}

int fused_prepack(const LaunchOptions* options, const PackedWeight* w, void* qweight, void* scales,
                  void* zeros, void* blob) {
    return emu::guarded([&] {
        const BlobShape shape = blob_shape(*w);
        const DiskWeight disk{static_cast<uint32_t*>(qweight), static_cast<uint16_t*>(scales),
                              static_cast<uint8_t*>(zeros)};
        auto* out = static_cast<uint8_t*>(blob);
        launch_units(w->bits == 3 ? prepack_codes_kernel<3> : prepack_codes_kernel<4>,
                     record_threads(shape.layout), *options, disk, shape, out);
        launch_units(repack_scales_kernel<true>, shape.layout.slabs * shape.layout.groups * kSlabRows,
                     *options, disk, shape, out);
    });
}

int fused_unprepack(const LaunchOptions* options, const PackedWeight* w, void* blob, void* qweight,
                    void* scales, void* zeros) {
    return emu::guarded([&] {
        const BlobShape shape = blob_shape(*w);
        const DiskWeight disk{static_cast<uint32_t*>(qweight), static_cast<uint16_t*>(scales),
                              static_cast<uint8_t*>(zeros)};
        auto* in = static_cast<uint8_t*>(blob);
        launch_units(w->bits == 3 ? unprepack_codes_kernel<3> : unprepack_codes_kernel<4>,
                     shape.n * (shape.k / 32), *options, in, shape, disk);
        launch_units(repack_scales_kernel<false>, shape.layout.slabs * shape.layout.groups * kSlabRows,
                     *options, disk, shape, in);
    });
}

int fused_dequantize(const LaunchOptions* options, const PackedWeight* w, const void* blob, int64_t is_bf16,
                     void* weight) {
    return emu::guarded([&] {
        const auto* in = static_cast<const uint8_t*>(blob);
        if (is_bf16 != 0)
            run_dequantize(*w, in, static_cast<__nv_bfloat16*>(weight), *options);
        else
            run_dequantize(*w, in, static_cast<__half*>(weight), *options);
    });
}

int fused_codes(const LaunchOptions* options, void* codes, void* qweight, int64_t blocks, int64_t bits,
                int64_t pack) {
    return emu::guarded([&] {
        const auto kernel = bits == 3
                                ? (pack != 0 ? disk_codes_kernel<3, true> : disk_codes_kernel<3, false>)
                                : (pack != 0 ? disk_codes_kernel<4, true> : disk_codes_kernel<4, false>);
        launch_units(kernel, blocks, *options, static_cast<uint8_t*>(codes), static_cast<uint32_t*>(qweight),
                     blocks);
    });
}

// The device is said to hold so many blocks, and to be of compute capability compute_major.
int fused_gemm(const LaunchOptions* options, const FusedGemmArgs* args, const void* blob, void* counters,
               int64_t resident, int64_t compute_major) {
    return emu::guarded([&] {
        run_fused(*args, static_cast<const uint8_t*>(blob), static_cast<int*>(counters),
                  static_cast<int>(resident), static_cast<int>(compute_major), *options);
    });
}

int fused_add_salient(const LaunchOptions* options, const FusedGemmArgs* a, void* weight) {
    return emu::guarded([&] {
        const SalientColumns salient{a->salient_weight, a->salient_index, a->weight.n, a->r, a->weight.k};
        const dim3 grid(blocks_for(salient.r),
                        static_cast<unsigned>(ceil_div<int64_t>(salient.n, kSalientRows)));
        if (a->x.dtype == DType::kFloat16)
            emu::launch(add_salient_columns_kernel<__half>, grid, dim3(kUnitThreads), 0, *options, salient,
                        static_cast<__half*>(weight));
        else
            emu::launch(add_salient_columns_kernel<__nv_bfloat16>, grid, dim3(kUnitThreads), 0, *options,
                        salient, static_cast<__nv_bfloat16*>(weight));
    });
}

int fused_add_rows(const LaunchOptions* options, const FusedGemmArgs* a, const void* other) {
    return emu::guarded([&] {
        const int64_t m = a->m, n = a->weight.n;
        const dim3 grid(blocks_for(n), 2);
        if (a->x.dtype == DType::kFloat16)
            emu::launch(add_rows_kernel<__half>, grid, dim3(kUnitThreads), 0, *options,
                        static_cast<__half*>(a->y), static_cast<const __half*>(other), a->bias, m, n);
        else
            emu::launch(add_rows_kernel<__nv_bfloat16>, grid, dim3(kUnitThreads), 0, *options,
                        static_cast<__nv_bfloat16*>(a->y), static_cast<const __nv_bfloat16*>(other), a->bias,
                        m, n);
    });
}
}
