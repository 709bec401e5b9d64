#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rosaq::cpu {
namespace {

std::vector<const KernelTable*> available_tables() {
    std::vector<const KernelTable*> tables{&kPortableKernels};
#ifdef ROSAQ_X86
    // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) tables.push_back(&kAvx2Kernels);
    if (avx512) tables.push_back(&kAvx512Kernels);
    if (avx512 && __builtin_cpu_supports("avx512vnni")) tables.push_back(&kAvx512VnniKernels);
#endif
    return tables;
}

const KernelTable* find_table(const std::string& name, const char* source) {
    std::string names;
    for (const KernelTable* table : available_tables()) {
        if (name == table->name) return table;
        names += (names.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument(std::string(source) + ": got '" + name +
                                "', this machine and build have: " + names);
}

const KernelTable* choose_table() {
    const char* forced = std::getenv("ROSAQ_CPU_ISA");
    if (forced != nullptr && forced[0] != '\0') return find_table(forced, "ROSAQ_CPU_ISA");
    return available_tables().back();
}

// A function-local static, so that a bad ROSAQ_CPU_ISA is an error of the first call and not of loading the
// library.
std::atomic<const KernelTable*>& active_table() {
    static std::atomic<const KernelTable*> table{choose_table()};
    return table;
}

Precision find_precision(const std::string& name, const char* source) {
    if (name == "exact") return Precision::kExact;
    if (name == "int8") return Precision::kInt8;
    throw std::invalid_argument(std::string(source) + ": got '" + name + "', need exact or int8");
}

std::atomic<Precision>& chosen_precision() {
    static std::atomic<Precision> precision{[] {
        const char* asked = std::getenv("ROSAQ_CPU_PRECISION");
        return asked != nullptr && asked[0] != '\0' ? find_precision(asked, "ROSAQ_CPU_PRECISION")
                                                    : Precision::kExact;
    }()};
    return precision;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
    return names;
}

const KernelTable& active_kernels() {
    return *active_table().load(std::memory_order_relaxed);
}

void set_isa(const std::string& name) {
    active_table().store(find_table(name, "set_isa: name"));
}

Precision active_precision() {
    return chosen_precision().load(std::memory_order_relaxed);
}

void set_precision(const std::string& name) {
    chosen_precision().store(find_precision(name, "set_cpu_precision: name"));
}

std::string precision_name() {
    return active_precision() == Precision::kInt8 ? "int8" : "exact";
}

}  // namespace rosaq::cpu
