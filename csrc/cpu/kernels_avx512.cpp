#include "kernel_table.h"
#include "simd_avx512.h"

namespace rosaq::cpu {
const KernelTable kAvx512Kernels = kernel_table<SimdAvx512>("avx512", {1 << 30, 12, 6, 3});
}
