// The share of a block of warpgroups, and where things lie in its shared memory (sm_90a).
//
// One warpgroup brings x, its halves taking turns; two multiply. A K-tile is the 128 rows x 128 k of a slab,
// as in the other kernels; of every record's two MMA row tiles each multiplying warpgroup has one, so both
// read the same x and no weight is decoded twice.
#pragma once

#include "ptx_wgmma.cuh"
#include "tile.cuh"

namespace rosaq::cuda {

template <class T_, int kBits_, int kTokens_>
struct WarpgroupTile {
    using T = T_;
    static constexpr int kBits = kBits_, kTokens = kTokens_, kTokenTiles = kTokens / 8;
    static constexpr bool kSymmetric = false;  // zero points where the blob has them
    static constexpr int kGroupThreads = 128, kConsumers = 2;
    static constexpr int kThreads = (1 + kConsumers) * kGroupThreads, kWarps = kThreads / kLanes,
                         kConsumerWarps = kWarps - 4;
    static constexpr int kLoaders = 2, kLoaderThreads = kGroupThreads / kLoaders;
    static constexpr int kRows = kSlabRows;
    // Registers of a thread: as launched, and when each warpgroup knows its part. They come out of what the
    // block was given; asking for one too many waits forever.
    static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8, kLoaderRegisters = 104,
                         kConsumerRegisters = 200;

    // Weights of a stage: codes of the slab's records, scales, zeros; or the rows of salient_weight.
    static constexpr int kMaxGroups = kBlockK / 32;
    static constexpr int kRecordBytes = kLanes * kLoadBytes * kBits;
    static constexpr int kCodeBytes = kSlabRecords * kRecordBytes;
    static constexpr int kScaleBytes = kMaxGroups * kSlabRows * 2, kZeroBytes = kMaxGroups * kSlabRows;
    static constexpr int kSalientRecordBytes = kRecordRows * kSalientCols * 2;
    static constexpr int kLowBitBytes = kCodeBytes + kScaleBytes + kZeroBytes;
    static constexpr int kSalientBytes = kSlabRecords * kSalientRecordBytes;
    static constexpr int kWeightBytes = kLowBitBytes > kSalientBytes ? kLowBitBytes : kSalientBytes;

    // x of a stage: [32 k][step, half of its k][token][8 k], the operand of wgmma; see XPieces. The bytes
    // between parts of 32 k let the four parts of a token be written at a time.
    static constexpr int kPieceBytes = kTokens * kLoadBytes, kPartBytes = 4 * kPieceBytes + 32;
    static constexpr int kXBytes = 4 * kPartBytes;

    static constexpr int kStages = 8;
    static constexpr int kBarrierBytes = 256;
    static constexpr int kSmemBytes = kBarrierBytes + kStages * (kWeightBytes + kXBytes);

    static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters,
                  "all there are");
    static_assert(kTokens == 32 || kTokens == 64, "see instances");
    static_assert(kWeightBytes % 128 == 0 && kXBytes % 128 == 0, "stages start aligned");
    static_assert(3 * 8 * kStages <= kBarrierBytes, "three barriers a stage");
    static_assert(kSmemBytes <= 227 * 1024, "one block must fit an sm_90 SM");
    static_assert(kWarps * 16 * kTokens * 4 <= kStages * kXBytes, "skinny products add up in the x stages");
};

#if ROSAQ_SM90A
// A block's stages and who may use them. Weights come by bulk copies of one thread, x through the registers
// of the first warpgroup; both have to be there before a stage is multiplied.
template <class Tile>
class StageRing {
  public:
    ROSAQ_DEVICE explicit StageRing(unsigned char* smem) : smem_(smem) {}

    // By one thread, before a barrier of the block.
    ROSAQ_DEVICE void init() const {
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            ptx::mbarrier_init(has_weights(stage), 1);
            ptx::mbarrier_init(has_x(stage), Tile::kLoaderThreads);
            ptx::mbarrier_init(is_free(stage), Tile::kConsumerWarps);
        }
        ptx::fence_mbarrier_init();
    }

    ROSAQ_DEVICE uint64_t* has_weights(int stage) const { return barrier(stage); }
    ROSAQ_DEVICE uint64_t* has_x(int stage) const { return barrier(Tile::kStages + stage); }
    ROSAQ_DEVICE uint64_t* is_free(int stage) const { return barrier(2 * Tile::kStages + stage); }
    ROSAQ_DEVICE unsigned char* weights(int stage) const {
        return smem_ + Tile::kBarrierBytes + stage * Tile::kWeightBytes;
    }
    ROSAQ_DEVICE unsigned char* x(int stage) const {
        return smem_ + Tile::kBarrierBytes + Tile::kStages * Tile::kWeightBytes + stage * Tile::kXBytes;
    }

  private:
    ROSAQ_DEVICE uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(smem_) + i; }
    unsigned char* smem_;
};

ROSAQ_DEVICE void wait_for(uint64_t* barrier, int parity) {
    while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
    }
}

// A stage of the ring and how often it has come round.
template <class Tile>
struct StagePlace {
    int stage = 0, parity = 0;
    ROSAQ_DEVICE void advance() {
        if (++stage == Tile::kStages) stage = 0, parity ^= 1;
    }
};
#endif

}  // namespace rosaq::cuda
