#include "fused.h"

template <>
emulator_tests::EmulatedInstance emulator_tests::find_instance<__half, 3>(bool symmetric, int tokens,
                                                                          bool warpgroups) {
    return find_instance_here<__half, 3>(symmetric, tokens, warpgroups);
}
