// All inline PTX of the project: one wrapper per instruction, each with the instruction and its emulation
// side by side. Nothing here decides anything; tests/gpu/test_conformance.py holds the two against each
// other.
#pragma once

#include <cstdint>

#include "cuda_compat.h"

#ifdef ROSAQ_EMULATE
#include "emulator/instructions.h"
#define ROSAQ_PTX(emulated, ...) emulated
#define ROSAQ_PURE_PTX(emulated, ...) emulated
#else
#define ROSAQ_PTX(emulated, ...) asm volatile(__VA_ARGS__)
#define ROSAQ_PURE_PTX(emulated, ...) asm(__VA_ARGS__)  // depends on its operands alone: free to move
#endif

// Instructions of sm_90 are not declared for older targets, so that using one is a compile error, not a trap.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ROSAQ_SM90 1
#else
#define ROSAQ_SM90 0
#endif

namespace rosaq::ptx {

#ifndef ROSAQ_EMULATE
ROSAQ_DEVICE uint32_t smem_address(const void* smem) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}
#endif

// ---- asynchronous copies, global to shared ----
// .cg caches in L2 only and exists for 16 bytes; .ca also in L1, for 4, 8 and 16. Both addresses are aligned
// to the size. With read == false the zfill forms write zeros and touch no global memory.

ROSAQ_DEVICE void cp_async_16(void* smem, const void* gmem) {
    ROSAQ_PTX(emu::cp_async(smem, gmem, 16, 16),
              "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(smem)), "l"(gmem) : "memory");
}

// For data that is read once, such as weights: its L2 lines are the first to go.
ROSAQ_DEVICE void cp_async_16_first(void* smem, const void* gmem) {
#ifdef ROSAQ_EMULATE
    emu::cp_async(smem, gmem, 16, 16);
#else
    uint64_t policy;  // not volatile: the compiler makes it once
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
                 "l"(gmem), "l"(policy)
                 : "memory");
#endif
}

ROSAQ_DEVICE void cp_async_16_zfill(void* smem, const void* gmem, bool read) {
    ROSAQ_PTX(emu::cp_async(smem, gmem, 16, read ? 16 : 0),
              "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(gmem),
              "r"(read ? 16 : 0) : "memory");
}

