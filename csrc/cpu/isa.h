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

}  // namespace rosaq::cpu
