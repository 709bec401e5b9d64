// Runs a case of conformance_kernels.cuh under the emulator.
#include "conformance_kernels.cuh"
#include "emulator/c_api.h"
#include "emulator/emulator.h"

extern "C" int conformance_run(const emu::LaunchOptions* options, const char* name, const uint32_t* in,
                               uint32_t* out) {
    return emu::guarded([&] {
        for (const conformance::Case& c : conformance::kCases)
            if (std::strcmp(c.name, name) == 0)
                return emu::launch(c.kernel, dim3(c.grid), dim3(c.block), c.smem_bytes, *options, in, out);
        throw emu::Error(std::string("no case named ") + name);
    });
}
