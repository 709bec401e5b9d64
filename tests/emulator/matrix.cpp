#include "matrix.h"

#include <cstring>
#include <vector>

#include "../../csrc/common/half.h"

namespace emu {
namespace {

constexpr int kLanes = 32;

// Tables, since a warp converts 384 numbers per mma.
const float* floats_of(bool is_bf16) {
    static const auto make = [](float (*convert)(uint16_t)) {
        std::vector<float> table(1 << 16);
        for (uint32_t bits = 0; bits < table.size(); ++bits)
            table[bits] = convert(static_cast<uint16_t>(bits));
        return table;
    };
    static const std::vector<float> fp16 = make([](uint16_t h) { return rosaq::float_from_fp16(h); });
    static const std::vector<float> bf16 = make([](uint16_t h) { return rosaq::float_from_bf16(h); });
    return is_bf16 ? bf16.data() : fp16.data();
}

const MmaOperands& mma_operands(void* const* lanes, int lane) {
    return *static_cast<const MmaOperands*>(lanes[lane]);
}

}  // namespace

void load_matrices(void* const* lanes, int num_matrices, bool transposed) {
    for (int i = 0; i < num_matrices; ++i) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(matrix[row], static_cast<const LdmatrixOperands*>(lanes[8 * i + row])->row, 16);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            const uint32_t first = transposed ? matrix[column][row] : matrix[row][column];
            const uint32_t second = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
            static_cast<const LdmatrixOperands*>(lanes[lane])->r[i] = first | second << 16;
        }
    }
}

// Products and sums in double, rounded to float32 once. Tensor cores align and truncate: close, never the
// same bits.
void multiply_m16n8k16(void* const* lanes, bool is_bf16) {
    const float* value = floats_of(is_bf16);
    double a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const MmaOperands& o = mma_operands(lanes, lane);
        const int group = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[group + 8 * (i % 2)][column + 8 * (i / 2) + half] = value[o.a[i] >> (16 * half) & 0xffffu];
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half)
                b[column + 8 * i + half][group] = value[o.b[i] >> (16 * half) & 0xffffu];
    }
    double sum[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < kLanes; ++lane) {
        float* d = mma_operands(lanes, lane).d;
        for (int i = 0; i < 4; ++i)
            d[i] = static_cast<float>(d[i] + sum[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
    }
}

// Of every 8 columns of b what an m16n8k16 computes; each lane's own descriptor is taken, and they are the
// same.
void multiply_m16k16(void* const* lanes, int n, bool is_bf16) {
    const auto operands = [&](int lane) { return static_cast<const WgmmaOperands*>(lanes[lane]); };
    for (int tile = 0; tile < n / 8; ++tile) {
        uint32_t b[kLanes][2];
        MmaOperands parts[kLanes];
        void* pointers[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const WgmmaOperands& o = *operands(lane);
            for (int half = 0; half < 2; ++half)
                std::memcpy(&b[lane][half],
                            o.b + tile * o.n_step + half * o.k_step + lane / 4 * 16 + lane % 4 * 4, 4);
            parts[lane] = {o.sums + tile * 4, o.a, b[lane]};
            pointers[lane] = &parts[lane];
        }
        multiply_m16n8k16(pointers, is_bf16);
    }
}

}  // namespace emu
