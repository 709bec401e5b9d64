// Global to shared memory: the stages of the ring. Weights and x are two streams, because weights never have
// to wait. Both walk the block's list of K-tiles with running pointers: the packed layout has the order of
// the list.
#pragma once

#include "schedule.cuh"
#include "tile.cuh"

namespace rosaq::cuda {

// Where a warp's part of a row tile is: rows row0 .. row0 + 31, in slab `slab`. Warps past the last slab have
// no work.
template <class Tile>
struct WarpRows {
    int slab, record, row0;
    ROSAQ_DEVICE WarpRows(int row_tile, const Lane& at)
        : slab(row_tile * Tile::kSlabs + at.record<Tile>() / kSlabRecords),
          record(at.record<Tile>() % kSlabRecords),
          row0(slab * kSlabRows + record * kRecordRows) {}
};

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
    for (int col = 0; col < kSalientCols; ++col) {
        const bool inside = row < p.n && col0 + col < p.r;
        slot[col] = inside ? weight[static_cast<int64_t>(row) * p.r + col0 + col] : uint16_t{0};
    }
}

// A warp's weights, K-tile by K-tile; where two warps share them, the first copies.
template <class Tile>
class WeightStream {
  public:
    ROSAQ_DEVICE WeightStream(const GemmParams& p, const Cursor& start, const Lane& at)
        : p_(p), k_tile_(start.k_tile) {
        const WarpRows<Tile> rows(start.row_tile, at);
        slab_ = at.warp < Tile::kRowWarps ? rows.slab : p.slabs;
        const int64_t k_block = min(k_tile_, p.k_blocks), slab = rows.slab;
        const int64_t record = (slab * p.k_blocks + k_block) * kSlabRecords + rows.record;
        codes_ = p.codes + record * Tile::kRecordBytes + at.lane * kLoadBytes;
        // One more copy a lane: 64 bytes of scales a group, four lanes; 32 bytes of zeros, two lanes of the
        // upper half.
        static_assert(Tile::kScaleBytes == 16 * kLoadBytes, "scales and zeros lie in the order of the lanes");
        const int64_t group =
            slab * p.groups + (p.groups == 1 ? 0 : k_block * p.groups_per_block) + piece(at) / pieces(at);
        side_ = (is_scale(at) ? p.scales : p.zeros) + group * unit(at) +
                (rows.record * pieces(at) + piece(at) % pieces(at)) * kLoadBytes;
    }

    // Copies the next K-tile to this warp's part of a weight stage.
    ROSAQ_DEVICE void fetch(unsigned char* to, const Lane& at) {
        const bool has_rows = slab_ < p_.slabs;
        if (k_tile_ < p_.k_blocks) {
            if (has_rows) {
#pragma unroll
                for (int plane = 0; plane < Tile::kBits; ++plane) {
                    const int offset = plane * kLanes * kLoadBytes;
                    ptx::cp_async_16_first(to + offset + at.lane * kLoadBytes, codes_ + offset);
                }
                if (has_side(at)) ptx::cp_async_16(to + Tile::kRecordBytes + at.lane * kLoadBytes, side_);
            }
            codes_ += kSlabRecords * Tile::kRecordBytes;
            if (p_.groups != 1) side_ += p_.groups_per_block * unit(at);
        } else if (has_rows) {
            const int row0 = slab_ * kSlabRows + at.record<Tile>() % kSlabRecords * kRecordRows;
            fetch_salient(p_, to, row0, (k_tile_ - p_.k_blocks) * kSalientCols);
        }
        if (++k_tile_ < p_.schedule.k_tiles) return;
        k_tile_ = 0;
        ++slab_;
        if (p_.groups == 1) side_ += unit(at);
    }

  private:
    static_assert(Tile::kSlabs == 1, "the slabs of a block's row tiles follow each other");
    // Not kept: where registers are short, a few instructions cost less than one of them.
    ROSAQ_DEVICE static bool is_scale(const Lane& at) { return at.lane < 16; }
    ROSAQ_DEVICE static int piece(const Lane& at) { return at.lane % 16; }
    // Of 16 bytes, of a group.
    ROSAQ_DEVICE static int pieces(const Lane& at) { return is_scale(at) ? 4 : 2; }
    // Bytes of a group of a slab.
    ROSAQ_DEVICE static int unit(const Lane& at) { return is_scale(at) ? kSlabRows * 2 : kSlabRows; }
    ROSAQ_DEVICE bool has_side(const Lane& at) const {
        return piece(at) / pieces(at) < p_.groups_per_block &&
               (is_scale(at) || (!Tile::kSymmetric && p_.zeros != nullptr));
    }

    const GemmParams& p_;
    int k_tile_, slab_;  // slab_ past the last one: nothing to copy
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

    ROSAQ_DEVICE XStream(const GemmParams& p, const Cursor& start) : p_(p), k_tile_(start.k_tile) {
        const int64_t k = static_cast<int64_t>(min(k_tile_, p.k_blocks)) * kBlockK + chunk() * 8;
        from_ = static_cast<const T*>(p.t != nullptr ? p.t : p.x) + static_cast<int64_t>(token()) * p.k + k;
    }

    ROSAQ_DEVICE void fetch(unsigned char* x) {
        if (k_tile_ < p_.k_blocks) {
            const int thread = Tile::kHalves == 1 ? static_cast<int>(threadIdx.x)
                                                  : ptx::opaque(static_cast<int>(threadIdx.x));
            const int token = thread / kChunks, chunk = thread % kChunks;
            const bool has_k = k_tile_ * kBlockK + chunk * 8 < p_.k;
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
        if (++k_tile_ < p_.schedule.k_tiles) return;
        k_tile_ = 0;
        from_ -= static_cast<int64_t>(p_.k_blocks) * kBlockK;
    }

  private:
    ROSAQ_DEVICE static int token() { return static_cast<int>(threadIdx.x) / kChunks; }
    ROSAQ_DEVICE static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }

    const GemmParams& p_;
    int k_tile_;
    const T* from_;
};

}  // namespace rosaq::cuda
