// The launches of one instance: what the generated files in instances/ contain.
#pragma once

#include <algorithm>
#include <atomic>

#include "../kernels/few_tokens.cuh"
#include "../kernels/warpgroup_gemm.cuh"
#include "launch.h"
#include "shape_of.cuh"

namespace rosaq::cuda {

// More dynamic shared memory than 48 KB has to be asked for: as much as any launch of the kernel may want and
// the device has, once for every device (and every `done`, one a kernel).
inline cudaError_t allow_shared_memory(const void* kernel, int bytes, std::atomic<uint64_t>& done) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device < 64 && (done.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
    int most = 0;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::min(bytes, most));
    if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
    return error;
}

template <class Tile>
constexpr int kFewWarpBytes = kFewStages * Tile::kWarpBytes;

template <class Tile>
cudaError_t launch_few_tokens(const GemmParams& p, int warps, cudaStream_t stream) {
    static std::atomic<uint64_t> done{0};
    const int bytes = warps * kFewWarpBytes<Tile>;
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(few_tokens_kernel<Tile>),
                                                  kFewMaxWarps * kFewWarpBytes<Tile>, done);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(ceil_div(p.n, kRecordRows));
    few_tokens_kernel<Tile>
        <<<blocks, static_cast<unsigned>(warps) * kLanes, static_cast<size_t>(bytes), stream>>>(p);
    return cudaGetLastError();
}

// A kernel for one schedule of blocks: fused_gemm_kernel or warpgroup_gemm_kernel of a Tile.
template <class Tile, void (*kKernel)(GemmParams)>
cudaError_t allow_shared_memory() {
    static std::atomic<uint64_t> done{0};
    return allow_shared_memory(reinterpret_cast<const void*>(kKernel), Tile::kMaxSmemBytes, done);
}

template <class Tile, void (*kKernel)(GemmParams)>
cudaError_t launch_scheduled(const GemmParams& p, cudaStream_t stream) {
    const cudaError_t error = allow_shared_memory<Tile, kKernel>();
    if (error != cudaSuccess) return error;
    const Schedule& s = p.schedule;
    const dim3 grid(static_cast<unsigned>(s.list_blocks), static_cast<unsigned>(s.lists)),
        block(Tile::kThreads);
    const size_t smem = static_cast<size_t>(smem_bytes(p, shape_of<Tile>()));
    if (needs_all_blocks(p)) {
        // Also beside other grids of that kind, which only a cooperative launch promises.
        void* args[] = {const_cast<GemmParams*>(&p)};
        return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kKernel), grid, block, args, smem,
                                           stream);
    }
    kKernel<<<grid, block, smem, stream>>>(p);
    return cudaGetLastError();
}

template <class Tile, void (*kKernel)(GemmParams)>
cudaError_t blocks_per_sm(const GemmParams& p, int* blocks) {
    const cudaError_t error = allow_shared_memory<Tile, kKernel>();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks, kKernel, Tile::kThreads, static_cast<size_t>(smem_bytes(p, shape_of<Tile>())));
}

// What the files in instances/ define.
template <class Tile>
constexpr Instance fused_gemm_instance() {
    constexpr auto kKernel = fused_gemm_kernel<Tile>;
    return {shape_of<Tile>(), launch_scheduled<Tile, kKernel>, blocks_per_sm<Tile, kKernel>, nullptr, 0};
}

template <class Tile>
constexpr Instance few_tokens_instance() {
    Instance made = fused_gemm_instance<Tile>();
    made.launch_few = launch_few_tokens<Tile>;
    made.few_warp_bytes = kFewWarpBytes<Tile>;
    return made;
}

template <class Tile>
constexpr Instance warpgroup_instance() {
#ifdef ROSAQ_BUILT_FOR_SM90A
    constexpr auto kKernel = warpgroup_gemm_kernel<Tile>;
    return {shape_of<Tile>(), launch_scheduled<Tile, kKernel>, blocks_per_sm<Tile, kKernel>, nullptr, 0};
#else
    return {shape_of<Tile>(), nullptr, nullptr, nullptr, 0};
#endif
}

}  // namespace rosaq::cuda
