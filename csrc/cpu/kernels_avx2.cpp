#include "kernel_table.h"
#include "simd_avx2.h"

namespace rosaq::cpu {
const KernelTable kAvx2Kernels = kernel_table<SimdAvx2>("avx2", {1 << 30, 8, 3, 2});
}
