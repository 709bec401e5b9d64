// Builds the kernel table of one instruction set S. Included once by each kernels_<isa>.cpp.
#pragma once

#include "block.h"
#include "dense.h"
#include "prepare.h"
#include "rounding.h"
#include "stream.h"
#include "words.h"

namespace rosaq::cpu {
namespace {

template <class S>
constexpr KernelTable kernel_table(const char* name, StreamLimits stream_limits) {
    KernelTable table{};
    table.name = name;
    table.block_panels = kTileCols<S> / kPanelRows;
    table.dense_cols = kTileCols<S>;
    table.to_float = to_float<S>;
    table.dense_product = dense_product<S>;
    table.block_gemm = block_gemm<S>;
    table.rounding_rows = kRoundingRows<S>;
    table.round_panel = round_units<S, RoundRows<S>>;
    table.sweep_panel = round_units<S, SweepRows<S>>;
    if constexpr (S::kByteDot) {
        table.stream_limits = stream_limits;
        for (int d = 0; d < kMaxDigits; ++d) table.tile_rows[d] = tile_rows<S>(d + 1);
        table.make_digits = make_digits<S>;
        table.stream_gemm = stream_gemm<S>;
        table.word_cols = kTileCols<S>;
        table.word_tile_rows = S::kWordRows;
        table.make_words = make_words<S>;
        table.word_gemm = word_gemm<S>;
    }
    return table;
}

}  // namespace
}  // namespace rosaq::cpu
