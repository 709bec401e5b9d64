// y[m,n] = t W^T + s C^T + bias for up to 8 tokens: text as it is generated.
//
// A launch lasts a few microseconds, so nothing waits for anything it does not need. The warps of a block
// share 32 rows and take turns over the K-tiles, each with a ring of its own for the weights; x is read where
// it is used. They meet once, to add up, and no other block has a part of their rows. Every block projects x
// on a salient basis by itself, each warp the k that it has anyway: a few columns cost less than waiting for
// them. A rotation is shared out over the grid, which meets while the first weights are on their way.
#pragma once

#include "../device/barrier.cuh"
#include "../device/epilogue.cuh"
#include "../device/few_directions.cuh"
#include "../device/load.cuh"
#include "../device/multiply_halves.cuh"
#include "../device/rotate.cuh"

namespace rosaq::cuda {

// The K-tiles of one record, for one warp: low-bit tiles first, then salient ones.
template <class Tile>
class RecordStream {
  public:
    ROSAQ_DEVICE RecordStream(const GemmParams& p, int record, const Lane& at)
        : p_(p), at_(at), slab_(record / kSlabRecords), record_(record % kSlabRecords) {}

    ROSAQ_DEVICE void fetch(int tile, unsigned char* to) const {
        if (tile >= p_.k_blocks) {
            const int row0 = (slab_ * kSlabRecords + record_) * kRecordRows;
            fetch_salient(p_, to, row0, (tile - p_.k_blocks) * kSalientCols);
            return;
        }
        const int64_t place = (static_cast<int64_t>(slab_) * p_.k_blocks + tile) * kSlabRecords + record_;
        const uint8_t* codes = p_.codes + place * Tile::kRecordBytes + at_.lane * kLoadBytes;
#pragma unroll
        for (int plane = 0; plane < Tile::kBits; ++plane) {
            const int offset = plane * kLanes * kLoadBytes;
            ptx::cp_async_16_first(to + offset + at_.lane * kLoadBytes, codes + offset);
        }
        // As WeightStream: scales by the lower half of the lanes, zeros by lanes of the upper.
        const bool is_scale = at_.lane < 16;
        const int piece = at_.lane % 16, shift = is_scale ? 2 : 1;  // 1 << shift pieces of 16 bytes a group
        if (piece >> shift >= p_.groups_per_block) return;
        if (!is_scale && (Tile::kSymmetric || p_.zeros == nullptr)) return;
        const int64_t group = static_cast<int64_t>(slab_) * p_.groups +
                              (p_.groups == 1 ? 0 : tile * p_.groups_per_block) + (piece >> shift);
        const uint8_t* side =
            (is_scale ? p_.scales : p_.zeros) + group * (is_scale ? kSlabRows * 2 : kSlabRows);
        ptx::cp_async_16(to + Tile::kRecordBytes + at_.lane * kLoadBytes,
                         side + ((record_ << shift) + (piece & ((1 << shift) - 1))) * kLoadBytes);
    }

  private:
    const GemmParams& p_;
    const Lane& at_;
    int slab_, record_;
};

// A K-tile's x of one lane, as the fragments of its MMAs: token gid, 8 k (or directions) of every 32.
template <class T>
struct HeldX {
    uint4 part[4];

    ROSAQ_DEVICE XFragment operator()(int, int sub) const { return XFragment(part[sub]); }

    ROSAQ_DEVICE void load(const GemmParams& p, const T* x, int tile, const Lane& at) {
        const T* token = x + static_cast<int64_t>(at.gid) * p.k;
#pragma unroll
        for (int sub = 0; sub < 4; ++sub) {
            const int k = tile * kBlockK + sub * 32 + at.tid * 8;
            part[sub] = make_uint4(0, 0, 0, 0);
            if (at.gid < p.m && k < p.k) part[sub] = *reinterpret_cast<const uint4*>(token + k);
        }
    }

    // Into part[0] the values of salient directions col0 + 8 * tid and on; a channel that does not exist
    // shows as NaN.
    ROSAQ_DEVICE void gather(const GemmParams& p, const T* x, int col0, const Lane& at) {
        const T* token = x + static_cast<int64_t>(at.gid) * p.k;
        // All indices, then all values: a branch between two loads, and the second waits for the first.
        const int first = col0 + at.tid * 8, count = at.gid < p.m ? p.r - first : 0;
        int k[8];
        uint32_t bits[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) k[i] = i < count ? p.salient_index[first + i] : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool exists = k[i] >= 0 && k[i] < p.k;
            bits[i] = exists ? 0u : 0x7fffu;
            if (exists && i < count) bits[i] = bits_as<uint16_t>(token[k[i]]);
        }
        part[0] = make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                             bits[6] | bits[7] << 16);
    }
};

