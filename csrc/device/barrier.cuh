// A barrier over the whole grid in two parts, so that work can lie between arriving and waiting. All blocks
// must be resident together: such launches are cooperative.
#pragma once

#include "../common/params_cuda.h"
#include "ptx.cuh"

namespace rosaq::cuda {

class GridBarrier {
  public:
    ROSAQ_DEVICE GridBarrier(int* counters, int grid) : counters_(counters), grid_(grid) {}

    // What this block's threads wrote to global memory before is visible to whoever has waited.
    ROSAQ_DEVICE void arrive() {
        __syncthreads();
        if (threadIdx.x != 0) return;
        // The generation cannot move between this read and our own arrival.
        const int generation = ptx::ld_acquire(counters_ + kBarrierGeneration);
        *kept_generation() = generation;
        if (ptx::atom_add_acq_rel(counters_ + kBarrierCount, 1) == grid_ - 1) {
            ptx::st_release(counters_ + kBarrierCount, 0);
            ptx::st_release(counters_ + kBarrierGeneration, generation + 1);
        }
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
        const int generation = *kept_generation();
        while (ptx::ld_acquire(counters_ + kBarrierGeneration) == generation) ptx::nanosleep(32);
    }

    // Between arriving and waiting: not in a register, which the main loop needs.
    ROSAQ_DEVICE static int* kept_generation() {
        ROSAQ_SHARED(s_generation, int);
        return &s_generation;
    }

    int* counters_;
    int grid_;
};

}  // namespace rosaq::cuda
