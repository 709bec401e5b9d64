// Many tokens on CUDA: dequantise once, then the framework's matmul, which is bound by arithmetic, not by
// bytes of W.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_weight.h"
#include "fused_args.h"

namespace rosaq::bind {

// Fills y [..., n] of a checked call with at least one token. W [n, k] in x's dtype is allocated and released
// again.
void many_tokens(const FusedGemmCall& call, const CudaWeight& weight, const Tensor& y, cudaStream_t stream);

}  // namespace rosaq::bind