ROSAQ_DEVICE void cp_async_8(void* smem, const void* gmem) {
    ROSAQ_PTX(emu::cp_async(smem, gmem, 8, 8),
              "cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(smem_address(smem)), "l"(gmem) : "memory");
}

ROSAQ_DEVICE void cp_async_8_zfill(void* smem, const void* gmem, bool read) {
    ROSAQ_PTX(emu::cp_async(smem, gmem, 8, read ? 8 : 0),
              "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_address(smem)), "l"(gmem),
              "r"(read ? 8 : 0) : "memory");
}

ROSAQ_DEVICE void cp_async_4(void* smem, const void* gmem) {
    ROSAQ_PTX(emu::cp_async(smem, gmem, 4, 4),
              "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(smem)), "l"(gmem) : "memory");
}

ROSAQ_DEVICE void cp_async_4_zfill(void* smem, const void* gmem, bool read) {
    ROSAQ_PTX(emu::cp_async(smem, gmem, 4, read ? 4 : 0),
              "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(smem)), "l"(gmem),
              "r"(read ? 4 : 0) : "memory");
}

ROSAQ_DEVICE void cp_async_commit() {
    ROSAQ_PTX(emu::cp_async_commit(), "cp.async.commit_group;" :: : "memory");
}

// Waits until at most N of this thread's groups are pending. Other threads see the data after a barrier.
template <int N>
ROSAQ_DEVICE void cp_async_wait() {
    ROSAQ_PTX(emu::cp_async_wait(N), "cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices ----
// ldmatrix: lane l gives the address of row l % 8 of 8x8 matrix l / 8 (16 bytes each) and gets, for matrix i
// in r[i], elements 2 (l % 4) and the next of row l / 4; _trans reads the matrix transposed.

ROSAQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
    ROSAQ_PTX(emu::ldmatrix(r, 4, smem_row, false),
              "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
              "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(smem_row)) : "memory");
}

ROSAQ_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
    ROSAQ_PTX(emu::ldmatrix(r, 4, smem_row, true),
              "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
              "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(smem_row)) : "memory");
}

// Lanes 0-15 give the addresses.
ROSAQ_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
    ROSAQ_PTX(emu::ldmatrix(r, 2, smem_row, false),
              "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
              "=r"(r[1]) : "r"(smem_address(smem_row)) : "memory");
}

ROSAQ_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
    ROSAQ_PTX(emu::ldmatrix(r, 2, smem_row, true),
              "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
              "=r"(r[1]) : "r"(smem_address(smem_row)) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] with float32 accumulation; T is __half or __nv_bfloat16. With g = lane /
// 4 and c = 2 (lane % 4): a = {(g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8)}, pairs along k; b = {(c, g),
// (c + 8, g)}, pairs along k; d = {(g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)}.
template <class T>
ROSAQ_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
ROSAQ_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ROSAQ_PURE_PTX(
        emu::mma_m16n8k16_f16(d, a, b),
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
        "r"(b[1]));
}

template <>
ROSAQ_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ROSAQ_PURE_PTX(
        emu::mma_m16n8k16_bf16(d, a, b),
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
        "r"(b[1]));
}

// d = a b, the first of a chain: starting from zeros in registers would cost four moves.
template <class T>
ROSAQ_DEVICE void mma_m16n8k16_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
ROSAQ_DEVICE void mma_m16n8k16_first<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef ROSAQ_EMULATE
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    mma_m16n8k16<__half>(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
#endif
}

template <>
ROSAQ_DEVICE void mma_m16n8k16_first<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
#ifdef ROSAQ_EMULATE
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    mma_m16n8k16<__nv_bfloat16>(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
#endif
}

// ---- arithmetic ----

// The same value, but the compiler can no longer know it: what is derived from it is computed where it is
// used instead of being kept in registers across a loop.
ROSAQ_DEVICE int opaque(int value) {
    ROSAQ_PTX(static_cast<void>(value), "" : "+r"(value));
    return value;
}

// Any function of three bits, bit by bit: kLut = f(0xf0, 0xcc, 0xaa).
template <int kLut>
ROSAQ_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
#ifdef ROSAQ_EMULATE
    d = emu::lop3(a, b, c, kLut);
#else
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kLut));
#endif
    return d;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes b:a; bit 3 of the nibble spreads its
// sign.
ROSAQ_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
#ifdef ROSAQ_EMULATE
    d = emu::prmt(a, b, selector);
#else
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
#endif
    return d;
}

// a b + c in both halves, rounded once.
template <class T2>
ROSAQ_DEVICE T2 hfma2(T2 a, T2 b, T2 c) {
#ifdef ROSAQ_EMULATE
    return emu::hfma2(a, b, c);
#else
    return __hfma2(a, b, c);
#endif
}

// ---- global memory and other blocks (gpu scope) ----

// Read-only data that L1 should not keep; 16-byte aligned.
ROSAQ_DEVICE uint4 ld_global_nc_16(const void* gmem) {
    uint4 v;
    ROSAQ_PTX(v = emu::ld_global_nc_16(gmem),
              "ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z),
              "=r"(v.w) : "l"(gmem));
    return v;
}

