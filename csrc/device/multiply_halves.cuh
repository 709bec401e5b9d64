// One K-tile times more than 32 tokens: the two warps of a record take half of its k each, for all tokens.
//
// A warp keeps what it decoded in registers while the token tiles go by. When the row tile is done the two
// warps exchange half of their sums.
#pragma once

#include "multiply.cuh"

namespace rosaq::cuda {

// W[32 rows, 64 k of the half] times x^T, 32 k at a time: decoded, multiplied with all tokens, scaled.
// Keeping the sums of 64 k would scale half as often, but takes registers that some architectures do not have
// left.
template <class Tile>
class HalfProduct {
  public:
    using T = typename Tile::T;

    ROSAQ_DEVICE HalfProduct(const GemmParams& p, const unsigned char* weights, const unsigned char* x,
                             const Lane& at)
        : scales_(weights + Tile::kRecordBytes), x_(x), p_(p), at_(at), half_(at.half<Tile>()) {
#pragma unroll
        for (int word = 0; word < 2 * Tile::kBits; word += 2) {
            const int place = half_ * 2 * Tile::kBits + word;
            const uint2 v = *reinterpret_cast<const uint2*>(
                weights + (place / 4 * kLanes + at.lane) * kLoadBytes + place % 4 * 4);
            words_[word] = v.x, words_[word + 1] = v.y;
        }
    }

    // acc += the product of 32 k, number kSub (0, 1) of the half.
    template <int kSub>
    ROSAQ_DEVICE void add(Accumulator<Tile::kTokenTiles>& acc) const {
        const int sub = 2 * half_ + kSub, group = sub * p_.groups_per_block / 4;
        uint32_t a[2][2][4];
        decode<T, Tile::kBits, kSub>(words_, a);
        if constexpr (!Tile::kSymmetric) subtract_zeros<Tile>(p_, a, scales_ + Tile::kScaleBytes, group, at_);
        const RowScales scales(scales_, group, p_.scale_is_bf16, at_);
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
            const XFragment b(x_, t, sub * 4, at_);
            float sum[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                ptx::mma_m16n8k16_first<T>(sum[i], a[i][0], b.step[0]);
                ptx::mma_m16n8k16<T>(sum[i], a[i][1], b.step[1]);
                add_scaled(acc.sum[i][t], sum[i], scales, i);
            }
            // Keeps loads of x, and with them the sums, of all tokens from being started at once.
            if (t % 4 == 3) __syncwarp();
        }
    }

  private:
    const unsigned char *scales_, *x_;
    const GemmParams& p_;
    const Lane& at_;
    int half_;
    uint32_t words_[4 * Tile::kBits];  // the half's: the first half of them
};

template <class Tile>
ROSAQ_DEVICE void multiply_block(const GemmParams& p, const unsigned char* weights, const unsigned char* x,
                                 Accumulator<Tile::kTokenTiles>& acc, const Lane& at) {
    if constexpr (Tile::kHalves == 2) {
        const Lane again(ptx::opaque(static_cast<int>(threadIdx.x)));
        const HalfProduct<Tile> product(p, weights, x, again);
        product.template add<0>(acc);
        product.template add<1>(acc);
    } else {
        multiply_record<Tile>(p, weights, StagedX{x, at}, acc, at);
    }
}

// Of 32 rows of C the lane's four: all of its 8 directions, or the 4 that its half of the warps takes.
template <class Tile>
struct SalientRows {
    static constexpr int kSteps = 2 / Tile::kHalves;
    uint32_t row[4][2 * kSteps];

