#include "fused.h"

template <>
emulator_tests::EmulatedInstance emulator_tests::find_instance<__half, 4>(bool symmetric, int tokens,
                                                                          bool warpgroups) {
    return find_instance_here<__half, 4>(symmetric, tokens, warpgroups);
}
