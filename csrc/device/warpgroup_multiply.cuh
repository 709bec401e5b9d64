// A warpgroup's products: K-tiles of one MMA row tile of every record, with wgmma.
//
// Weights enter as exact integers, as in multiply.cuh, from registers; their float32 scale is applied to the
// sums of a group. While the tensor cores work the next weights are decoded, and the sums of a K-tile are
// scaled when those of the next are about to begin.
#pragma once

#include "multiply.cuh"
#include "warpgroup_epilogue.cuh"

#if ROSAQ_SM90A
namespace rosaq::cuda {

// When sums are scaled: at the end of a row tile, of every K-tile, or within it.
enum class Groups { kWholeRow, kOf128, kOf64, kOf32 };

template <class Tile, Groups kGroups>
class Multiplier {
  public:
    using T = typename Tile::T;
    static constexpr int kSums = Tile::kTokens / 2, kSteps = 4;  // of 16 k, in half a K-tile
    static constexpr bool kEndsWithin = kGroups == Groups::kOf64 || kGroups == Groups::kOf32;

    ROSAQ_DEVICE Multiplier(const GemmParams& p, const StageRing<Tile>& ring) : p_(p), ring_(ring), at_() {}

    ROSAQ_DEVICE void run(Cursor now, int tiles) {
        float sums[kSums];  // of the row tile
        StagePlace<Tile> place;
        while (tiles > 0) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
            const int of_row_tile = min(tiles, p_.schedule.k_tiles - now.k_tile);
            const int low_bit = min(of_row_tile, max(p_.k_blocks - now.k_tile, 0));
            if (low_bit > 0) low_bit_tiles(place, low_bit, sums);
            for (int i = low_bit; i < of_row_tile; ++i) salient_tile(place, sums);
            finish_rows<Tile>(p_, now.row_tile, sums, at_);
            tiles -= of_row_tile;
            now.k_tile = 0, ++now.row_tile;
        }
    }

  private:
    // sums += W x^T for some K-tiles of one row tile. The products of a K-tile are under way while the first
    // half of the next is decoded.
    ROSAQ_DEVICE void low_bit_tiles(StagePlace<Tile>& place, int tiles, float (&sums)[kSums]) {
        float kept[kSums];  // the sums of a group, not scaled yet
        uint32_t first[kSteps][4], second[kSteps][4];
        adds_ = false;
        start_tile(place, first);
        ptx::settle(first);
        ptx::wgmma_fence();
        multiply_tile(place, sums, kept, first, second);
        for (int left = tiles - 1; left > 0; --left) {
            const int last_stage = place.stage;
            place.advance();
            ptx::wgmma_wait<1>();  // nobody multiplies with `first` any more
            start_tile(place, first);
            ptx::wgmma_wait<0>();
            if (kGroups == Groups::kOf128) scale(sums, kept);
            release(last_stage);
            ptx::settle(kept);
            ptx::settle(first);
            ptx::wgmma_fence();
            multiply_tile(place, sums, kept, first, second);
        }
        ptx::wgmma_wait<0>();
        if (!kEndsWithin) scale(sums, kept);
        release(place.stage);
        place.advance();
    }

    // Decodes the first half of a K-tile, and waits for its x.
    ROSAQ_DEVICE void start_tile(const StagePlace<Tile>& place, uint32_t (&first)[kSteps][4]) {
        wait_for(ring_.has_weights(place.stage), place.parity);
        load_words(ring_.weights(place.stage));
        decode_half<0>(ring_.weights(place.stage), first);
        wait_for(ring_.has_x(place.stage), place.parity);
    }

    ROSAQ_DEVICE void multiply_tile(const StagePlace<Tile>& place, float (&sums)[kSums], float (&kept)[kSums],
                                    const uint32_t (&first)[kSteps][4], uint32_t (&second)[kSteps][4]) {
        const unsigned char* weights = ring_.weights(place.stage);
        const ptx::WgmmaMatrix x = matrix_of(place.stage);
        multiply_half<0>(weights, x, sums, kept, first);
        decode_half<1>(weights, second);
        if (!kEndsWithin) load_scales(weights, 0);
        ptx::settle(second);
        ptx::wgmma_fence();
        multiply_half<1>(weights, x, sums, kept, second);
    }

    ROSAQ_DEVICE void release(int stage) {
        __syncwarp();
        if (at_.lane == 0) ptx::mbarrier_arrive(ring_.is_free(stage));
    }

    // sums += scale * kept; the next product starts anew.
    ROSAQ_DEVICE void scale(float (&sums)[kSums], float (&kept)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += scales_[i / 2 % 2] * kept[i];
        adds_ = false;
    }

    ROSAQ_DEVICE void load_scales(const unsigned char* weights, int group) {
        const unsigned char* from = weights + Tile::kCodeBytes + (group * kSlabRows + at_.row_in_slab()) * 2;
        const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
        scales_[0] = float_of_16(two & 0xffffu, p_.scale_is_bf16);
        scales_[1] = float_of_16(two >> 16, p_.scale_is_bf16);
    }

