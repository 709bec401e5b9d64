// Plain structs that travel between csrc/torch and the kernels. Strides are in elements, sizes in elements
// unless named _bytes. m tokens, n out-features, k in-features, r salient directions (DESIGN.md).
#pragma once

#include <cstdint>

#include "layout.h"

namespace rosaq {

enum class DType : uint32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

ROSAQ_INLINE int64_t dtype_bytes(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

// A read-only buffer with its element type; null where the optional tensor is absent.
struct Buffer {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
};

// A prepacked weight [n, k].
struct PackedWeight {
    const uint8_t* panels = nullptr;  // first panel, after the header
    int64_t n = 0, k = 0, group_size = 0;
    int bits = 0;
    bool symmetric = true;
    DType scale_dtype = DType::kFloat16;
    PanelLayout layout{};
};

// y[m,n] = t W^T + s C^T + bias,  t = x blockdiag(rotation),  s = t[:, salient_index] or t salient_basis.
struct FusedGemmArgs {
    int64_t m = 0;
    Buffer x;  // [m, k], contiguous
    PackedWeight weight;
    int64_t r = 0;
    Buffer salient_weight;                   // [n, r]
    const int32_t* salient_index = nullptr;  // [r]
    Buffer salient_basis;                    // [k, r]
    int64_t rotation_size = 0;               // b, 0 for none
    int64_t rotation_blocks = 0;             // B, 1 (shared) or k / b
    Buffer rotation;                         // [B, b, b]
    Buffer bias;                             // [n]
    void* y = nullptr;                       // [m, n], contiguous, dtype of x
};

}  // namespace rosaq
