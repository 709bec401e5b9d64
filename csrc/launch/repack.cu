// Launches of kernels/repack.cuh.
#include "../kernels/repack.cuh"
#include "launch.h"

namespace rosaq::cuda {

cudaError_t prepack(const DiskWeight& disk, const BlobShape& shape, int bits, uint8_t* blob,
                    cudaStream_t stream) {
    const BlobLayout& l = shape.layout;
    (bits == 3 ? prepack_codes_kernel<3>
               : prepack_codes_kernel<4>)<<<blocks_for(record_threads(l)), kUnitThreads, 0, stream>>>(
        disk, shape, blob);
    repack_scales_kernel<true>
        <<<blocks_for(l.slabs * l.groups * kSlabRows), kUnitThreads, 0, stream>>>(disk, shape, blob);
    return cudaGetLastError();
}

cudaError_t unprepack(const uint8_t* blob, const BlobShape& shape, int bits, const DiskWeight& disk,
                      cudaStream_t stream) {
    const BlobLayout& l = shape.layout;
    (bits == 3
         ? unprepack_codes_kernel<3>
         : unprepack_codes_kernel<4>)<<<blocks_for(shape.n * (shape.k / 32)), kUnitThreads, 0, stream>>>(
        blob, shape, disk);
    repack_scales_kernel<false><<<blocks_for(l.slabs * l.groups * kSlabRows), kUnitThreads, 0, stream>>>(
        disk, shape, const_cast<uint8_t*>(blob));
    return cudaGetLastError();
}

cudaError_t pack_codes(uint8_t* codes, uint32_t* qweight, int64_t blocks, int bits, cudaStream_t stream) {
    if (blocks == 0) return cudaSuccess;
    (bits == 3 ? disk_codes_kernel<3, true>
               : disk_codes_kernel<4, true>)<<<blocks_for(blocks), kUnitThreads, 0, stream>>>(codes, qweight,
                                                                                              blocks);
    return cudaGetLastError();
}

cudaError_t unpack_codes(uint8_t* codes, uint32_t* qweight, int64_t blocks, int bits, cudaStream_t stream) {
    if (blocks == 0) return cudaSuccess;
    (bits == 3 ? disk_codes_kernel<3, false>
               : disk_codes_kernel<4, false>)<<<blocks_for(blocks), kUnitThreads, 0, stream>>>(codes, qweight,
                                                                                               blocks);
    return cudaGetLastError();
}

}  // namespace rosaq::cuda