    // The lane's codes of its row tile.
    ROSAQ_DEVICE void load_words(const unsigned char* weights) {
        const unsigned char* from = weights + at_.record * Tile::kRecordBytes + at_.lane * kLoadBytes;
        if constexpr (Tile::kBits == 4) {
            static_assert(word_of_4bit(1, 3) == 7, "two neighbouring words a row tile in every four");
#pragma unroll
            for (int sub = 0; sub < 4; ++sub) {
                const uint2 v =
                    *reinterpret_cast<const uint2*>(from + sub * kLanes * kLoadBytes + at_.row_tile * 8);
                words_[2 * sub] = v.x, words_[2 * sub + 1] = v.y;
            }
        } else {
            uint4 v[3];
#pragma unroll
            for (int plane = 0; plane < 3; ++plane)
                v[plane] = *reinterpret_cast<const uint4*>(from + plane * kLanes * kLoadBytes);
            const uint32_t all[12] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y,
                                      v[1].z, v[1].w, v[2].x, v[2].y, v[2].z, v[2].w};
#pragma unroll
            for (int i = 0; i < 6; ++i)
                words_[i] = at_.row_tile == 0 ? all[words_of_3bit(0, i / 3) + i % 3]
                                              : all[words_of_3bit(1, i / 3) + i % 3];
        }
    }

    // Registers a of four steps: codes less their zero points, exact.
    template <int kHalf>
    ROSAQ_DEVICE void decode_half(const unsigned char* weights, uint32_t (&a)[kSteps][4]) {
        if constexpr (Tile::kBits == 4) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) decode_4bit<T>(words_[kHalf * kSteps + step], a[step]);
        } else {
            uint32_t two[2][4];
#pragma unroll
            for (int sub = 0; sub < 2; ++sub) {
                if (sub == 0)
                    decode_3bit<T, false>(words_ + 3 * kHalf, two);
                else
                    decode_3bit<T, true>(words_ + 3 * kHalf, two);
#pragma unroll
                for (int i = 0; i < 8; ++i) a[2 * sub + i / 4][i % 4] = two[i / 4][i % 4];
            }
        }
        if (p_.zeros == nullptr) return;
#pragma unroll
        for (int sub = 0; sub < 2; ++sub) {
            const int group = (2 * kHalf + sub) * p_.groups_per_block / 4;
            const uint32_t two = *reinterpret_cast<const uint16_t*>(
                weights + Tile::kCodeBytes + Tile::kScaleBytes + group * kSlabRows + at_.row_in_slab());
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const auto pair = Number<T>::both(zero_shift<Tile::kBits>(two >> (8 * row) & 0xffu));
#pragma unroll
                for (int step = 2 * sub; step < 2 * sub + 2; ++step) {
                    a[step][row] = minus_zero<T>(a[step][row], pair);
                    a[step][row + 2] = minus_zero<T>(a[step][row + 2], pair);
                }
            }
        }
    }

    ROSAQ_DEVICE ptx::WgmmaMatrix matrix_of(int stage) const {
        return ptx::WgmmaMatrix(ring_.x(stage), Tile::kPieceBytes, 8 * kLoadBytes);
    }

    ROSAQ_DEVICE void multiply(const ptx::WgmmaMatrix& x, float (&kept)[kSums], const uint32_t (&a)[4]) {
        ptx::wgmma_m64k16<T, Tile::kTokens>(kept, a, x, adds_);
        adds_ = true;
    }

    template <int kHalf>
    ROSAQ_DEVICE void multiply_half(const unsigned char* weights, const ptx::WgmmaMatrix& x,
                                    float (&sums)[kSums], float (&kept)[kSums],
                                    const uint32_t (&a)[kSteps][4]) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int sub = 2 * kHalf + step / 2;
            multiply(x.at(sub * Tile::kPartBytes + step % 2 * 2 * Tile::kPieceBytes), kept, a[step]);
            if (!kEndsWithin || (step + 1) % (kGroups == Groups::kOf32 ? 2 : 4) != 0) continue;
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            load_scales(weights, kGroups == Groups::kOf32 ? sub : kHalf);
            scale(sums, kept);
            ptx::settle(kept);
            ptx::wgmma_fence();
        }
        if (!kEndsWithin) ptx::wgmma_commit();
    }

    // sums += C s^T for 32 directions.
    ROSAQ_DEVICE void salient_tile(StagePlace<Tile>& place, float (&sums)[kSums]) {
        float product[kSums];
        uint32_t a[2][4];
        wait_for(ring_.has_weights(place.stage), place.parity);
        wait_for(ring_.has_x(place.stage), place.parity);
        const unsigned char* record = ring_.weights(place.stage) + at_.record * Tile::kSalientRecordBytes;
        const DType dtype = p_.salient_weight.dtype;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const unsigned char* from =
                record + salient_slot(at_.gid * 4 + 2 * at_.row_tile + row) * (kSalientCols * 2);
            const uint4 v = *reinterpret_cast<const uint4*>(from + at_.tid * kLoadBytes);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t low = bits16_in<T>(static_cast<uint16_t>(words[i]), dtype);
                const uint32_t high = bits16_in<T>(static_cast<uint16_t>(words[i] >> 16), dtype);
                a[i / 2][i % 2 * 2 + row] = low | high << 16;
            }
        }
        const ptx::WgmmaMatrix s = matrix_of(place.stage);
        ptx::wgmma_fence();
        ptx::wgmma_m64k16<T, Tile::kTokens>(product, a[0], s, false);
        ptx::wgmma_m64k16<T, Tile::kTokens>(product, a[1], s.at(2 * Tile::kPieceBytes), true);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += product[i];
        release(place.stage);
        place.advance();
    }

    const GemmParams& p_;
    const StageRing<Tile>& ring_;
    const ConsumerLane at_;
    bool adds_ = false;
    float scales_[2];
    uint32_t words_[2 * Tile::kBits];
};

}  // namespace rosaq::cuda
#endif