template <class Tile, bool kRotates>
__global__ void __launch_bounds__(kFewMaxWarps* kLanes, 1) few_tokens_kernel(const GemmParams p) {
    static_assert(Tile::kTokenTiles == 1, "up to 8 tokens");
    using T = typename Tile::T;
    ROSAQ_DYN_SMEM(smem);
    const Lane at;
    const int warps = static_cast<int>(blockDim.x) / kLanes, record = static_cast<int>(blockIdx.x);
    const int tiles = p.schedule.k_tiles;
    constexpr int kAhead = kFewStages - 1;
    unsigned char* const ring = smem + at.warp * (kFewStages * Tile::kWarpBytes);

    const RecordStream<Tile> weights(p, record, at);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        if (at.warp + i * warps < tiles) weights.fetch(at.warp + i * warps, ring + i * Tile::kWarpBytes);
        ptx::cp_async_commit();
    }
    if constexpr (kRotates) {
        const int grid = static_cast<int>(gridDim.x);
        for (int task = at.warp * grid + record; task < p.k / kTaskCols; task += grid * warps)
            rotate_columns<Tile>(p, task * kTaskCols, at);
        GridBarrier barrier(p.counters, grid);
        barrier.arrive();
        barrier.wait();
    }
    const auto tokens = [&p] { return static_cast<const T*>(kRotates ? p.t : p.x); };  // kept in no register
    Accumulator<1> acc;
    acc.clear();
    float s_part[4] = {};
    int stage = 0, free_stage = kAhead;
    for (int tile = at.warp; tile < tiles; tile += warps) {
        HeldX<T> x;
        const bool is_salient = tile >= p.k_blocks;
        uint32_t basis[kBlockK / 32][4];
        if (is_salient)
            x.gather(p, tokens(), (tile - p.k_blocks) * kSalientCols, at);
        else
            x.load(p, tokens(), tile, at);
        if (p.projects_slices)  // then there are no salient tiles
#pragma unroll
            for (int sub = 0; sub < kBlockK / 32; ++sub) load_basis(p, tile, sub, basis[sub], at);
        ptx::cp_async_wait<kAhead - 1>();
        __syncwarp();
        if (tile + kAhead * warps < tiles)
            weights.fetch(tile + kAhead * warps, ring + free_stage * Tile::kWarpBytes);
        ptx::cp_async_commit();
        const unsigned char* const from = ring + stage * Tile::kWarpBytes;
        if (is_salient) {
            const SalientRows<Tile> rows(p, from, at);
            const XFragment s = x(0, 0);
            rows.add(acc.sum[0][0], acc.sum[1][0], 0, s.step[0]);
            rows.add(acc.sum[0][0], acc.sum[1][0], 1, s.step[1]);
        } else {
            if (p.projects_slices)
#pragma unroll
                for (int sub = 0; sub < kBlockK / 32; ++sub)
                    project_part<T, 1>(p, sub, x, basis[sub], s_part);
            multiply_record<Tile>(p, from, x, acc, at);
        }
        free_stage = stage;
        stage = stage + 1 == kFewStages ? 0 : stage + 1;
    }

    // [warp][token][row]; every warp writes where only its own weights were.
    __syncwarp();
    constexpr int kQuads = kRecordRows / 4;
    const int quad_step = kFewStages * Tile::kWarpBytes / 16;
    auto* const sums = reinterpret_cast<float4*>(smem);
#pragma unroll
    for (int e = 0; e < 2; ++e)
        sums[at.warp * quad_step + (at.tid * 2 + e) * kQuads + at.gid] =
            make_float4(acc.sum[0][0][e], acc.sum[0][0][2 + e], acc.sum[1][0][e], acc.sum[1][0][2 + e]);
    // Behind a warp's sums [token][row] its part of s, [token][direction].
    constexpr int kSumQuads = kFewTokens * kQuads, kDirectionQuads = kFewDirections / 4;
    static_assert((kSumQuads + kFewTokens * kDirectionQuads) * 16 <= kFewStages * Tile::kWarpBytes,
                  "both fit where the weights were");
    if (p.projects_slices)
        reinterpret_cast<float2*>(sums + at.warp * quad_step +
                                  kSumQuads)[at.gid * (kFewDirections / 2) + at.tid] =
            make_float2(s_part[0], s_part[1]);
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x), row = record * kRecordRows + i % kQuads * 4;
    if (i >= p.m * kQuads || row >= p.n) return;
    float values[4] = {}, bias[4] = {};
    load_bias(p, row, bias);
#pragma unroll 8
    for (int warp = 0; warp < warps; ++warp) {
        const float4 v = sums[warp * quad_step + i];
        values[0] += v.x, values[1] += v.y, values[2] += v.z, values[3] += v.w;
    }
    if (p.projects_slices) {
        float s[kFewDirections] = {};
        for (int warp = 0; warp < warps; ++warp)
#pragma unroll
            for (int j = 0; j < kDirectionQuads; ++j) {
                const float4 v = sums[warp * quad_step + kSumQuads + i / kQuads * kDirectionQuads + j];
                s[4 * j] += v.x, s[4 * j + 1] += v.y, s[4 * j + 2] += v.z, s[4 * j + 3] += v.w;
            }
        add_few(p, row, s, values);
    }
    store_rows<T>(p, i / kQuads, row, values, bias);
}

}  // namespace rosaq::cuda