ROSAQ_DEVICE int ld_acquire(const int* gmem) {
    int v;
    ROSAQ_PTX(v = emu::ld_acquire(gmem),
              "ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(gmem) : "memory");
    return v;
}

ROSAQ_DEVICE void st_release(int* gmem, int v) {
    ROSAQ_PTX(emu::st_release(gmem, v), "st.release.gpu.global.s32 [%0], %1;" ::"l"(gmem), "r"(v) : "memory");
}

ROSAQ_DEVICE void red_add_release(int* gmem, int v) {
    ROSAQ_PTX(emu::red_add_release(gmem, v), "red.release.gpu.global.add.s32 [%0], %1;" ::"l"(gmem),
              "r"(v) : "memory");
}

// Returns what was there before.
ROSAQ_DEVICE int atom_add_acq_rel(int* gmem, int v) {
    int old;
    ROSAQ_PTX(old = emu::atom_add_acq_rel(gmem, v),
              "atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(gmem), "r"(v) : "memory");
    return old;
}

ROSAQ_DEVICE void fence_acq_rel_gpu() {
    ROSAQ_PTX(emu::fence_acq_rel_gpu(), "fence.acq_rel.gpu;" :: : "memory");
}

ROSAQ_DEVICE void nanosleep(unsigned nanoseconds) {
    ROSAQ_PTX(emu::nanosleep(nanoseconds), "nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// ---- barriers of a block ----

// Named barrier id (1-15; 0 is __syncthreads) of `threads` threads, a multiple of 32.
ROSAQ_DEVICE void bar_sync(int id, int threads) {
    ROSAQ_PTX(emu::bar_sync(id, threads), "bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if ROSAQ_SM90
// A phase of an mbarrier ends when `arrivals` threads have arrived and all announced bytes have come.
ROSAQ_DEVICE void mbarrier_init(uint64_t* mbar, int arrivals) {
    ROSAQ_PTX(emu::mbarrier_init(mbar, arrivals),
              "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(mbar)), "r"(arrivals) : "memory");
}

ROSAQ_DEVICE void mbarrier_arrive(uint64_t* mbar) {
    ROSAQ_PTX(emu::mbarrier_arrive(mbar),
              "mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(mbar)) : "memory");
}

ROSAQ_DEVICE void mbarrier_arrive_expect_tx(uint64_t* mbar, int bytes) {
    ROSAQ_PTX(emu::mbarrier_arrive_expect_tx(mbar, bytes),
              "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(mbar)),
              "r"(bytes) : "memory");
}

// True once the phase of that parity has ended; call it in a loop.
ROSAQ_DEVICE bool mbarrier_try_wait_parity(uint64_t* mbar, int parity) {
#ifdef ROSAQ_EMULATE
    return emu::mbarrier_try_wait_parity(mbar, parity);
#else
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(smem_address(mbar)), "r"(parity)
        : "memory");
    return done != 0;
#endif
}

// Makes mbarrier_init visible to the bulk copies that will report to it.
ROSAQ_DEVICE void fence_mbarrier_init() {
    ROSAQ_PTX(emu::fence_mbarrier_init(), "fence.mbarrier_init.release.cluster;" :: : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later bulk copies.
ROSAQ_DEVICE void fence_proxy_async() {
    ROSAQ_PTX(emu::fence_proxy_async(), "fence.proxy.async.shared::cta;" :: : "memory");
}

// One contiguous piece, addresses and size multiples of 16; its bytes are reported to mbar.
ROSAQ_DEVICE void bulk_copy_g2s(void* smem, const void* gmem, int bytes, uint64_t* mbar) {
    ROSAQ_PTX(emu::bulk_copy_g2s(smem, gmem, bytes, mbar),
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  smem_address(smem)),
              "l"(gmem), "r"(bytes), "r"(smem_address(mbar)) : "memory");
}
#endif

// ---- programmatic dependent launch: nothing to wait for below sm_90 and in the emulator ----

// Until the grid before this one in the stream has finished; orders only the calling thread's later reads.
ROSAQ_DEVICE void griddep_wait() {
#if !defined(ROSAQ_EMULATE) && ROSAQ_SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid start.
ROSAQ_DEVICE void griddep_launch() {
#if !defined(ROSAQ_EMULATE) && ROSAQ_SM90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace rosaq::ptx
