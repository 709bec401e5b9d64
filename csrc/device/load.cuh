// Global to shared memory: the stages of the ring. Weights and x are two streams, because weights never have
// to wait. Both walk the block's list of K-tiles with running pointers: the packed layout has the order of
// the list.
#pragma once

#include "schedule.cuh"
#include "tile.cuh"

namespace rosaq::cuda {

// First row of a warp's record in a row tile, which is a slab of the packed weight.
template <class Tile>
ROSAQ_DEVICE int first_row(int row_tile, const Lane& at) {
    return row_tile * kSlabRows + at.record<Tile>() * kRecordRows;
}

template <class Tile>
ROSAQ_DEVICE unsigned char* weight_stage(unsigned char* smem, int stage, const Lane& at) {
    return smem + stage * Tile::kWeightBytes + at.record<Tile>() * Tile::kWarpBytes;
}
template <class Tile>
ROSAQ_DEVICE unsigned char* x_stage(unsigned char* smem, int stage) {
    return smem + Tile::kStages * Tile::kWeightBytes + stage * Tile::kXBytes;
}

// salient_weight[row0 .. + 31, col0 .. + 31], zeros outside of [n, r].
ROSAQ_DEVICE void fetch_salient(const GemmParams& p, unsigned char* to, int row0, int col0) {
    const Lane at(
        ptx::opaque(static_cast<int>(threadIdx.x)));  // rare: nothing of it is to be kept in registers
    const auto* weight = static_cast<const uint16_t*>(p.salient_weight.data);
    if (p.r % 8 == 0) {
#pragma unroll
        for (int i = 0; i < kSalientCols / 8; ++i) {
            const int row = i * 8 + at.gid, col = col0 + at.tid * 8;
            const bool inside = row0 + row < p.n && col < p.r;
            const uint16_t* from = inside ? weight + static_cast<int64_t>(row0 + row) * p.r + col : weight;
            ptx::cp_async_16_zfill(to + salient_slot(row) * (kSalientCols * 2) + at.tid * kLoadBytes, from,
                                   inside);
        }
        return;
    }
    // Rows that are not 16-byte aligned: few columns as a rule, so plain copies, one row a lane.
    auto* slot = reinterpret_cast<uint16_t*>(to + salient_slot(at.lane) * (kSalientCols * 2));
    const int row = row0 + at.lane;
    const uint16_t* from = weight + static_cast<int64_t>(row) * p.r + col0;
    const int count = row < p.n ? p.r - col0 : 0;
#pragma unroll 1
    for (int col = 0; col < kSalientCols; col += 8) {
        uint16_t bits[8];  // loads do not wait behind stores
#pragma unroll
        for (int i = 0; i < 8; ++i) bits[i] = col + i < count ? from[col + i] : uint16_t{0};
#pragma unroll
        for (int i = 0; i < 8; ++i) slot[col + i] = bits[i];
    }
}

// A warp's weights, K-tile by K-tile; where two warps share them, the first copies.
template <class Tile>
class WeightStream {
  public:
    ROSAQ_DEVICE WeightStream(const GemmParams& p, const Cursor& start, const Lane& at) : p_(p) {
        const int64_t k_block = min(start.k_tile, p.k_blocks), slab = start.row_tile;
        const int64_t record = (slab * p.k_blocks + k_block) * kSlabRecords + at.record<Tile>();
        codes_ = p.codes + record * Tile::kRecordBytes + at.lane * kLoadBytes;
        // One more copy a lane: 64 bytes of scales a group, four lanes; 32 bytes of zeros, two lanes of the
        // upper half.
        static_assert(Tile::kScaleBytes == 16 * kLoadBytes, "scales and zeros lie in the order of the lanes");
        const bool is_scale = at.lane < 16;
        const int piece = at.lane % 16, shift = is_scale ? 2 : 1;  // 1 << shift pieces of 16 bytes a group
        const int64_t group =
            slab * p.groups + (p.groups == 1 ? 0 : k_block * p.groups_per_block) + (piece >> shift);
        side_ = (is_scale ? p.scales : p.zeros) + group * unit(at) +
                ((at.record<Tile>() << shift) + (piece & ((1 << shift) - 1))) * kLoadBytes;
    }

