// t = x * blockdiag(one shared rotation) inside the block that multiplies it: no other block is waited for.
//
// The matrix lies in shared memory as the fragments of MMAs with 16 columns of t as rows and 32 inner indices
// as two steps: [column tile][32 indices][step][lane] x 16 bytes. A lane's rows gid and gid + 8 are columns 2
// * gid and the next, so that it stores pairs; its inner indices are those of an XFragment.
#pragma once

#include "multiply.cuh"
#include "rotate.cuh"

namespace rosaq::cuda {

template <class Tile>
class SliceRotation {
  public:
    using T = typename Tile::T;

    ROSAQ_DEVICE SliceRotation(const GemmParams& p, unsigned char* smem)
        : size_(p.rotation_size), t_(smem + Tile::kSmemBytes), fragments_(t_ + Tile::kXBytes) {}

    // Lays the matrix out; the next barrier makes it visible.
    ROSAQ_DEVICE void load(const GemmParams& p) const {
        const SkinnyMatrix w{static_cast<const uint16_t*>(p.rotation.data), size_, size_, p.rotation.dtype};
        const int chunks = size_ / 32, count = size_ / kTaskCols * chunks * 2 * kLanes;
#pragma unroll 4  // many loads under way
        for (int i = static_cast<int>(threadIdx.x); i < count; i += Tile::kThreads) {
            const Lane at(i % kLanes);
            const int step = i / kLanes % 2, chunk = i / (2 * kLanes) % chunks,
                      tile = i / (2 * kLanes) / chunks;
            const int row = chunk * 32 + at.tid * 8 + step * 4, col = tile * kTaskCols + at.gid * 2;
            uint32_t rows[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) rows[j] = two_columns<T>(w, row + j, col);
            *reinterpret_cast<uint4*>(fragments_ + i * kLoadBytes) =
                make_uint4(ptx::prmt(rows[0], rows[1], 0x5410), ptx::prmt(rows[0], rows[1], 0x7632),
                           ptx::prmt(rows[2], rows[3], 0x5410), ptx::prmt(rows[2], rows[3], 0x7632));
        }
    }

    // The x stage rotated; ends with a barrier. What was returned before is overwritten.
    ROSAQ_DEVICE unsigned char* apply(const unsigned char* x, const Lane& at) const {
        constexpr int kColTiles = kBlockK / kTaskCols / Tile::kWarps;  // of a warp
        const int shift = size_ == 128 ? 7 : size_ == 64 ? 6 : 5, chunks = size_ / 32;
#pragma unroll
        for (int i = 0; i < kColTiles; ++i) {
            const int col0 = (at.warp * kColTiles + i) * kTaskCols;
            const int first_chunk = (col0 >> shift) * chunks, tile = (col0 & (size_ - 1)) / kTaskCols;
            const unsigned char* from = fragments_ + (tile * chunks * 2 * kLanes + at.lane) * kLoadBytes;
            float sum[Tile::kTokenTiles][4] = {};
#pragma unroll 1  // four copies of it would crowd the instruction cache of kernels that rotate nothing
            for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const uint4 v = *reinterpret_cast<const uint4*>(from);
                    const uint32_t a[4] = {v.x, v.y, v.z, v.w};
                    from += kLanes * kLoadBytes;
#pragma unroll
                    for (int t = 0; t < Tile::kTokenTiles; ++t) {
                        const XFragment b(x, t, (first_chunk + chunk) * 4, at);
                        ptx::mma_m16n8k16<T>(sum[t], a, b.step[step]);
                    }
                }
            }
            store(sum, col0 + at.gid * 2, at);
        }
        __syncthreads();
        return t_;
    }

  private:
    ROSAQ_DEVICE void store(const float (&sum)[Tile::kTokenTiles][4], int col, const Lane& at) const {
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const uint32_t low = bits_as<uint16_t>(Number<T>::from_float(sum[t][e]));
                const uint32_t high = bits_as<uint16_t>(Number<T>::from_float(sum[t][2 + e]));
                unsigned char* to = t_ + x_chunk_offset(t * 8 + at.tid * 2 + e, col / 8) + col % 8 * 2;
                *reinterpret_cast<uint32_t*>(to) = low | high << 16;
            }
    }

    int size_;
    unsigned char *t_, *fragments_;
};

}  // namespace rosaq::cuda
