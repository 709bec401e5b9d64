#include "kernel_table.h"
#include "simd_portable.h"

namespace rosaq::cpu {
const KernelTable kPortableKernels = kernel_table<SimdPortable>("portable", {});
}
