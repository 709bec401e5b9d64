// One K-tile times x: dequantise in registers, multiply on the tensor cores, scale the sums.
//
// Weights enter the MMA as exact integers. Their scale is applied in float32 to the sum over a group, which
// costs less than scaling every weight while there are few tokens, and rounds nothing: x = identity gives
// back W exactly.
#pragma once

#include "dequant.cuh"
#include "tile.cuh"

namespace rosaq::cuda {

// sum[row tile][token tile][MMA register]: row 4 * gid + 2 * row_tile + register / 2, token 2 * tid +
// register % 2.
template <int kTiles>
struct Accumulator {
    float sum[2][kTiles][4];

    ROSAQ_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][t][j] = 0.0f;
    }
};

// Registers of two MMA steps (32 k) of one token tile: 16 bytes of x.
struct XFragment {
    uint32_t step[2][2];
    ROSAQ_DEVICE explicit XFragment(const uint4& v) {
        step[0][0] = v.x, step[0][1] = v.y, step[1][0] = v.z, step[1][1] = v.w;
    }
    ROSAQ_DEVICE XFragment(const unsigned char* x, int token_tile, int chunk, const Lane& at)
        : XFragment(
              *reinterpret_cast<const uint4*>(x + x_chunk_offset(token_tile * 8 + at.gid, chunk + at.tid))) {}
};

// A K-tile's x in an x stage: fragments of (token tile, number of 32 k).
struct StagedX {
    const unsigned char* x;
    const Lane& at;
    ROSAQ_DEVICE XFragment operator()(int token_tile, int sub) const {
        return XFragment(x, token_tile, sub * 4, at);
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
    constexpr uint32_t kNoShift = 0x01010101u << Tile::kBits;
    uint32_t four = kNoShift;
    if (p.zeros != nullptr)
        four = *reinterpret_cast<const uint32_t*>(zeros + group * kRecordRows + at.gid * 4);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
        const auto pair = Number<T>::both(zero_shift<Tile::kBits>(four >> (8 * row) & 0xffu));
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

// One block of k for the 32 rows of a warp and up to 16 tokens. The sums of a whole group are kept, and
// scaled once.
template <class Tile, class X>
class BlockProduct {
  public:
    using T = typename Tile::T;

    ROSAQ_DEVICE BlockProduct(const GemmParams& p, const unsigned char* weights, const X& x, const Lane& at)
        : p_(p), scales_(weights + Tile::kRecordBytes), x_(x), at_(at) {
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
    ROSAQ_DEVICE void add(Accumulator<Tile::kTokenTiles>& acc) {
        uint32_t a[2][2][4];
        decode<T, Tile::kBits, kSub>(words_, a);
        const int group = kSub >> group_shift_;
        if constexpr (!Tile::kSymmetric) subtract_zeros<Tile>(p_, a, scales_ + Tile::kScaleBytes, group, at_);
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t) multiply(a, t, kSub);
        if (((kSub + 1) & ((1 << group_shift_) - 1)) != 0) return;
        const RowScales scales(scales_, group, p_.scale_is_bf16, at_);
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                add_scaled(acc.sum[i][t], kept_[i][t], scales, i);
#pragma unroll
                for (int j = 0; j < 4; ++j) kept_[i][t][j] = 0.0f;
            }
    }

  private:
    ROSAQ_DEVICE void multiply(const uint32_t (&a)[2][2][4], int token_tile, int sub) {
        const XFragment b = x_(token_tile, sub);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) ptx::mma_m16n8k16<T>(kept_[i][token_tile], a[i][step], b.step[step]);
    }

    const GemmParams& p_;
    const unsigned char* scales_;
    const X& x_;
    const Lane& at_;
    int group_shift_;
    uint32_t words_[4 * Tile::kBits];
    float kept_[2][Tile::kTokenTiles][4] = {};
};

// acc += W[32 rows of the warp, 128 k] x^T.
template <class Tile, class X>
ROSAQ_DEVICE void multiply_record(const GemmParams& p, const unsigned char* weights, const X& x,
                                  Accumulator<Tile::kTokenTiles>& acc, const Lane& at) {
    BlockProduct<Tile, X> product(p, weights, x, at);
    product.template add<0>(acc);
    product.template add<1>(acc);
    product.template add<2>(acc);
    product.template add<3>(acc);
}

}  // namespace rosaq::cuda
