// What a Tile of the fused kernel takes, as numbers for the host.
#pragma once

#include "../kernels/fused_gemm.cuh"
#include "plan.h"

namespace rosaq::cuda {

template <class Tile>
constexpr InstanceShape shape_of() {
    return {Number<typename Tile::T>::kDType,
            Tile::kBits,
            Tile::kSymmetric,
            Tile::kTokens,
            Tile::kRows,
            Tile::kThreads,
            Tile::kSmemBytes};
}

}  // namespace rosaq::cuda
