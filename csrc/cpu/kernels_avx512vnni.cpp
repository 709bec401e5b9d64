#include "kernel_table.h"
#include "simd_avx512.h"

namespace rosaq::cpu {
const KernelTable kAvx512VnniKernels =
    kernel_table<SimdAvx512>("avx512vnni", {1 << 30, 1 << 30, 1 << 30, 16});
}
