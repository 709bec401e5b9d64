// A barrier over the whole grid in two parts, so that work can lie between arriving and waiting. All blocks
// must be resident together: such launches are cooperative.
//
// One word and one atomic a block: the last arrival flips its top bit, whatever the size of the grid, and
// nothing has to be reset. Whoever waits looks for the flip.
#pragma once

#include "../common/params_cuda.h"
#include "ptx.cuh"

namespace rosaq::cuda {

class GridBarrier {
  public:
    ROSAQ_DEVICE GridBarrier(int* counters, int grid) : word_(counters + kBarrierWord), grid_(grid) {}

    // What this block's threads wrote to global memory before is visible to whoever has waited.
    ROSAQ_DEVICE void arrive() {
        __syncthreads();
        if (threadIdx.x != 0) return;
        // All others add 1, the first block what is missing to the top bit.
        const bool is_first = blockIdx.x == 0 && blockIdx.y == 0;
        const uint32_t added = is_first ? 0x80000000u - static_cast<uint32_t>(grid_ - 1) : 1u;
        *kept() = ptx::atom_add_acq_rel(word_, static_cast<int>(added));
    }

    ROSAQ_DEVICE void wait() {
        if (threadIdx.x == 0) wait_alone();
        __syncthreads();
    }

    // For `threads` neighbouring threads, the block's group `number` of so many, that have a named barrier;
    // to be called after a __syncthreads that follows arrive().
    ROSAQ_DEVICE void wait_part(int number, int threads, int barrier) {
        if (static_cast<int>(threadIdx.x) == number * threads) wait_alone();
        ptx::bar_sync(barrier, threads);
    }

  private:
    ROSAQ_DEVICE void wait_alone() {
        const int before = *kept();
        while ((ptx::ld_acquire(word_) ^ before) >= 0) ptx::nanosleep(32);
    }

    // The word when this block arrived, between arriving and waiting: not in a register, which the main loop
    // needs.
    ROSAQ_DEVICE static int* kept() {
        ROSAQ_SHARED(s_before, int);
        return &s_before;
    }

    int* word_;
    int grid_;
};

}  // namespace rosaq::cuda
