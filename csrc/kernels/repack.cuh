// Between codes, the disk layout, the packed blob and dense weights: exact, run once at load time or (dense
// weights) for many tokens. One thread a lane of a record, or a row and 32 k.
#pragma once

#include "repack_common.cuh"

namespace rosaq::cuda {

// Codes of the disk layout into records; outside of [n, k] the codes are 0 (the scales there are 0 too).
template <int kBits>
__global__ void __launch_bounds__(kUnitThreads)
    prepack_codes_kernel(DiskWeight disk, BlobShape shape, uint8_t* blob) {
    const BlobLayout& l = shape.layout;
    const int64_t record = global_thread() / kLanes;
    if (record >= l.slabs * l.k_blocks * kSlabRecords) return;
    const int lane = static_cast<int>(global_thread() % kLanes), gid = lane / 4, tid = lane % 4;
    const RecordPlace at(l, record);
    uint32_t words[4 * kBits] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int64_t row = at.row0 + gid * 4 + j;
        if (row >= shape.n) continue;
        const uint32_t* row_words = disk.qweight + row * (shape.k / 32 * kBits);
#pragma unroll
        for (int sub = 0; sub < kBlockK / 32; ++sub) {
            const int64_t k = at.k0 + sub * 32;
            if (k >= shape.k) continue;
            uint32_t codes[kBits];
            for (int w = 0; w < kBits; ++w) codes[w] = row_words[k / 32 * kBits + w];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t code = extract_disk_code(kBits, codes, tid * 8 + i);
#pragma unroll
                for (int b = 0; b < kBits; ++b) {
                    const BitPlace place = bit_place(kBits, j, sub * 32 + i, b);
                    words[place.word] |= (code >> b & 1u) << place.bit;
                }
            }
        }
    }
    uint8_t* out = blob + l.codes_offset + record * l.record_bytes;
#pragma unroll
    for (int w = 0; w < 4 * kBits; ++w) *reinterpret_cast<uint32_t*>(out + word_offset(lane, w)) = words[w];
}

// Records back into the disk layout: one thread a row and 32 k.
template <int kBits>
__global__ void __launch_bounds__(kUnitThreads)
    unprepack_codes_kernel(const uint8_t* blob, BlobShape shape, DiskWeight disk) {
    const int64_t blocks = shape.k / 32, row = quotient(global_thread(), blocks);
    const int64_t k = rest(global_thread(), blocks) * 32;
    if (row >= shape.n) return;
    const BlobLayout& l = shape.layout;
    const int64_t record =
        (row / kSlabRows * l.k_blocks + k / kBlockK) * kSlabRecords + row % kSlabRows / kRecordRows;
    const uint8_t* from = blob + l.codes_offset + record * l.record_bytes;
    uint32_t codes[kBits] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        uint32_t code = 0;
#pragma unroll
        for (int b = 0; b < kBits; ++b) {
            const BitPlace place =
                bit_place(kBits, static_cast<int>(row % kRecordRows), static_cast<int>(k % kBlockK) + i, b);
            const uint32_t word =
                *reinterpret_cast<const uint32_t*>(from + word_offset(place.lane, place.word));
            code |= (word >> place.bit & 1u) << b;
        }
        deposit_disk_code(kBits, codes, i, code);
    }
    for (int w = 0; w < kBits; ++w) disk.qweight[(row * blocks + k / 32) * kBits + w] = codes[w];
}

// Scales and zeros [n, groups] <-> [slab][padded group][128 rows], zeros in halves; padding is 0. One thread
// an element of the blob.
template <bool kToBlob>
__global__ void __launch_bounds__(kUnitThreads)
    repack_scales_kernel(DiskWeight disk, BlobShape shape, uint8_t* blob) {
    const BlobLayout& l = shape.layout;
    const int64_t i = global_thread();
    if (i >= l.slabs * l.groups * kSlabRows) return;
    const int64_t row = quotient(i, l.groups * kSlabRows) * kSlabRows + i % kSlabRows,
                  group = rest(i / kSlabRows, l.groups);
    const bool inside = row < shape.n && group < shape.groups;
    const int64_t at = row * shape.groups + group;
    uint16_t& scale = reinterpret_cast<uint16_t*>(blob + l.scales_offset)[i];
    uint8_t* zero = shape.symmetric ? nullptr : blob + l.zeros_offset + i;
    if constexpr (kToBlob) {
        scale = inside ? disk.scales[at] : uint16_t{0};
        if (zero != nullptr) *zero = inside ? twice_zero_of_disk(disk.zeros[at]) : uint8_t{0};
    } else if (inside) {
        disk.scales[at] = scale;
        if (zero != nullptr) disk.zeros[at] = disk_of_twice_zero(*zero);
    }
}

// codes uint8 [n, k] <-> qweight int32 [n, k * bits / 32]: one thread 32 codes.
template <int kBits, bool kPack>
__global__ void __launch_bounds__(kUnitThreads)
    disk_codes_kernel(uint8_t* codes, uint32_t* qweight, int64_t blocks) {
    const int64_t block = global_thread();
    if (block >= blocks) return;
    uint32_t words[kBits] = {};
    if constexpr (!kPack)
        for (int w = 0; w < kBits; ++w) words[w] = qweight[block * kBits + w];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        if constexpr (kPack)
            deposit_disk_code(kBits, words, i, codes[block * 32 + i]);
        else
            codes[block * 32 + i] = static_cast<uint8_t>(extract_disk_code(kBits, words, i));
    }
    if constexpr (kPack)
        for (int w = 0; w < kBits; ++w) qweight[block * kBits + w] = words[w];
}

}  // namespace rosaq::cuda
