// A weight packed for the CUDA kernels, as the host sees it: its size says what it is, its bytes stay on the
// device.
#pragma once

#include "../kernels/blob.h"
#include "checks.h"

namespace rosaq::bind {

struct CudaWeight {
    PackedWeight packed;  // n, k, group size, bits, scales' dtype; no panels
    cuda::BlobLayout layout{};
    const uint8_t* blob = nullptr;

    cuda::BlobShape shape() const {
        return {packed.n, packed.k,        packed.group_size, packed.k / packed.group_size,
                layout,   packed.symmetric};
    }
};

// The weight of these numbers; raises if `packed` is not a CUDA blob of just that size.
CudaWeight parse_cuda_blob(const char* op, const Tensor& packed, int64_t n, int64_t k, int64_t bits,
                           int64_t group_size, bool symmetric);

// The same from the header, which has to be fetched from the device: it waits.
CudaWeight read_cuda_blob(const char* op, const Tensor& packed);

// Raises where the kernels' 32-bit counters would not do.
inline void check_cuda_size(const char* op, int64_t n, int64_t k) {
    ROSAQ_CHECK(n < int64_t{1} << 30 && k < int64_t{1} << 30 && n * k < int64_t{1} << 36, op,
                ": packed: got n ", n, ", k ", k, ", need less than 2^36 weights on CUDA");
}

// The header that prepack writes.
PackedHeader cuda_header(const CudaWeight& w);

}  // namespace rosaq::bind
