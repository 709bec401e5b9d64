// Global to shared memory: the stages of the ring. Weights and x are fetched apart, because weights never
// have to wait. Addresses are made anew for every stage (ptx::opaque): kept across the main loop they would
// crowd out its sums.
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
class Loader {
  public:
    ROSAQ_DEVICE Loader(const GemmParams& p, unsigned char* smem) : p_(p), smem_(smem) {}

    ROSAQ_DEVICE unsigned char* weight_stage(int stage, int record) const {
        return smem_ + stage * Tile::kWeightBytes + record * Tile::kWarpBytes;
    }
    ROSAQ_DEVICE unsigned char* x_stage(int stage) const {
        return smem_ + Tile::kStages * Tile::kWeightBytes + stage * Tile::kXBytes;
    }

    // This warp's weights of a K-tile; where two warps share them, the first copies.
    ROSAQ_DEVICE void fetch_weights(int stage, const Cursor& c) const {
        const Lane at(ptx::opaque(static_cast<int>(threadIdx.x)));
        if (at.warp >= Tile::kRowWarps) return;
        const WarpRows<Tile> rows(c.row_tile, at);
        if (rows.slab >= p_.slabs) return;
        unsigned char* to = weight_stage(stage, at.warp);
        if (c.k_tile < p_.k_blocks)
            fetch_low_bit(to, rows, c.k_tile, at);
        else
            fetch_salient(to, rows, (c.k_tile - p_.k_blocks) * kSalientCols, at);
    }

    // All tokens of 128 k; nothing for a salient tile, whose values are computed when it is its turn.
    ROSAQ_DEVICE void fetch_x(int stage, const Cursor& c) const {
        if (c.k_tile >= p_.k_blocks) return;
        using T = typename Tile::T;
        constexpr int kChunks = kBlockK / 8;
        const T* source = static_cast<const T*>(p_.t != nullptr ? p_.t : p_.x);
        unsigned char* x = x_stage(stage);
#pragma unroll
        for (int i = ptx::opaque(static_cast<int>(threadIdx.x)); i < Tile::kTokens * kChunks;
             i += Tile::kThreads) {
            const int token = i / kChunks, chunk = i % kChunks, k = c.k_tile * kBlockK + chunk * 8;
            const bool inside = token < p_.m && k < p_.k;
            const T* from = inside ? source + static_cast<int64_t>(token) * p_.k + k : source;
            ptx::cp_async_16_zfill(x + x_chunk_offset(token, chunk), from, inside);
        }
    }

  private:
    ROSAQ_DEVICE void fetch_low_bit(unsigned char* to, const WarpRows<Tile>& rows, int k_block,
                                    const Lane& at) const {
        const int64_t record =
            (static_cast<int64_t>(rows.slab) * p_.k_blocks + k_block) * kSlabRecords + rows.record;
        const uint8_t* codes = p_.codes + record * Tile::kRecordBytes + at.lane * kLoadBytes;
#pragma unroll
        for (int plane = 0; plane < Tile::kBits; ++plane) {
            const int offset = plane * kLanes * kLoadBytes;
            ptx::cp_async_16_first(to + offset + at.lane * kLoadBytes, codes + offset);
        }
        // 64 bytes of scales a group: four lanes; 32 bytes of zeros: two lanes of the upper half.
        const int first = p_.groups == 1 ? 0 : k_block * p_.groups_per_block;
        const int64_t group0 = static_cast<int64_t>(rows.slab) * p_.groups + first;
        const int group = at.lane / 4, part = at.lane % 4;
        if (group < p_.groups_per_block) {
            const int64_t row = (group0 + group) * kSlabRows + rows.record * kRecordRows;
            ptx::cp_async_16(to + Tile::kRecordBytes + (group * 4 + part) * kLoadBytes,
                             p_.scales + row * 2 + part * kLoadBytes);
        }
        if constexpr (!Tile::kSymmetric) {
            const int zero_group = (at.lane - 16) / 2, half = at.lane % 2;
            if (p_.zeros != nullptr && at.lane >= 16 && zero_group < p_.groups_per_block) {
                const int64_t row = (group0 + zero_group) * kSlabRows + rows.record * kRecordRows;
                ptx::cp_async_16(
                    to + Tile::kRecordBytes + Tile::kScaleBytes + (zero_group * 2 + half) * kLoadBytes,
                    p_.zeros + row + half * kLoadBytes);
            }
        }
    }

    // salient_weight[row0 .. + 31, col0 .. + 31], zeros outside of [n, r].
    ROSAQ_DEVICE void fetch_salient(unsigned char* to, const WarpRows<Tile>& rows, int col0,
                                    const Lane& at) const {
        const auto* weight = static_cast<const uint16_t*>(p_.salient_weight.data);
        if (p_.r % 8 == 0) {
#pragma unroll
            for (int i = 0; i < kSalientCols / 8; ++i) {
                const int row = i * 8 + at.gid, col = col0 + at.tid * 8;
                const bool inside = rows.row0 + row < p_.n && col < p_.r;
                const uint16_t* from =
                    inside ? weight + static_cast<int64_t>(rows.row0 + row) * p_.r + col : weight;
                ptx::cp_async_16_zfill(to + salient_slot(row) * (kSalientCols * 2) + at.tid * kLoadBytes,
                                       from, inside);
            }
            return;
        }
        // Rows that are not 16-byte aligned: few columns as a rule, so plain copies, one row a lane.
        auto* slot = reinterpret_cast<uint16_t*>(to + salient_slot(at.lane) * (kSalientCols * 2));
        const int row = rows.row0 + at.lane;
        for (int col = 0; col < kSalientCols; ++col) {
            const bool inside = row < p_.n && col0 + col < p_.r;
            slot[col] = inside ? weight[static_cast<int64_t>(row) * p_.r + col0 + col] : uint16_t{0};
        }
    }

    const GemmParams& p_;
    unsigned char* smem_;
};

}  // namespace rosaq::cuda
