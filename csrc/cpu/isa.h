// Which kernel table runs. Chosen once from cpuid, or by the environment variable ROSAQ_CPU_ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace rosaq::cpu {

// Names this build and this machine can run, slowest first: portable, avx2, avx512, avx512vnni.
std::vector<std::string> available_isas();

// The table in use. Throws std::invalid_argument if ROSAQ_CPU_ISA names one that is not available.
const KernelTable& active_kernels();

// Switches the table for the whole process (tests compare instruction sets with it). Throws as above.
void set_isa(const std::string& name);

// How activations enter the product. exact: as integers that carry x's dtype. int8: 8 bits per token and
// chunk of at most 128 channels, where the kernels have a byte dot product.
enum class Precision { kExact, kInt8 };

// The choice for the whole process: `exact` unless ROSAQ_CPU_PRECISION or set_precision says otherwise. Both
// throw std::invalid_argument for any other name.
Precision active_precision();
void set_precision(const std::string& name);
std::string precision_name();

}  // namespace rosaq::cpu
