// Between codes, the disk layout and the packed layout. All exact; all over a range of units, without torch
// or threads.
#pragma once

#include "../common/params.h"

namespace rosaq::cpu {

// The tensors of one weight in the disk layout. scales are 16-bit, bit patterns only; zeros is null if
// symmetric.
struct DiskWeight {
    const uint32_t* qweight = nullptr;  // [n, k * bits / 32]
    const uint16_t* scales = nullptr;   // [n, k / group_size]
    const uint8_t* zeros = nullptr;     // [n, k / group_size]
};
struct MutableDiskWeight {
    uint32_t* qweight = nullptr;
    uint16_t* scales = nullptr;
    uint8_t* zeros = nullptr;
};

// codes uint8 [rows, k] <-> qweight [rows, k * bits / 32], rows [begin, end).
void unpack_rows(const uint32_t* qweight, uint8_t* codes, int64_t k, int bits, int64_t begin, int64_t end);
void pack_rows(const uint8_t* codes, uint32_t* qweight, int64_t k, int bits, int64_t begin, int64_t end);

PackedHeader make_header(const PackedWeight& w);

// Panels [begin, end) of the blob; `panels` is the address of panel 0. w.panels is not used.
void prepack_panels(const DiskWeight& disk, const PackedWeight& w, uint8_t* panels, int64_t begin,
                    int64_t end);
void unprepack_panels(const PackedWeight& w, const MutableDiskWeight& disk, int64_t begin, int64_t end);

}  // namespace rosaq::cpu
