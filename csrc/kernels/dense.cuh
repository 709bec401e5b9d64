// For many tokens: the weight as a dense matrix, and what a plain matmul leaves out. Bound by the bytes
// written.
#pragma once

#include "../device/dequant.cuh"
#include "repack_common.cuh"

namespace rosaq::cuda {

// 32 k of a lane's four rows, 8 of them each, to W in T, rounded once.
template <class T, int kBits, int kSub>
ROSAQ_DEVICE void dequantize_rows(const uint8_t* blob, const BlobShape& shape, bool scale_is_bf16,
                                  const uint32_t (&words)[4 * kBits], const RecordPlace& at, const Lane& lane,
                                  T* weight) {
    const BlobLayout& l = shape.layout;
    uint32_t a[2][2][4];
    decode<T, kBits, kSub>(words, a);
    const int64_t k = at.k0 + kSub * 32 + lane.tid * 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int64_t row = at.row0 + lane.gid * 4 + j;
        if (row >= shape.n || k >= shape.k) continue;
        const int64_t padded = l.groups == 1 ? 0 : quotient(k, l.group_size);
        const int64_t group = (row / kSlabRows * l.groups + padded) * kSlabRows + row % kSlabRows;
        const float scale =
            float_of_16(reinterpret_cast<const uint16_t*>(blob + l.scales_offset)[group], scale_is_bf16);
        const float shift = shape.symmetric ? 0.0f : zero_shift<kBits>(blob[l.zeros_offset + group]);
        uint32_t out[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const uint32_t codes = a[j / 2][pair / 2][pair % 2 * 2 + j % 2];
            float w[2];
#pragma unroll
            for (int high = 0; high < 2; ++high) {
                const T code = bits_as<T>(static_cast<uint16_t>(codes >> (16 * high)));
                w[high] = (Number<T>::to_float(code) - shift) * scale;
            }
            out[pair] = pair_of<T>(w[0], w[1]);
        }
        *reinterpret_cast<uint4*>(weight + row * shape.k + k) = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

// W [n, k] in T: what fused_gemm gives for x = identity.
template <class T, int kBits>
__global__ void __launch_bounds__(kUnitThreads)
    dequantize_kernel(const uint8_t* blob, BlobShape shape, bool scale_is_bf16, T* weight) {
    const BlobLayout& l = shape.layout;
    const int64_t record = global_thread() / kLanes;
    if (record >= l.slabs * l.k_blocks * kSlabRecords) return;
    const Lane lane(static_cast<int>(threadIdx.x));
    const RecordPlace at(l, record);
    const uint8_t* from = blob + l.codes_offset + record * l.record_bytes;
    uint32_t words[4 * kBits];
#pragma unroll
    for (int plane = 0; plane < kBits; ++plane) {
        const uint4 v = ptx::ld_global_nc_16(from + word_offset(lane.lane, plane * 4));
        words[plane * 4] = v.x, words[plane * 4 + 1] = v.y, words[plane * 4 + 2] = v.z,
                      words[plane * 4 + 3] = v.w;
    }
    dequantize_rows<T, kBits, 0>(blob, shape, scale_is_bf16, words, at, lane, weight);
    dequantize_rows<T, kBits, 1>(blob, shape, scale_is_bf16, words, at, lane, weight);
    dequantize_rows<T, kBits, 2>(blob, shape, scale_is_bf16, words, at, lane, weight);
    dequantize_rows<T, kBits, 3>(blob, shape, scale_is_bf16, words, at, lane, weight);
}

// Rows of W that a block of add_salient_columns_kernel has.
constexpr int kSalientRows = 32;

// weight[:, index[j]] += sum of C[:, i] over all i of the same index, in float32. One thread a column of C
// and kSalientRows rows (blockIdx.y); of columns with the same index the first adds them all.
template <class T>
__global__ void __launch_bounds__(kUnitThreads)
    add_salient_columns_kernel(SalientColumns salient, T* weight) {
    const int64_t j = global_thread();
    if (j >= salient.r) return;
    const int64_t k = salient.index[j];
    bool is_alone = true, has_first_column = false;
    int64_t first_missing = salient.r;
    for (int64_t i = 0; i < salient.r; ++i) {
        const int64_t other = salient.index[i];
        has_first_column |= other == 0;
        if ((other < 0 || other >= salient.k) && first_missing == salient.r) first_missing = i;
        if (i == j || other != k) continue;
        if (i < j) return;
        is_alone = false;
    }
    // A column that does not exist shows as in the fused kernel, NaN for every token. Whoever has column 0
    // writes it there, nobody else.
    const bool has_missing = first_missing < salient.r, exists = k >= 0 && k < salient.k;
    const bool poisons = has_missing && (k == 0 || (j == first_missing && !has_first_column));
    if (!exists && !poisons) return;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kSalientRows;
#pragma unroll 8
    for (int64_t row = first; row < first + kSalientRows; ++row) {
        if (row >= salient.n) continue;
        if (poisons) {
            weight[row * salient.k] = bits_as<T>(uint16_t{0x7fff});
            continue;
        }
        float sum = load_float(salient.weight, row * salient.r + j);
        for (int64_t i = is_alone ? salient.r : j + 1; i < salient.r; ++i)
            if (salient.index[i] == k) sum += load_float(salient.weight, row * salient.r + i);
        T& w = weight[row * salient.k + k];
        w = Number<T>::from_float(Number<T>::to_float(w) + sum);
    }
}

// y [m, n] += other (null: nothing) + bias of the column, rounded once. One thread a column, blockIdx.y
// shares out rows.
template <class T>
__global__ void __launch_bounds__(kUnitThreads)
    add_rows_kernel(T* y, const T* other, Buffer bias, int64_t m, int64_t n) {
    const int64_t col = global_thread();
    if (col >= n) return;
    const float shift = bias.data != nullptr ? load_float(bias, col) : 0.0f;
    for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
        T& at = y[row * n + col];
        float value = Number<T>::to_float(at) + shift;
        if (other != nullptr) value += Number<T>::to_float(other[row * n + col]);
        at = Number<T>::from_float(value);
    }
}

}  // namespace rosaq::cuda
