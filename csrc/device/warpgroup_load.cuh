// The warpgroup that brings weights and x to the ones that multiply.
#pragma once

#include "barrier.cuh"
#include "load.cuh"
#include "salient.cuh"
#include "warpgroup_tile.cuh"

#if ROSAQ_SM90A
namespace rosaq::cuda {

constexpr int kLoaderBarrier = 2;  // and the next: named barriers of the halves of this warpgroup

// One thread's copies of K-tiles of low-bit weights, in any order.
template <class Tile>
ROSAQ_DEVICE void copy_weights(const GemmParams& p, const Cursor& at, unsigned char* to, uint64_t* arrived) {
    const int64_t slab = at.row_tile, block = slab * p.k_blocks + at.k_tile;
    const int64_t group = slab * p.groups + (p.groups == 1 ? 0 : at.k_tile * p.groups_per_block);
    const int scale_bytes = p.groups_per_block * kSlabRows * 2;
    const int zero_bytes = p.zeros == nullptr ? 0 : p.groups_per_block * kSlabRows;
    ptx::mbarrier_arrive_expect_tx(arrived, Tile::kCodeBytes + scale_bytes + zero_bytes);
    ptx::bulk_copy_g2s(to, p.codes + block * Tile::kCodeBytes, Tile::kCodeBytes, arrived);
    ptx::bulk_copy_g2s(to + Tile::kCodeBytes, p.scales + group * kSlabRows * 2, scale_bytes, arrived);
    if (zero_bytes != 0)
        ptx::bulk_copy_g2s(to + Tile::kCodeBytes + Tile::kScaleBytes, p.zeros + group * kSlabRows, zero_bytes,
                           arrived);
}

// A thread's pieces of one K-tile of x: 8 k of every fourth token, on their way through registers.
//
// A lane of the MMA holds 8 neighbouring k of every 32 (layout_cuda.h), two in each of (step, half of its k);
// wgmma reads from shared memory instead, so pairs of k are written to where the lane would have them: pair
// 4 tid + j of 32 k becomes pair tid of piece j.
template <class Tile>
class XPieces {
  public:
    using T = typename Tile::T;
    static constexpr int kChunks = kBlockK / 8, kStep = Tile::kLoaderThreads / kChunks;
    static constexpr int kRounds = Tile::kTokens / kStep;

    ROSAQ_DEVICE void load(const GemmParams& p, int k_tile) {
        const int thread = static_cast<int>(threadIdx.x) % Tile::kLoaderThreads, token = thread / kChunks;
        const int k = k_tile * kBlockK + thread % kChunks * 8;
        const T* from =
            static_cast<const T*>(p.t != nullptr ? p.t : p.x) + static_cast<int64_t>(token) * p.k + k;
        const int tokens = k < p.k ? p.m - token : 0;
        const int64_t step = static_cast<int64_t>(kStep) * p.k;
#pragma unroll
        for (int i = 0; i < kRounds; ++i, from += step) {
            held_[i] = make_uint4(0, 0, 0, 0);
            if (i * kStep < tokens) held_[i] = *reinterpret_cast<const uint4*>(from);
        }
    }

