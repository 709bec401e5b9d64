// Where a thread of the repacking kernels is.
#pragma once

#include "../common/grid.h"
#include "../device/tile.cuh"
#include "blob.h"

namespace rosaq::cuda {

// Index of this thread among all of the grid.
ROSAQ_DEVICE int64_t global_thread() {
    return static_cast<int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x;
}

// Quotient and rest of what fits 32 bits, as counts of records and groups do (prepack checks): a 64-bit
// division is a call that costs more than the rest of these kernels.
ROSAQ_DEVICE int64_t quotient(int64_t a, int64_t b) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}
ROSAQ_DEVICE int64_t rest(int64_t a, int64_t b) {
    return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
}

// Row and first k of a lane's weights in record `record` (counted over the whole blob).
struct RecordPlace {
    int64_t row0, k0;
    ROSAQ_DEVICE RecordPlace(const BlobLayout& l, int64_t record)
        : row0(quotient(record, l.k_blocks * kSlabRecords) * kSlabRows + record % kSlabRecords * kRecordRows),
          k0(rest(record / kSlabRecords, l.k_blocks) * kBlockK) {}
};

}  // namespace rosaq::cuda
