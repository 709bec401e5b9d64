// What the repacking kernels work on: plain structs, host and device.
#pragma once

#include "../common/params_cuda.h"

namespace rosaq::cuda {

// The tensors of one weight in the disk layout; zeros is null if symmetric.
struct DiskWeight {
    uint32_t* qweight;  // [n, k * bits / 32]
    uint16_t* scales;   // [n, groups of k]
    uint8_t* zeros;
};

// What a blob holds. `groups` counts those of a row without its padding.
struct BlobShape {
    int64_t n, k, group_size, groups;
    BlobLayout layout;
    bool symmetric;
};

// Columns of 16-bit weights [n, r] that belong to channels index[j] of [0, k).
struct SalientColumns {
    Buffer weight;
    const int32_t* index;
    int64_t n, r, k;
};

}  // namespace rosaq::cuda
