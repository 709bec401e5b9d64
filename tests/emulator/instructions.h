// The emulated bodies of csrc/device/ptx.cuh. Meanings are those of the PTX ISA; ptx.cuh says what each one
// does.
#pragma once

#include <cstdint>

#include "nvidia_headers.h"

namespace emu {

void cp_async(void* smem, const void* gmem, int bytes, int bytes_read);
void cp_async_commit();
void cp_async_wait(int allowed_pending);

void ldmatrix(uint32_t* r, int num_matrices, const void* smem_row, bool transposed);
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b);
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b);

uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int lut);
uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector);
__half2 hfma2(__half2 a, __half2 b, __half2 c);
__nv_bfloat162 hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c);

uint4 ld_global_nc_16(const void* gmem);
int ld_acquire(const int* gmem);
void st_release(int* gmem, int v);
void red_add_release(int* gmem, int v);
int atom_add_acq_rel(int* gmem, int v);
void fence_acq_rel_gpu();
void nanosleep(unsigned nanoseconds);

void bar_sync(int id, int threads);
void mbarrier_init(uint64_t* mbar, int arrivals);
void mbarrier_arrive(uint64_t* mbar);
void mbarrier_arrive_expect_tx(uint64_t* mbar, int bytes);
bool mbarrier_try_wait_parity(uint64_t* mbar, int parity);
void fence_mbarrier_init();
void fence_proxy_async();
void bulk_copy_g2s(void* smem, const void* gmem, int bytes, uint64_t* mbar);

struct WgmmaMatrix {
    const char* data;
    int k_step, n_step;
};
void wgmma(float* d, int n, const uint32_t* a, const WgmmaMatrix& b, bool adds, bool is_bf16);
void wgmma_commit();
void wgmma_wait(int allowed_pending);

}  // namespace emu