    // Copies K-tile `next`, which has to be the one after the last, to this warp's part of a weight stage.
    ROSAQ_DEVICE void fetch(const Cursor& next, unsigned char* to, const Lane& at) {
        const bool copies = at.half<Tile>() == 0;
        if (next.k_tile < p_.k_blocks) {
            if (copies) {
#pragma unroll
                for (int plane = 0; plane < Tile::kBits; ++plane) {
                    const int offset = plane * kLanes * kLoadBytes;
                    unsigned char* const slot = to + offset + at.lane * kLoadBytes;
                    // No cache hint where registers are scarce: ptxas 13.0 then makes the hint's descriptor
                    // anew before the copy, whose lower word is zero, and merges that with the uniform part
                    // of the shared address. What it writes, [R9+UR0], desc[UR1][R248.64] (an odd register,
                    // never set), is an illegal instruction to an H100; tests/test_sass.py looks for it.
                    if constexpr (Tile::kHalves == 1) {
                        ptx::cp_async_16_first(slot, codes_ + offset);
                    } else {
                        ptx::cp_async_16(slot, codes_ + offset);
                    }
                }
                if (has_side(at)) ptx::cp_async_16(to + Tile::kRecordBytes + at.lane * kLoadBytes, side_);
            }
            codes_ += kSlabRecords * Tile::kRecordBytes;
            if (p_.groups != 1) side_ += p_.groups_per_block * unit(at);
        } else if (copies) {
            fetch_salient(p_, to, first_row<Tile>(next.row_tile, at),
                          (next.k_tile - p_.k_blocks) * kSalientCols);
        }
        // The codes of the next row tile follow.
        if (p_.groups == 1 && next.k_tile + 1 == p_.schedule.k_tiles) side_ += unit(at);
    }

  private:
    // Whether this lane copies scales or zeros: there may be fewer groups than it would take lanes for.
    ROSAQ_DEVICE bool has_side(const Lane& at) const {
        if (at.lane < 16) return at.lane / 4 < p_.groups_per_block;
        return !Tile::kSymmetric && p_.zeros != nullptr && (at.lane - 16) / 2 < p_.groups_per_block;
    }
    // Bytes of a group of a slab, of what it copies.
    ROSAQ_DEVICE static int unit(const Lane& at) { return at.lane < 16 ? kSlabRows * 2 : kSlabRows; }

    const GemmParams& p_;
    const uint8_t *codes_, *side_;
};

// All tokens of 128 k at a time; nothing for a salient tile, whose values are computed when it is its turn.
template <class Tile>
class XStream {
  public:
    using T = typename Tile::T;
    static constexpr int kChunks = kBlockK / 8, kTokenStep = Tile::kThreads / kChunks;
    static constexpr int kCopies = Tile::kTokens / kTokenStep;
    static_assert(kTokenStep % 2 == 0 && kCopies * kTokenStep == Tile::kTokens,
                  "the swizzle depends on token % 2");

    ROSAQ_DEVICE XStream(const GemmParams& p, const Cursor& start) : p_(p) {
        const int64_t k = static_cast<int64_t>(min(start.k_tile, p.k_blocks)) * kBlockK + chunk() * 8;
        from_ = static_cast<const T*>(p.t != nullptr ? p.t : p.x) + static_cast<int64_t>(token()) * p.k + k;
    }

    // Of K-tile `next`, which has to be the one after the last.
    ROSAQ_DEVICE void fetch(const Cursor& next, unsigned char* x) {
        if (next.k_tile < p_.k_blocks) {
            const int thread = Tile::kHalves == 1 ? static_cast<int>(threadIdx.x)
                                                  : ptx::opaque(static_cast<int>(threadIdx.x));
            const int token = thread / kChunks, chunk = thread % kChunks;
            const bool has_k = next.k_tile * kBlockK + chunk * 8 < p_.k;
            unsigned char* to = x + x_chunk_offset(token, chunk);
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                const bool inside = has_k && token + i * kTokenStep < p_.m;
                const T* from = inside ? from_ + static_cast<int64_t>(i) * kTokenStep * p_.k
                                       : static_cast<const T*>(p_.x);
                ptx::cp_async_16_zfill(to + i * kTokenStep * (kBlockK * 2), from, inside);
            }
            from_ += kBlockK;
        }
        if (next.k_tile + 1 == p_.schedule.k_tiles) from_ -= static_cast<int64_t>(p_.k_blocks) * kBlockK;
    }

  private:
    ROSAQ_DEVICE static int token() { return static_cast<int>(threadIdx.x) / kChunks; }
    ROSAQ_DEVICE static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }

    const GemmParams& p_;
    const T* from_;
};

}  // namespace rosaq::cuda