    ROSAQ_DEVICE void store(unsigned char* x) const {
        const int thread = static_cast<int>(threadIdx.x) % Tile::kLoaderThreads, chunk = thread % kChunks;
        unsigned char* to = x + chunk / 4 * Tile::kPartBytes + thread / kChunks * kLoadBytes + chunk % 4 * 4;
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const uint32_t pairs[4] = {held_[i].x, held_[i].y, held_[i].z, held_[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                *reinterpret_cast<uint32_t*>(to + j * Tile::kPieceBytes + i * kStep * kLoadBytes) = pairs[j];
        }
    }

  private:
    uint4 held_[kRounds];
};

// The salient values of directions col0 .. col0 + 31 as the first 32 k of an x stage. A lane has a direction.
template <class Tile>
ROSAQ_DEVICE void gather_pieces(const GemmParams& p, int col0, unsigned char* x) {
    using T = typename Tile::T;
    constexpr int kWarps = Tile::kLoaderThreads / kLanes;
    const Lane at;
    unsigned char* to = x + at.lane % 8 / 2 * Tile::kPieceBytes + at.lane / 8 * 4 + at.lane % 2 * 2;
    constexpr int kAtOnce = 16;  // what registers allow
    for (int token = at.warp % kWarps; token < Tile::kTokens; token += kAtOnce * kWarps) {
        T values[kAtOnce];
        load_salient(p, col0 + at.lane, token, kWarps, values);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            *reinterpret_cast<T*>(to + (token + i * kWarps) * kLoadBytes) = values[i];
    }
}

// The same of up to 8 directions of a basis. A lane has two of them and every so many tokens; loads are under
// way together, which here are many: every part of k has left its own s.
template <class Tile>
ROSAQ_DEVICE void gather_few_pieces(const GemmParams& p, unsigned char* x) {
    using T = typename Tile::T;
    constexpr int kWarps = Tile::kLoaderThreads / kLanes, kStep = kLanes / 4 * kWarps;
    constexpr int kRounds = Tile::kTokens / kStep, kParts = 4;
    const Lane at;
    const int direction = at.tid * 2, token = at.warp % kWarps * (kLanes / 4) + at.gid;
    float s[kRounds][2] = {};
    for (int first = 0; first < p.schedule.projection_parts; first += kParts) {
        float parts[kParts][kRounds][2];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const float* from =
                p.s_parts + (static_cast<int64_t>(first + part) * p.m + token) * p.r + direction;
            const int tokens = first + part < p.schedule.projection_parts ? p.m - token : 0;
#pragma unroll
            for (int i = 0; i < kRounds; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const bool exists = i * kStep < tokens && direction + j < p.r;
                    parts[part][i][j] = exists ? __ldcg(from + i * kStep * p.r + j) : 0.0f;
                }
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int i = 0; i < kRounds; ++i) s[i][0] += parts[part][i][0], s[i][1] += parts[part][i][1];
    }
    unsigned char* to = x + at.tid * Tile::kPieceBytes + token * kLoadBytes;
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
        *reinterpret_cast<uint4*>(to + i * kStep * kLoadBytes) =
            make_uint4(pair_of<T>(s[i][0], s[i][1]), 0, 0, 0);
}

// Half of the warpgroup, for every other K-tile. Handing over means waiting for all loads of a thread, so the
// halves wait in turns.
template <class Tile>
class Loader {
  public:
    ROSAQ_DEVICE Loader(const GemmParams& p, const StageRing<Tile>& ring, GridBarrier& grid,
                        const Cursor& start)
        : p_(p),
          ring_(ring),
          grid_(grid),
          now_(start),
          half_(static_cast<int>(threadIdx.x) / Tile::kLoaderThreads),
          leads_(static_cast<int>(threadIdx.x) % Tile::kLoaderThreads == 0) {}

    // The weights of as many K-tiles as the ring has stages, before anything is waited for; by one warp, a
    // lane for each.
    ROSAQ_DEVICE static void start_weights(const GemmParams& p, const StageRing<Tile>& ring, Cursor at,
                                           int tiles) {
        const int stage = static_cast<int>(threadIdx.x);
        if (stage >= Tile::kStages || stage >= tiles) return;
        for (int i = 0; i < stage; ++i) at.advance(p.schedule);
        if (at.k_tile < p.k_blocks) copy_weights<Tile>(p, at, ring.weights(stage), ring.has_weights(stage));
    }

    ROSAQ_DEVICE void run(int tiles) {
        for (int i = 0; i < tiles; ++i) {
            if (i % Tile::kLoaders == half_) bring(i >= Tile::kStages);
            now_.advance(p_.schedule);
            place_.advance();
        }
    }

  private:
    ROSAQ_DEVICE void bring(bool is_reused) {
        const int stage = place_.stage;
        if (now_.k_tile < p_.k_blocks) {
            XPieces<Tile> x;
            x.load(p_, now_.k_tile);
            if (is_reused) {
                wait_for(ring_.is_free(stage), place_.parity ^ 1);
                if (leads_) copy_weights<Tile>(p_, now_, ring_.weights(stage), ring_.has_weights(stage));
            }
            x.store(ring_.x(stage));
        } else {
            if (is_reused) wait_for(ring_.is_free(stage), place_.parity ^ 1);
            if (leads_) ptx::mbarrier_arrive(ring_.has_weights(stage));
            bring_salient(stage);
        }
        ptx::fence_proxy_async();  // wgmma reads what was written here
        ptx::mbarrier_arrive(ring_.has_x(stage));
    }

    ROSAQ_DEVICE void bring_salient(int stage) {
        constexpr int kWarps = Tile::kLoaderThreads / kLanes;
        const int col0 = (now_.k_tile - p_.k_blocks) * kSalientCols;
        for (int record = Lane().warp % kWarps; record < kSlabRecords; record += kWarps)
            fetch_salient(p_, ring_.weights(stage) + record * Tile::kSalientRecordBytes,
                          now_.row_tile * kSlabRows + record * kRecordRows, col0);
        ptx::cp_async_commit();
        // At the first such tile; later ones find it done.
        if (p_.schedule.projection_parts != 0)
            grid_.wait_part(half_, Tile::kLoaderThreads, kLoaderBarrier + half_);
        if (p_.salient_index == nullptr && p_.r <= kFewDirections)
            gather_few_pieces<Tile>(p_, ring_.x(stage));
        else
            gather_pieces<Tile>(p_, col0, ring_.x(stage));
        ptx::cp_async_wait<0>();
    }

    const GemmParams& p_;
    const StageRing<Tile>& ring_;
    GridBarrier& grid_;
    Cursor now_;
    StagePlace<Tile> place_;
    int half_;
    bool leads_;
};

}  // namespace rosaq::cuda
#endif
