// What kernels need to compile unchanged with nvcc and, with ROSAQ_EMULATE, with g++ against tests/emulator.
#pragma once

#ifdef ROSAQ_EMULATE
#include "emulator/cuda_vocabulary.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Shared memory is declared by macro: the emulator has to know each block's variables.
//   ROSAQ_DYN_SMEM(smem);              unsigned char smem[], 128-byte aligned, sized by the launch
//   ROSAQ_SHARED(s_sum, float[32]);    a static variable of any type
#define ROSAQ_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#define ROSAQ_SHARED(name, ...)      \
    using name##_type = __VA_ARGS__; \
    __shared__ name##_type name
#endif

#define ROSAQ_DEVICE __device__ __forceinline__
