// NVIDIA's own types, conversions and 16-bit arithmetic; these headers work on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#undef __noinline__  // theirs would break __attribute__((__noinline__)) in the standard library
