// Launches of kernels/repack.cuh.
#include "../kernels/repack.cuh"
#include "launch.h"

namespace rosaq::cuda {
namespace {

unsigned blocks_for(int64_t threads) {
    return static_cast<unsigned>(ceil_div<int64_t>(threads, kRepackThreads));
}

int64_t record_threads(const BlobLayout& l) {
    return l.slabs * l.k_blocks * kSlabRecords * kLanes;
}

template <class T, int kBits>
cudaError_t dequantize_as(const uint8_t* blob, const BlobShape& shape, bool scale_is_bf16, void* weight,
                          cudaStream_t stream) {
    dequantize_kernel<T, kBits><<<blocks_for(record_threads(shape.layout)), kRepackThreads, 0, stream>>>(
        blob, shape, scale_is_bf16, static_cast<T*>(weight));
    return cudaGetLastError();
}

}  // namespace

cudaError_t prepack(const DiskWeight& disk, const BlobShape& shape, int bits, uint8_t* blob,
                    cudaStream_t stream) {
    const BlobLayout& l = shape.layout;
    (bits == 3 ? prepack_codes_kernel<3>
               : prepack_codes_kernel<4>)<<<blocks_for(record_threads(l)), kRepackThreads, 0, stream>>>(
        disk, shape, blob);
    repack_scales_kernel<true>
        <<<blocks_for(l.slabs * l.groups * kSlabRows), kRepackThreads, 0, stream>>>(disk, shape, blob);
    return cudaGetLastError();
}

cudaError_t unprepack(const uint8_t* blob, const BlobShape& shape, int bits, const DiskWeight& disk,
                      cudaStream_t stream) {
    const BlobLayout& l = shape.layout;
    (bits == 3
         ? unprepack_codes_kernel<3>
         : unprepack_codes_kernel<4>)<<<blocks_for(shape.n * (shape.k / 32)), kRepackThreads, 0, stream>>>(
        blob, shape, disk);
    repack_scales_kernel<false><<<blocks_for(l.slabs * l.groups * kSlabRows), kRepackThreads, 0, stream>>>(
        disk, shape, const_cast<uint8_t*>(blob));
    return cudaGetLastError();
}

cudaError_t dequantize(const uint8_t* blob, const BlobShape& shape, int bits, bool scale_is_bf16, DType dtype,
                       void* weight, cudaStream_t stream) {
    const auto run = dtype == DType::kFloat16
                         ? (bits == 3 ? dequantize_as<__half, 3> : dequantize_as<__half, 4>)
                         : (bits == 3 ? dequantize_as<__nv_bfloat16, 3> : dequantize_as<__nv_bfloat16, 4>);
    return run(blob, shape, scale_is_bf16, weight, stream);
}

cudaError_t pack_codes(uint8_t* codes, uint32_t* qweight, int64_t blocks, int bits, cudaStream_t stream) {
    if (blocks == 0) return cudaSuccess;
    (bits == 3 ? disk_codes_kernel<3, true>
               : disk_codes_kernel<4, true>)<<<blocks_for(blocks), kRepackThreads, 0, stream>>>(
        codes, qweight, blocks);
    return cudaGetLastError();
}

cudaError_t unpack_codes(uint8_t* codes, uint32_t* qweight, int64_t blocks, int bits, cudaStream_t stream) {
    if (blocks == 0) return cudaSuccess;
    (bits == 3 ? disk_codes_kernel<3, false>
               : disk_codes_kernel<4, false>)<<<blocks_for(blocks), kRepackThreads, 0, stream>>>(
        codes, qweight, blocks);
    return cudaGetLastError();
}

}  // namespace rosaq::cuda
