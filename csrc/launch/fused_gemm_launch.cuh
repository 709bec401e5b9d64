// One instance of the fused kernel: what the generated files in instances/ contain.
#pragma once

#include <algorithm>
#include <atomic>

#include "../kernels/few_tokens.cuh"
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
cudaError_t allow_shared_memory() {
    static std::atomic<uint64_t> done{0};
    return allow_shared_memory(reinterpret_cast<const void*>(fused_gemm_kernel<Tile>), Tile::kMaxSmemBytes,
                               done);
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

template <class Tile>
cudaError_t launch_fused_gemm(const GemmParams& p, cudaStream_t stream) {
    const cudaError_t error = allow_shared_memory<Tile>();
    if (error != cudaSuccess) return error;
    const Schedule& s = p.schedule;
    const dim3 grid(static_cast<unsigned>(s.list_blocks), static_cast<unsigned>(s.lists)),
        block(Tile::kThreads);
    const size_t smem = static_cast<size_t>(smem_bytes(p, shape_of<Tile>()));
    if (needs_all_blocks(p)) {
        // Also beside other grids of that kind, which only a cooperative launch promises.
        void* args[] = {const_cast<GemmParams*>(&p)};
        return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(fused_gemm_kernel<Tile>), grid,
                                           block, args, smem, stream);
    }
    fused_gemm_kernel<Tile><<<grid, block, smem, stream>>>(p);
    return cudaGetLastError();
}

template <class Tile>
cudaError_t blocks_per_sm(const GemmParams& p, int* blocks) {
    const cudaError_t error = allow_shared_memory<Tile>();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks, fused_gemm_kernel<Tile>, Tile::kThreads,
        static_cast<size_t>(smem_bytes(p, shape_of<Tile>())));
}

}  // namespace rosaq::cuda
