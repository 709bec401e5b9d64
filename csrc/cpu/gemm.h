// The fused GEMM on the CPU: raw pointers, a workspace and a thread runner in; y out. No torch, no
// allocation.
#pragma once

#include "../common/params.h"
#include "isa.h"
#include "parallel.h"

namespace rosaq::cpu {

// Weights that one call may multiply x with.
constexpr int kMaxWeights = 8;

// Bytes of scratch that fused_gemm needs for these arguments (64-byte aligned); those of any of its weights.
// precision and kernels are the caller's, read once: another thread may switch what is active at any time.
int64_t workspace_bytes(const FusedGemmArgs& args, Precision precision, const KernelTable& kernels);

// The products of one x with `count` weights. They differ in n, scale_dtype, panels, salient_weight, bias and
// y alone: what is made of x is made once, and all panels are one parallel loop.
void fused_gemm(const FusedGemmArgs* args, int count, Precision precision, const KernelTable& kernels,
                void* workspace, const Parallel& parallel);

}  // namespace rosaq::cpu
