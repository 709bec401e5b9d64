// t = x * blockdiag(one shared rotation) inside the block that multiplies it: no other block is waited for.
//
// The matrix lies in shared memory row by row, a row for each inner index, so that it comes by asynchronous
// copies; ldmatrix makes of it the fragments of MMAs with 16 columns of t as rows and the inner indices of an
// XFragment.
#pragma once

#include "multiply.cuh"
#include "rotate.cuh"

namespace rosaq::cuda {

template <class Tile>
class SliceRotation {
  public:
    using T = typename Tile::T;

    ROSAQ_DEVICE SliceRotation(const GemmParams& p, unsigned char* smem)
        : size_(p.rotation_size),
          row_bytes_(static_cast<int>(slice_row_bytes(p.rotation_size))),
          t_(smem + Tile::kSmemBytes),
          matrix_(t_ + Tile::kXBytes) {}

    // Starts copying the matrix: there at the first wait for a group of copies and the barrier behind it.
    ROSAQ_DEVICE void load(const GemmParams& p) const {
        const auto* from = static_cast<const uint16_t*>(p.rotation.data);
        const int row_chunks = size_ / 8, count = size_ * row_chunks;
        // Chunks that lie as they are needed can be copied; others go through registers.
        const bool is_plain =
            p.rotation.dtype == Number<T>::kDType && reinterpret_cast<uintptr_t>(from) % 16 == 0;
        for (int i = static_cast<int>(threadIdx.x); i < count; i += Tile::kThreads) {
            unsigned char* to = matrix_ + place(i / row_chunks, i % row_chunks);
            if (is_plain) {
                ptx::cp_async_16(to, from + static_cast<int64_t>(i) * 8);
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    reinterpret_cast<uint16_t*>(to)[j] = bits16_in<T>(from[i * 8 + j], p.rotation.dtype);
            }
        }
    }

    // The x stage rotated; ends with a barrier. What was returned before is overwritten.
    ROSAQ_DEVICE unsigned char* apply(const unsigned char* x, const Lane& at) const {
        constexpr int kColTiles = kBlockK / kTaskCols / Tile::kWarps;  // of a warp
        const int shift = size_ == 128 ? 7 : size_ == 64 ? 6 : 5, chunks = size_ / 32;
#pragma unroll
        for (int i = 0; i < kColTiles; ++i) {
            const int col0 = (at.warp * kColTiles + i) * kTaskCols;
            const int first_chunk = (col0 >> shift) * chunks, col = (col0 & (size_ - 1)) / 8;
            float sum[Tile::kTokenTiles][4] = {};
#pragma unroll 1  // four copies of it would crowd the instruction cache of kernels that rotate nothing
            for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    // Lane l points to row l % 8 of matrix l / 8: columns of t alternate, then halves of the
                    // step's k.
                    const int row =
                        chunk * 32 + at.lane % 8 / 2 * 8 + step * 4 + at.lane / 16 * 2 + at.lane % 2;
                    uint32_t a[4];
                    ptx::ldmatrix_x4_trans(a, matrix_ + place(row, col + at.lane / 8 % 2));
#pragma unroll
                    for (int t = 0; t < Tile::kTokenTiles; ++t) {
                        const XFragment b(x, t, (first_chunk + chunk) * 4, at);
                        ptx::mma_m16n8k16<T>(sum[t], a, b.step[step]);
                    }
                }
            }
            store(sum, col0 + at.gid, at);
        }
        __syncthreads();
        return t_;
    }

  private:
    // Byte offset of 8 columns of row `row`. The rows that ldmatrix reads together are pairs of neighbours, 8
    // apart: what the length of a row does for neighbours, the swizzle does for pairs.
    ROSAQ_DEVICE int place(int row, int chunk) const {
        return row * row_bytes_ + ((chunk ^ (row / 8 % 4 * 2)) << 4);
    }

    // Columns col and col + 8 of t.
    ROSAQ_DEVICE void store(const float (&sum)[Tile::kTokenTiles][4], int col, const Lane& at) const {
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int token = t * 8 + at.tid * 2 + j % 2, column = col + j / 2 * 8;
                unsigned char* to = t_ + x_chunk_offset(token, column / 8) + column % 8 * 2;
                *reinterpret_cast<T*>(to) = Number<T>::from_float(sum[t][j]);
            }
    }

    int size_, row_bytes_;
    unsigned char *t_, *matrix_;
};

}  // namespace rosaq::cuda
