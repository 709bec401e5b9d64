// The fused kernel under the emulator: the instances that nvcc compiles, spread over a few files.
#pragma once

#include "emulator/emulator.h"
#include "kernels/few_tokens.cuh"
#include "kernels/warpgroup_gemm.cuh"
#include "launch/shape_of.cuh"

namespace emulator_tests {

// What launch.h calls an Instance.
struct EmulatedInstance {
    rosaq::cuda::InstanceShape shape;
    void (*launch)(const rosaq::cuda::GemmParams&, const emu::LaunchOptions&);
    void (*launch_few)(const rosaq::cuda::GemmParams&, int warps, const emu::LaunchOptions&) = nullptr;
};

template <class Tile, void (*kKernel)(rosaq::cuda::GemmParams) = rosaq::cuda::fused_gemm_kernel<Tile>>
EmulatedInstance instance() {
    using rosaq::cuda::shape_of;
    return {shape_of<Tile>(), [](const rosaq::cuda::GemmParams& p, const emu::LaunchOptions& options) {
                emu::launch(kKernel, dim3(p.schedule.list_blocks, p.schedule.lists), dim3(Tile::kThreads),
                            static_cast<size_t>(Tile::kSmemBytes), options, p);
            }};
}

// With the kernel for a few tokens.
template <class Tile>
EmulatedInstance instance_with_few() {
    EmulatedInstance made = instance<Tile>();
    made.launch_few = [](const rosaq::cuda::GemmParams& p, int warps, const emu::LaunchOptions& options) {
        using namespace rosaq::cuda;
        const auto kernel =
            p.rotation_size != 0 ? few_tokens_kernel<Tile, true> : few_tokens_kernel<Tile, false>;
        emu::launch(kernel, dim3(rosaq::ceil_div(p.n, kRecordRows)), dim3(warps * kLanes),
                    static_cast<size_t>(warps) * kFewStages * Tile::kWarpBytes, options, p);
    };
    return made;
}

// The instance of a dtype and width for up to `tokens` tokens, with warpgroups if asked.
template <class T, int kBits>
EmulatedInstance find_instance(bool symmetric, int tokens, bool warpgroups);

template <class T, int kBits>
EmulatedInstance find_instance_here(bool symmetric, int tokens, bool warpgroups) {
    using rosaq::cuda::Tile;
    if (warpgroups) {
        using Narrow = rosaq::cuda::WarpgroupTile<T, kBits, 32>;
        using Wide = rosaq::cuda::WarpgroupTile<T, kBits, 64>;
        return tokens == 32 ? instance<Narrow, rosaq::cuda::warpgroup_gemm_kernel<Narrow>>()
                            : instance<Wide, rosaq::cuda::warpgroup_gemm_kernel<Wide>>();
    }
    if (tokens == 8)
        return symmetric ? instance_with_few<Tile<T, kBits, true, 1>>()
                         : instance_with_few<Tile<T, kBits, false, 1>>();
    if (tokens == 16)
        return symmetric ? instance<Tile<T, kBits, true, 2>>() : instance<Tile<T, kBits, false, 2>>();
    return tokens == 32 ? instance<Tile<T, kBits, false, 4>>() : instance<Tile<T, kBits, false, 8>>();
}

}  // namespace emulator_tests
