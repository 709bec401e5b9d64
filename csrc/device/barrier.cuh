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
        generation_ = ptx::ld_acquire(counters_ + kBarrierGeneration);
        if (ptx::atom_add_acq_rel(counters_ + kBarrierCount, 1) == grid_ - 1) {
            ptx::st_release(counters_ + kBarrierCount, 0);
            ptx::st_release(counters_ + kBarrierGeneration, generation_ + 1);
        }
    }

    ROSAQ_DEVICE void wait() {
        if (threadIdx.x == 0)
            while (ptx::ld_acquire(counters_ + kBarrierGeneration) == generation_) ptx::nanosleep(32);
        __syncthreads();
    }

  private:
    int* counters_;
    int grid_;
    int generation_ = 0;  // of thread 0 only
};

}  // namespace rosaq::cuda
