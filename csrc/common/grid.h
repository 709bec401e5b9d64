// Grids of one thread per unit of work.
#pragma once

#include "layout_cuda.h"

namespace rosaq::cuda {

constexpr int kUnitThreads = 128;

inline unsigned blocks_for(int64_t threads) {
    return static_cast<unsigned>(ceil_div<int64_t>(threads, kUnitThreads));
}

// One thread a lane of a record.
inline int64_t record_threads(const BlobLayout& l) {
    return l.slabs * l.k_blocks * kSlabRecords * kLanes;
}

}  // namespace rosaq::cuda
