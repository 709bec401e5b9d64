// The fused GEMM on the CPU: raw pointers, a workspace and a thread runner in; y out. No torch, no
// allocation.
#pragma once

#include "../common/params.h"
#include "parallel.h"

namespace rosaq::cpu {

// Bytes of scratch that fused_gemm needs for these arguments (64-byte aligned).
int64_t workspace_bytes(const FusedGemmArgs& args);

void fused_gemm(const FusedGemmArgs& args, void* workspace, const Parallel& parallel);

}  // namespace rosaq::cpu
