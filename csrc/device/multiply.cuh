// One K-tile times x: dequantise in registers, multiply on the tensor cores, scale the sums.
//
// Weights enter the MMA as exact integers. Their scale is applied in float32 to the sum over a group, which
// costs less than scaling every weight while there are few tokens, and rounds nothing: x = identity gives
// back W exactly.
#pragma once

#include "dequant.cuh"
#include "tile.cuh"

namespace rosaq::cuda {

// sum[row tile][token tile of the warp][MMA register]: row 4 * gid + 2 * row_tile + register / 2, token 2 *
// tid + register % 2.
template <class Tile>
struct Accumulator {
    float sum[2][Tile::kWarpTiles][4];

    ROSAQ_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int t = 0; t < Tile::kWarpTiles; ++t)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][t][j] = 0.0f;
    }
};

// Registers of two MMA steps (32 k) of one token tile: 16 bytes of x.
struct XFragment {
    uint32_t step[2][2];
    ROSAQ_DEVICE XFragment(const unsigned char* x, int token_tile, int chunk, const Lane& at) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(x + x_chunk_offset(token_tile * 8 + at.gid, chunk + at.tid));
        step[0][0] = v.x, step[0][1] = v.y, step[1][0] = v.z, step[1][1] = v.w;
    }
};

// Scales of a lane's four rows for one group.
struct RowScales {
    float of[4];
    ROSAQ_DEVICE RowScales(const unsigned char* scales, int group, bool is_bf16, const Lane& at) {
        const uint2 v = *reinterpret_cast<const uint2*>(scales + (group * kRecordRows + at.gid * 4) * 2);
        of[0] = float_of_16(v.x & 0xffffu, is_bf16), of[1] = float_of_16(v.x >> 16, is_bf16);
        of[2] = float_of_16(v.y & 0xffffu, is_bf16), of[3] = float_of_16(v.y >> 16, is_bf16);
    }
};

template <class Tile>
ROSAQ_DEVICE void subtract_zeros(const GemmParams& p, uint32_t (&a)[2][2][4], const unsigned char* zeros,
                                 int group, const Lane& at) {
    using T = typename Tile::T;
    // A symmetric blob has none: subtracting what is no shift costs less than a branch in the middle of the
    // multiplies.
    constexpr uint32_t kNoShift = 0x01010101u << (Tile::kBits - 1);
    uint32_t four = kNoShift;
    if (p.zeros != nullptr)
        four = *reinterpret_cast<const uint32_t*>(zeros + group * kRecordRows + at.gid * 4);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
        const int zero = static_cast<int>(four >> (8 * row) & 0xffu) - (1 << (Tile::kBits - 1));
        const auto pair = Number<T>::both(static_cast<float>(zero));
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            a[row / 2][step][row % 2] = minus_zero<T>(a[row / 2][step][row % 2], pair);
            a[row / 2][step][row % 2 + 2] = minus_zero<T>(a[row / 2][step][row % 2 + 2], pair);
        }
    }
}

ROSAQ_DEVICE void add_scaled(float (&sum)[4], const float (&part)[4], const RowScales& scales, int row_tile) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += scales.of[row_tile * 2 + j / 2] * part[j];
}

// One block of k for the 32 rows of a warp. With few tokens the sums of a whole group are kept and scaled
// once; with many there are no registers for that, and every 32 k are scaled.
template <class Tile>
class BlockProduct {
  public:
    using T = typename Tile::T;
    static constexpr bool kKeepsGroup = Tile::kTokenTiles <= 2;

    ROSAQ_DEVICE BlockProduct(const GemmParams& p, const unsigned char* weights, const unsigned char* x,
                              const Lane& at)
        : p_(p), scales_(weights + Tile::kRecordBytes), x_(x), at_(at), first_tile_(at.token_tile<Tile>()) {
        group_shift_ = p.groups_per_block == 4 ? 0 : p.groups_per_block == 2 ? 1 : 2;
#pragma unroll
        for (int plane = 0; plane < Tile::kBits; ++plane) {
            const uint4 v =
                *reinterpret_cast<const uint4*>(weights + (plane * kLanes + at.lane) * kLoadBytes);
            words_[plane * 4] = v.x, words_[plane * 4 + 1] = v.y, words_[plane * 4 + 2] = v.z,
                           words_[plane * 4 + 3] = v.w;
        }
    }

