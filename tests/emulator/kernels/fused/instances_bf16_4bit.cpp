#include "fused.h"

template <>
emulator_tests::EmulatedInstance emulator_tests::find_instance<__nv_bfloat16, 4>(bool symmetric, int tokens,
                                                                                 bool warpgroups) {
    return find_instance_here<__nv_bfloat16, 4>(symmetric, tokens, warpgroups);
}
