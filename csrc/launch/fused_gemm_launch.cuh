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

// For blocks that wait for each other, also beside other grids of that kind, which only a cooperative launch
// promises.
inline cudaError_t launch_cooperative(void (*kernel)(GemmParams), const GemmParams& p, dim3 grid, dim3 block,
                                      size_t smem_bytes, cudaStream_t stream) {
    void* args[] = {const_cast<GemmParams*>(&p)};
    return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, args, smem_bytes,
                                       stream);
}

template <class Tile>
constexpr int kFewWarpBytes = kFewStages * Tile::kWarpBytes;

template <class Tile, bool kRotates>
cudaError_t allow_few_tokens() {
    static std::atomic<uint64_t> done{0};
    return allow_shared_memory(reinterpret_cast<const void*>(few_tokens_kernel<Tile, kRotates>),
                               kFewMaxWarps * kFewWarpBytes<Tile>, done);
}

template <class Tile>
cudaError_t launch_few_tokens(const GemmParams& p, int warps, cudaStream_t stream) {
    const bool rotates = p.rotation_size != 0;
    const cudaError_t error = rotates ? allow_few_tokens<Tile, true>() : allow_few_tokens<Tile, false>();
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kRecordRows))),
        block(static_cast<unsigned>(warps) * kLanes);
    const auto bytes = static_cast<size_t>(warps * kFewWarpBytes<Tile>);
    if (rotates) return launch_cooperative(few_tokens_kernel<Tile, true>, p, grid, block, bytes, stream);
    few_tokens_kernel<Tile, false><<<grid, block, bytes, stream>>>(p);
    return cudaGetLastError();
}

template <class Tile>
cudaError_t few_blocks_per_sm(int warps, int* blocks) {
    const cudaError_t error = allow_few_tokens<Tile, true>();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, few_tokens_kernel<Tile, true>,
                                                         warps * kLanes,
                                                         static_cast<size_t>(warps * kFewWarpBytes<Tile>));
}

// A kernel for one schedule of blocks: fused_gemm_kernel or warpgroup_gemm_kernel of a Tile.
template <class Tile, void (*kKernel)(GemmParams)>
cudaError_t allow_shared_memory() {
    static std::atomic<uint64_t> done{0};
    return allow_shared_memory(reinterpret_cast<const void*>(kKernel), Tile::kSmemBytes, done);
}

template <class Tile, void (*kKernel)(GemmParams)>
cudaError_t launch_scheduled(const GemmParams& p, cudaStream_t stream) {
    const cudaError_t error = allow_shared_memory<Tile, kKernel>();
    if (error != cudaSuccess) return error;
    const Schedule& s = p.schedule;
    const dim3 grid(static_cast<unsigned>(s.list_blocks), static_cast<unsigned>(s.lists)),
        block(Tile::kThreads);
    if (needs_all_blocks(p)) return launch_cooperative(kKernel, p, grid, block, Tile::kSmemBytes, stream);
    kKernel<<<grid, block, Tile::kSmemBytes, stream>>>(p);
    return cudaGetLastError();
}

template <class Tile, void (*kKernel)(GemmParams)>
cudaError_t blocks_per_sm(int* blocks) {
    const cudaError_t error = allow_shared_memory<Tile, kKernel>();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kKernel, Tile::kThreads, Tile::kSmemBytes);
}

// What the files in instances/ define.
template <class Tile>
constexpr Instance fused_gemm_instance() {
    constexpr auto kKernel = fused_gemm_kernel<Tile>;
    return {shape_of<Tile>(), launch_scheduled<Tile, kKernel>, blocks_per_sm<Tile, kKernel>};
}

template <class Tile>
constexpr Instance few_tokens_instance() {
    Instance made = fused_gemm_instance<Tile>();
    made.launch_few = launch_few_tokens<Tile>;
    made.few_blocks_per_sm = few_blocks_per_sm<Tile>;
    made.few_warp_bytes = kFewWarpBytes<Tile>;
    return made;
}

template <class Tile>
constexpr Instance warpgroup_instance() {
#ifdef ROSAQ_BUILT_FOR_SM90A
    constexpr auto kKernel = warpgroup_gemm_kernel<Tile>;
    return {shape_of<Tile>(), launch_scheduled<Tile, kKernel>, blocks_per_sm<Tile, kKernel>};
#else
    return {shape_of<Tile>(), nullptr, nullptr};
#endif
}

}  // namespace rosaq::cuda
