// The CUDA kernels behind raw pointers and a stream. No torch, no allocation, no synchronisation; errors are
// returned.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params_rounding.h"
#include "../kernels/blob.h"
#include "plan.h"

namespace rosaq::cuda {

// One compiled kernel: launches it, and tells how many of a launch's blocks an SM of the current device
// holds.
struct Instance {
    InstanceShape shape;
    cudaError_t (*launch)(const GemmParams&, cudaStream_t);
    cudaError_t (*blocks_per_sm)(int* blocks);
    // Of the instances for 8 tokens (else null): the kernel for a few tokens with so many warps a block, how
    // many of its blocks an SM holds where they rotate, and the shared memory of each warp. Of p's schedule
    // it reads k_tiles only; without a rotation it needs neither t nor counters.
    cudaError_t (*launch_few)(const GemmParams&, int warps, cudaStream_t) = nullptr;
    cudaError_t (*few_blocks_per_sm)(int warps, int* blocks) = nullptr;
    int few_warp_bytes = 0;
};

// The instance for up to `tokens` tokens (8, 16, 32, 64), or null.
const Instance* find_instance(DType dtype, int bits, bool symmetric, int tokens);

// The one of warpgroup_gemm.cuh for up to `tokens` tokens (32, 64), or null: it runs on compute
// capability 9.0, if this library was built for sm_90a.
const Instance* find_warpgroup_instance(DType dtype, int bits, int tokens);

// p.schedule and all pointers are filled in; m <= tokens of the instance.
inline cudaError_t fused_gemm(const Instance& instance, const GemmParams& p, cudaStream_t stream) {
    return p.m == 0 || p.n == 0 ? cudaSuccess : instance.launch(p, stream);
}

cudaError_t prepack(const DiskWeight& disk, const BlobShape& shape, int bits, uint8_t* blob,
                    cudaStream_t stream);
cudaError_t unprepack(const uint8_t* blob, const BlobShape& shape, int bits, const DiskWeight& disk,
                      cudaStream_t stream);
// weight [n, k] float16 or bfloat16
cudaError_t dequantize(const uint8_t* blob, const BlobShape& shape, int bits, bool scale_is_bf16, DType dtype,
                       void* weight, cudaStream_t stream);
// weight [n, k] += the salient columns; y [m, n] += other (may be null) + bias (data may be null); dtype as
// above.
cudaError_t add_salient_columns(const SalientColumns& salient, DType dtype, void* weight,
                                cudaStream_t stream);
cudaError_t add_rows(void* y, const void* other, const Buffer& bias, DType dtype, int64_t m, int64_t n,
                     cudaStream_t stream);
// codes uint8 [n, k] to qweight or back, blocks = n * k / 32
cudaError_t pack_codes(uint8_t* codes, uint32_t* qweight, int64_t blocks, int bits, cudaStream_t stream);
cudaError_t unpack_codes(uint8_t* codes, uint32_t* qweight, int64_t blocks, int bits, cudaStream_t stream);
cudaError_t round_panel(const RoundingArgs& args, cudaStream_t stream);
cudaError_t sweep_panel(const RoundingArgs& args, cudaStream_t stream);

}  // namespace rosaq::cuda