    ROSAQ_DEVICE SalientRows(const GemmParams& p, const unsigned char* weights, const Lane& at) {
        using T = typename Tile::T;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const unsigned char* slot = weights + salient_slot(at.gid * 4 + j) * (kSalientCols * 2) +
                                        at.tid * kLoadBytes + at.half<Tile>() * 8;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const uint2 v = *reinterpret_cast<const uint2*>(slot + step * 8);
                row[j][2 * step] = v.x, row[j][2 * step + 1] = v.y;
            }
            if (p.salient_weight.dtype == Number<T>::kDType) continue;
#pragma unroll
            for (int w = 0; w < 2 * kSteps; ++w) {
                const uint32_t low = bits16_in<T>(static_cast<uint16_t>(row[j][w]), p.salient_weight.dtype);
                const uint32_t high =
                    bits16_in<T>(static_cast<uint16_t>(row[j][w] >> 16), p.salient_weight.dtype);
                row[j][w] = low | high << 16;
            }
        }
    }

    // The sums of both row tiles += C s^T for one step of 16 directions.
    ROSAQ_DEVICE void add(float (&low)[4], float (&high)[4], int step, const uint32_t (&b)[2]) const {
        const uint32_t first[4] = {row[0][2 * step], row[1][2 * step], row[0][2 * step + 1],
                                   row[1][2 * step + 1]};
        const uint32_t second[4] = {row[2][2 * step], row[3][2 * step], row[2][2 * step + 1],
                                    row[3][2 * step + 1]};
        ptx::mma_m16n8k16<typename Tile::T>(low, first, b);
        ptx::mma_m16n8k16<typename Tile::T>(high, second, b);
    }
};

// acc += C[32 rows of the warp, 32 directions] s^T; each of two halves takes half of the directions.
template <class Tile>
ROSAQ_DEVICE void multiply_salient(const GemmParams& p, const unsigned char* weights, const unsigned char* s,
                                   Accumulator<Tile::kTokenTiles>& acc) {
    const Lane again(ptx::opaque(static_cast<int>(threadIdx.x)));  // rare: nothing of it is to be kept
    const SalientRows<Tile> rows(p, weights, again);
#pragma unroll
    for (int t = 0; t < Tile::kTokenTiles; ++t) {
        const unsigned char* tokens =
            s + x_chunk_offset(t * 8 + again.gid, again.tid) + again.half<Tile>() * 8;
#pragma unroll
        for (int step = 0; step < SalientRows<Tile>::kSteps; ++step) {
            const uint2 v = *reinterpret_cast<const uint2*>(tokens + step * 8);
            const uint32_t b[2] = {v.x, v.y};
            rows.add(acc.sum[0][t], acc.sum[1][t], step, b);
        }
    }
}

// own = sums of token tiles kTaker * kWarpTiles and on, over both halves of a record, for the warp of half
// kTaker; through `shared`. To be called by all threads of the block.
template <class Tile, int kTaker>
ROSAQ_DEVICE void hand_over(const Accumulator<Tile::kTokenTiles>& acc, Accumulator<Tile::kWarpTiles>& own,
                            unsigned char* shared, const Lane& at) {
    constexpr int kTiles = Tile::kWarpTiles;
    auto* const pieces =
        reinterpret_cast<float4*>(shared) + at.record<Tile>() * kTiles * 2 * kLanes + at.lane;
    __syncthreads();
    if (at.half<Tile>() != kTaker) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                const float (&v)[4] = acc.sum[i][kTaker * kTiles + t];
                pieces[(i * kTiles + t) * kLanes] = make_float4(v[0], v[1], v[2], v[3]);
            }
    }
    __syncthreads();
    if (at.half<Tile>() == kTaker) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                const float4 v = pieces[(i * kTiles + t) * kLanes];
                const float (&mine)[4] = acc.sum[i][kTaker * kTiles + t];
                own.sum[i][t][0] = mine[0] + v.x, own.sum[i][t][1] = mine[1] + v.y;
                own.sum[i][t][2] = mine[2] + v.z, own.sum[i][t][3] = mine[3] + v.w;
            }
    }
}

// A record's sums over its two halves, of the token tiles that this warp brings to y; through `shared`,
// kXBytes that nobody reads any more. To be called by all threads of the block.
template <class Tile>
ROSAQ_DEVICE Accumulator<Tile::kWarpTiles> add_halves(const Accumulator<Tile::kTokenTiles>& acc,
                                                      unsigned char* shared) {
    if constexpr (Tile::kHalves == 1) {
        return acc;
    } else {
        const Lane at(ptx::opaque(static_cast<int>(threadIdx.x)));
        Accumulator<Tile::kWarpTiles> own;
        hand_over<Tile, 0>(acc, own, shared, at);
        hand_over<Tile, 1>(acc, own, shared, at);
        return own;
    }
}

}  // namespace rosaq::cuda
