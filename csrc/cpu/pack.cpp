#include "pack.h"

#include <cstring>

#include "../common/layout.h"

namespace rosaq::cpu {
namespace {

template <int kBits>
void unpack_block(const uint32_t* words, uint8_t* codes) {
    for (int j = 0; j < kBlockK; ++j) codes[j] = static_cast<uint8_t>(extract_disk_code(kBits, words, j));
}

template <int kBits>
void pack_block(const uint8_t* codes, uint32_t* words) {
    uint32_t out[kBits] = {};
    for (int j = 0; j < kBlockK; ++j) deposit_disk_code(kBits, out, j, codes[j]);
    std::memcpy(words, out, sizeof out);
}

int64_t rows_of(const PackedWeight& w, int64_t panel) {
    const int64_t left = w.n - panel * kPanelRows;
    return left < kPanelRows ? left : kPanelRows;
}

// Word i of block b of a row, in the panel's interleaved order.
uint8_t* word_at(uint8_t* codes, int bits, int64_t block, int i, int64_t lane) {
    return codes + ((block * bits + i) * kPanelRows + lane) * 4;
}

template <int kBits>
void prepack_row(const uint32_t* qweight, uint8_t* codes, int64_t blocks, int64_t lane) {
    for (int64_t b = 0; b < blocks; ++b) {
        uint32_t words[kBits] = {};
        for (int j = 0; j < kBlockK; ++j)
            deposit_code(kBits, words, j, extract_disk_code(kBits, qweight + b * kBits, j));
        for (int i = 0; i < kBits; ++i) std::memcpy(word_at(codes, kBits, b, i, lane), &words[i], 4);
    }
}

template <int kBits>
void unprepack_row(const uint8_t* codes, uint32_t* qweight, int64_t blocks, int64_t lane) {
    for (int64_t b = 0; b < blocks; ++b) {
        uint32_t words[kBits] = {}, out[kBits] = {};
        for (int i = 0; i < kBits; ++i)
            std::memcpy(&words[i], word_at(const_cast<uint8_t*>(codes), kBits, b, i, lane), 4);
        for (int j = 0; j < kBlockK; ++j) deposit_disk_code(kBits, out, j, extract_code(kBits, words, j));
        std::memcpy(qweight + b * kBits, out, sizeof out);
    }
}

}  // namespace

void unpack_rows(const uint32_t* qweight, uint8_t* codes, int64_t k, int bits, int64_t begin, int64_t end) {
    for (int64_t b = begin * k / kBlockK; b < end * k / kBlockK; ++b)
        bits == 3 ? unpack_block<3>(qweight + b * 3, codes + b * kBlockK)
                  : unpack_block<4>(qweight + b * 4, codes + b * kBlockK);
}

void pack_rows(const uint8_t* codes, uint32_t* qweight, int64_t k, int bits, int64_t begin, int64_t end) {
    for (int64_t b = begin * k / kBlockK; b < end * k / kBlockK; ++b)
        bits == 3 ? pack_block<3>(codes + b * kBlockK, qweight + b * 3)
                  : pack_block<4>(codes + b * kBlockK, qweight + b * 4);
}

PackedHeader make_header(const PackedWeight& w) {
    PackedHeader h{};
    std::memcpy(h.magic, kMagic, sizeof kMagic);
    h.layout_version = kLayoutVersion;
    h.bits = static_cast<uint32_t>(w.bits);
    h.symmetric = w.symmetric ? 1 : 0;
    h.scale_dtype = static_cast<uint32_t>(w.scale_dtype);
    h.n = w.n, h.k = w.k, h.group_size = w.group_size;
    h.total_bytes = w.layout.total_bytes;
    return h;
}

void prepack_panels(const DiskWeight& disk, const PackedWeight& w, uint8_t* panels, int64_t begin,
                    int64_t end) {
    const int64_t groups = w.layout.groups, blocks = w.k / kBlockK, row_words = blocks * w.bits;
    for (int64_t p = begin; p < end; ++p) {
        uint8_t* panel = panels + p * w.layout.panel_bytes;
        std::memset(panel, 0, static_cast<size_t>(w.layout.panel_bytes));
        for (int64_t lane = 0; lane < rows_of(w, p); ++lane) {
            const int64_t row = p * kPanelRows + lane;
            for (int64_t g = 0; g < groups; ++g) {
                std::memcpy(panel + (g * kPanelRows + lane) * 2, disk.scales + row * groups + g, 2);
                if (!w.symmetric)
                    panel[w.layout.zeros_offset + g * kPanelRows + lane] =
                        twice_zero_of_disk(disk.zeros[row * groups + g]);
            }
            const uint32_t* words = disk.qweight + row * row_words;
            uint8_t* codes = panel + w.layout.codes_offset;
            w.bits == 3 ? prepack_row<3>(words, codes, blocks, lane)
                        : prepack_row<4>(words, codes, blocks, lane);
        }
    }
}

void unprepack_panels(const PackedWeight& w, const MutableDiskWeight& disk, int64_t begin, int64_t end) {
    const int64_t groups = w.layout.groups, blocks = w.k / kBlockK, row_words = blocks * w.bits;
    for (int64_t p = begin; p < end; ++p) {
        const uint8_t* panel = w.panels + p * w.layout.panel_bytes;
        for (int64_t lane = 0; lane < rows_of(w, p); ++lane) {
            const int64_t row = p * kPanelRows + lane;
            for (int64_t g = 0; g < groups; ++g) {
                std::memcpy(disk.scales + row * groups + g, panel + (g * kPanelRows + lane) * 2, 2);
                if (!w.symmetric)
                    disk.zeros[row * groups + g] =
                        disk_of_twice_zero(panel[w.layout.zeros_offset + g * kPanelRows + lane]);
            }
            uint32_t* words = disk.qweight + row * row_words;
            const uint8_t* codes = panel + w.layout.codes_offset;
            w.bits == 3 ? unprepack_row<3>(codes, words, blocks, lane)
                        : unprepack_row<4>(codes, words, blocks, lane);
        }
    }
}

}  // namespace rosaq::cpu
