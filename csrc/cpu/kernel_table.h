// Builds the kernel table of one instruction set S. Included once by each kernels_<isa>.cpp.
#pragma once

#include "block.h"
#include "prepare.h"
#include "stream.h"

namespace rosaq::cpu {
namespace {

template <class S>
constexpr KernelTable kernel_table(const char* name) {
    return {name,           kTileCols<S> / kPanelRows, kTileCols<S>,   to_float<S>,
            make_digits<S>, dense_product<S>,          stream_gemm<S>, block_gemm<S>};
}

}  // namespace
}  // namespace rosaq::cpu