    // acc += W[32 rows, 32 k] x^T for part kSub of the block; to be called for 0, 1, 2, 3.
    template <int kSub>
    ROSAQ_DEVICE void add(Accumulator<Tile>& acc) {
        uint32_t a[2][2][4];
        decode<T, Tile::kBits, kSub>(words_, a);
        const int group = kSub >> group_shift_;
        if constexpr (!Tile::kSymmetric) subtract_zeros<Tile>(p_, a, scales_ + Tile::kScaleBytes, group, at_);
        if constexpr (kKeepsGroup) {
#pragma unroll
            for (int t = 0; t < Tile::kWarpTiles; ++t) multiply<false>(a, t, kept_[0][t], kept_[1][t], kSub);
            if (((kSub + 1) & ((1 << group_shift_) - 1)) != 0) return;
            const RowScales scales(scales_, group, p_.scale_is_bf16, at_);
#pragma unroll
            for (int t = 0; t < Tile::kWarpTiles; ++t)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    add_scaled(acc.sum[i][t], kept_[i][t], scales, i);
#pragma unroll
                    for (int j = 0; j < 4; ++j) kept_[i][t][j] = 0.0f;
                }
        } else {
            const RowScales scales(scales_, group, p_.scale_is_bf16, at_);
#pragma unroll
            for (int t = 0; t < Tile::kWarpTiles; ++t) {
                float low[4], high[4];
                multiply<true>(a, t, low, high, kSub);
                add_scaled(acc.sum[0][t], low, scales, 0);
                add_scaled(acc.sum[1][t], high, scales, 1);
            }
        }
    }

  private:
    // low and high, the sums of the two row tiles: added to, or set if this is where they start.
    template <bool kFirst>
    ROSAQ_DEVICE void multiply(const uint32_t (&a)[2][2][4], int token_tile, float (&low)[4],
                               float (&high)[4], int sub) const {
        const XFragment b(x_, first_tile_ + token_tile, sub * 4, at_);
        if constexpr (kFirst) {
            ptx::mma_m16n8k16_first<T>(low, a[0][0], b.step[0]);
            ptx::mma_m16n8k16_first<T>(high, a[1][0], b.step[0]);
        } else {
            ptx::mma_m16n8k16<T>(low, a[0][0], b.step[0]);
            ptx::mma_m16n8k16<T>(high, a[1][0], b.step[0]);
        }
        ptx::mma_m16n8k16<T>(low, a[0][1], b.step[1]);
        ptx::mma_m16n8k16<T>(high, a[1][1], b.step[1]);
    }

    const GemmParams& p_;
    const unsigned char* scales_;
    const unsigned char* x_;
    const Lane& at_;
    int first_tile_, group_shift_;
    uint32_t words_[4 * Tile::kBits];
    float kept_[2][kKeepsGroup ? Tile::kWarpTiles : 1][4] = {};
};

template <class Tile>
ROSAQ_DEVICE void multiply_block(const GemmParams& p, const unsigned char* weights, const unsigned char* x,
                                 Accumulator<Tile>& acc, const Lane& at) {
    BlockProduct<Tile> product(p, weights, x, at);
    product.template add<0>(acc);
    product.template add<1>(acc);
    product.template add<2>(acc);
    product.template add<3>(acc);
}

// acc += C[32 rows of the warp, 32 directions] s^T.
template <class Tile>
ROSAQ_DEVICE void multiply_salient(const GemmParams& p, const unsigned char* weights, const unsigned char* s,
                                   Accumulator<Tile>& acc, const Lane& at) {
    using T = typename Tile::T;
    uint32_t row[4][4];  // the lane's four rows x 8 directions
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int slot = salient_slot(at.gid * 4 + j);
        const uint4 v =
            *reinterpret_cast<const uint4*>(weights + slot * (kSalientCols * 2) + at.tid * kLoadBytes);
        row[j][0] = v.x, row[j][1] = v.y, row[j][2] = v.z, row[j][3] = v.w;
        if (p.salient_weight.dtype != Number<T>::kDType) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const uint32_t low = bits16_in<T>(static_cast<uint16_t>(row[j][w]), p.salient_weight.dtype);
                const uint32_t high =
                    bits16_in<T>(static_cast<uint16_t>(row[j][w] >> 16), p.salient_weight.dtype);
                row[j][w] = low | high << 16;
            }
        }
    }
#pragma unroll
    for (int t = 0; t < Tile::kWarpTiles; ++t) {
        const XFragment b(s, at.token_tile<Tile>() + t, 0, at);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const uint32_t a[4] = {row[2 * i][2 * step], row[2 * i + 1][2 * step],
                                       row[2 * i][2 * step + 1], row[2 * i + 1][2 * step + 1]};
                ptx::mma_m16n8k16<T>(acc.sum[i][t], a, b.step[step]);
            }
    }
}

}  // namespace rosaq::cuda
