// Launches of kernels/dense.cuh.
#include "../kernels/dense.cuh"
#include "launch.h"

namespace rosaq::cuda {
namespace {

template <class T, int kBits>
cudaError_t dequantize_as(const uint8_t* blob, const BlobShape& shape, bool scale_is_bf16, void* weight,
                          cudaStream_t stream) {
    dequantize_kernel<T, kBits><<<blocks_for(record_threads(shape.layout)), kUnitThreads, 0, stream>>>(
        blob, shape, scale_is_bf16, static_cast<T*>(weight));
    return cudaGetLastError();
}

}  // namespace

cudaError_t dequantize(const uint8_t* blob, const BlobShape& shape, int bits, bool scale_is_bf16, DType dtype,
                       void* weight, cudaStream_t stream) {
    const auto run = dtype == DType::kFloat16
                         ? (bits == 3 ? dequantize_as<__half, 3> : dequantize_as<__half, 4>)
                         : (bits == 3 ? dequantize_as<__nv_bfloat16, 3> : dequantize_as<__nv_bfloat16, 4>);
    return run(blob, shape, scale_is_bf16, weight, stream);
}

cudaError_t add_salient_columns(const SalientColumns& salient, DType dtype, void* weight,
                                cudaStream_t stream) {
    const dim3 blocks(blocks_for(salient.r),
                      static_cast<unsigned>(ceil_div<int64_t>(salient.n, kSalientRows)));
    if (dtype == DType::kFloat16)
        add_salient_columns_kernel<<<blocks, kUnitThreads, 0, stream>>>(salient,
                                                                        static_cast<__half*>(weight));
    else
        add_salient_columns_kernel<<<blocks, kUnitThreads, 0, stream>>>(salient,
                                                                        static_cast<__nv_bfloat16*>(weight));
    return cudaGetLastError();
}

template <class T>
static void launch_add_rows(void* y, const void* other, const Buffer& bias, int64_t m, int64_t n,
                            cudaStream_t stream) {
    const dim3 grid(blocks_for(n), static_cast<unsigned>(m < 65535 ? m : 65535));
    add_rows_kernel<<<grid, kUnitThreads, 0, stream>>>(static_cast<T*>(y), static_cast<const T*>(other), bias,
                                                       m, n);
}

cudaError_t add_rows(void* y, const void* other, const Buffer& bias, DType dtype, int64_t m, int64_t n,
                     cudaStream_t stream) {
    (dtype == DType::kFloat16 ? launch_add_rows<__half> : launch_add_rows<__nv_bfloat16>)(y, other, bias, m,
                                                                                          n, stream);
    return cudaGetLastError();
}

}  // namespace rosaq::cuda
