// One small kernel for each group of wrappers in csrc/device/ptx*.cuh, and for the CUDA words that the
// emulator defines itself. Words in, words out; conformance.py says what must come out. Run on a GPU and
// under the emulator.
#pragma once

#include "device/ptx.cuh"
#include "device/ptx_wgmma.cuh"

namespace conformance {

using namespace rosaq;

// 32 threads; two groups of copies of every size; thread t skips reading where bit t of in[0] is set.
static __global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
    ROSAQ_DYN_SMEM(smem);
    const int t = threadIdx.x;
    const bool read = (in[0] >> t & 1u) == 0;
    const uint32_t* from = in + 4 + t * 4;
    ptx::cp_async_16(smem + t * 16, from);
    ptx::cp_async_16_first(smem + 512 + t * 16, from + 128);
    ptx::cp_async_16_zfill(smem + 1024 + t * 16, from + 256, read);
    ptx::cp_async_commit();
    ptx::cp_async_8(smem + 1536 + t * 8, in + 4 + 384 + t * 2);
    ptx::cp_async_8_zfill(smem + 1792 + t * 8, in + 4 + 448 + t * 2, read);
    ptx::cp_async_4(smem + 2048 + t * 4, in + 4 + 512 + t);
    ptx::cp_async_4_zfill(smem + 2176 + t * 4, in + 4 + 544 + t, read);
    ptx::cp_async_commit();
    const auto* words = reinterpret_cast<const uint32_t*>(smem);
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (int i = t; i < 384; i += 32) out[i] = words[i];
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int i = 384 + t; i < 576; i += 32) out[i] = words[i];
}

// in: 32 rows of 16 bytes, then for every lane the row whose address it gives. out [32, 12]: x4, x4_trans,
// x2, x2_trans.
static __global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
    ROSAQ_DYN_SMEM(smem);
    const int t = threadIdx.x;
    auto* words = reinterpret_cast<uint32_t*>(smem);
    for (int i = t; i < 128; i += 32) words[i] = in[i];
    __syncthreads();
    const unsigned char* row = smem + in[128 + t] * 16;
    uint32_t x4[4], x4_trans[4], x2[2], x2_trans[2];
    ptx::ldmatrix_x4(x4, row);
    ptx::ldmatrix_x4_trans(x4_trans, row);
    ptx::ldmatrix_x2(x2, row);
    ptx::ldmatrix_x2_trans(x2_trans, row);
    for (int i = 0; i < 4; ++i) {
        out[t * 12 + i] = x4[i];
        out[t * 12 + 4 + i] = x4_trans[i];
        out[t * 12 + 8 + i] = i < 2 ? x2[i] : x2_trans[i - 2];
    }
}

// in [32, 10]: fragments a, b, d of every lane. out [32, 8]: d + a b, then a b.
template <class T>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    uint32_t a[4], b[2];
    float d[4], first[4];
    for (int i = 0; i < 4; ++i) a[i] = in[t * 10 + i];
    for (int i = 0; i < 2; ++i) b[i] = in[t * 10 + 4 + i];
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[t * 10 + 6 + i]);
    ptx::mma_m16n8k16<T>(d, a, b);
    ptx::mma_m16n8k16_first<T>(first, a, b);
    for (int i = 0; i < 4; ++i) {
        out[t * 8 + i] = __float_as_uint(d[i]);
        out[t * 8 + 4 + i] = __float_as_uint(first[i]);
    }
}

// in [256, 3]. out [256, 7]: lop3 with five tables, prmt, opaque.
static __global__ void bits_kernel(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    const uint32_t a = in[t * 3], b = in[t * 3 + 1], c = in[t * 3 + 2];
    uint32_t* o = out + t * 7;
    o[0] = ptx::lop3<0xea>(a, b, c);
    o[1] = ptx::lop3<0x6a>(a, b, c);
    o[2] = ptx::lop3<0x96>(a, b, c);
    o[3] = ptx::lop3<0xca>(a, b, c);
    o[4] = ptx::lop3<0x01>(a, b, c);
    o[5] = ptx::prmt(a, b, c);
    o[6] = static_cast<uint32_t>(ptx::opaque(static_cast<int>(a)));
}

template <class T2>
__device__ inline T2 pair_of(uint32_t bits) {
    T2 pair;
    memcpy(static_cast<void*>(&pair), &bits, 4);
    return pair;
}

template <class T2>
__device__ inline uint32_t bits_of(T2 pair) {
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// in [256, 3]. out [256, 4]: a b + c rounded once, a + b, a - b, a b.
template <class T2>
__global__ void pair_kernel(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    const T2 a = pair_of<T2>(in[t * 3]), b = pair_of<T2>(in[t * 3 + 1]), c = pair_of<T2>(in[t * 3 + 2]);
    out[t * 4] = bits_of(ptx::hfma2(a, b, c));
    out[t * 4 + 1] = bits_of(__hadd2(a, b));
    out[t * 4 + 2] = bits_of(__hsub2(a, b));
    out[t * 4 + 3] = bits_of(__hmul2(a, b));
}

// in [256]: floats. out [256]: to float16, to bfloat16, rounded to nearest.
static __global__ void round_kernel(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    const float value = __uint_as_float(in[t]);
    out[t] = __half_as_ushort(__float2half_rn(value)) |
             static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(value))) << 16;
}

// in [32, 2]: a value and an operand. out [32, 8].
static __global__ void shuffle_kernel(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x;
    const uint32_t value = in[t * 2], all = 0xffffffffu;
    const int operand = static_cast<int>(in[t * 2 + 1]);
    uint32_t* o = out + t * 8;
    o[0] = __shfl_sync(all, value, operand);
    o[1] = __shfl_sync(all, value, operand, 8);
    o[2] = __shfl_up_sync(all, value, 3);
    o[3] = __shfl_up_sync(all, value, 3, 16);
    o[4] = __shfl_down_sync(all, value, 5, 8);
    o[5] = __shfl_xor_sync(all, value, 9);
    o[6] = __shfl_xor_sync(all, value, 17, 16);
    o[7] = __ballot_sync(all, operand & 1) ^ (__any_sync(all, operand > 31) ? 1u : 0u) ^
           (__all_sync(all, operand >= 0) ? 2u : 0u);
}

// 4 blocks of 64. Each block in turn adds what the one before left to its own part of the input; then all
// count. out: [4, 64] running sums, then the flag, the counter, and every block's sum of the tickets below
// its own.
static __global__ void message_kernel(const uint32_t* in, uint32_t* out) {
    const int t = threadIdx.x, block = blockIdx.x;
    int* flag = reinterpret_cast<int*>(out + 256);
    int* counter = flag + 1;
    if (t == 0)
        while (ptx::ld_acquire(flag) != block) ptx::nanosleep(20);
    __syncthreads();
    const uint4 own = ptx::ld_global_nc_16(in + (block * 64 + t) * 4);
    out[block * 64 + t] = own.x + own.y + own.z + own.w + (block > 0 ? out[(block - 1) * 64 + t] : 0u);
    __syncthreads();
    if (t == 0) {
        ptx::fence_acq_rel_gpu();
        ptx::st_release(flag, block + 1);
        ptx::red_add_release(counter, block);
        while (ptx::ld_acquire(counter) < 6) ptx::nanosleep(20);
        const int ticket = ptx::atom_add_acq_rel(counter, 16);
        out[258 + block] = static_cast<uint32_t>((ticket & 15) == 6 && ticket < 6 + 64);
    }
}

// 96 threads: two of three warps meet at a named barrier, many times, to pass a value on.
static __global__ void named_barrier_kernel(const uint32_t* in, uint32_t* out) {
    ROSAQ_SHARED(s_value, uint32_t[64]);
    const int t = threadIdx.x;
    if (t >= 64) {
        out[t] = in[t];
        return;
    }
    uint32_t value = in[t];
    for (int i = 0; i < 8; ++i) {
        s_value[t] = value;
        ptx::bar_sync(3, 64);
        value = s_value[(t + 33) % 64] * 3u + static_cast<uint32_t>(i);
        ptx::bar_sync(3, 64);
    }
    out[t] = value;
}

static __global__ void dependent_launch_kernel(const uint32_t* in, uint32_t* out) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    out[threadIdx.x] = in[threadIdx.x];
}

// A ring of two slots on mbarriers: thread 32 copies 6 rows of 64 bytes, threads 0-15 add 1 to their words.
static __global__ void bulk_kernel(const uint32_t* in, uint32_t* out) {
#if ROSAQ_SM90
    ROSAQ_SHARED(full, uint64_t[2]);
    ROSAQ_SHARED(empty, uint64_t[2]);
    ROSAQ_DYN_SMEM(smem);
    const int t = threadIdx.x;
    if (t == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(&full[i], 1);
            ptx::mbarrier_init(&empty[i], 16);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    for (int row = 0; row < 6; ++row) {
        const int slot = row & 1, parity = row / 2 & 1;
        if (t == 32) {
            if (row >= 2)
                while (!ptx::mbarrier_try_wait_parity(&empty[slot], parity ^ 1)) {
                }
            ptx::fence_proxy_async();
            ptx::mbarrier_arrive_expect_tx(&full[slot], 64);
            ptx::bulk_copy_g2s(smem + slot * 64, in + row * 16, 64, &full[slot]);
        }
        if (t < 16) {
            while (!ptx::mbarrier_try_wait_parity(&full[slot], parity)) {
            }
            out[row * 16 + t] = reinterpret_cast<const uint32_t*>(smem + slot * 64)[t] + 1u;
            ptx::mbarrier_arrive(&empty[slot]);
        }
    }
#endif
}

// 128 threads. in: fragments a [128, 2, 4]; b [2, 64, 16], 16-bit; sums [128, 16]. out [128, 48]: a0 b0^T +
// a1 b1^T with all 64 rows of b, then sums + a1 b1^T with the last 32.
template <class T>
__global__ void wgmma_kernel(const uint32_t* in, uint32_t* out) {
#if ROSAQ_SM90A
    ROSAQ_DYN_SMEM(smem);
    // Gaps of different sizes behind 8 rows, 8 k and 16 k, and none of the steps a multiple of 128.
    constexpr int kStart = 16, kNStep = 128 + 16, kKStep = 8 * kNStep + 48, kMatrix = 2 * kKStep + 16;
    const int t = threadIdx.x;
    for (int i = t; i < 1024; i += 128) {
        const int number = i / 512, row = i / 8 % 64, pair = i % 8;
        const int piece = number * kMatrix + row / 8 * kNStep + pair / 4 * kKStep;
        *reinterpret_cast<uint32_t*>(smem + kStart + piece + row % 8 * 16 + pair % 4 * 4) = in[1024 + i];
    }
    ptx::fence_proxy_async();
    __syncthreads();

    uint32_t a[2][4];
    float both[32], last[16];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = in[t * 8 + i];
#pragma unroll
    for (int i = 0; i < 32; ++i) both[i] = __uint_as_float(0x7fffffffu);  // NaN, which nothing may add
#pragma unroll
    for (int i = 0; i < 16; ++i) last[i] = __uint_as_float(in[2048 + t * 16 + i]);
    const ptx::WgmmaMatrix b(smem + kStart, kKStep, kNStep);
    ptx::settle(a);
    ptx::settle(both);
    ptx::settle(last);
    ptx::wgmma_fence();
    ptx::wgmma_m64k16<T, 64>(both, a[0], b, false);
    ptx::wgmma_m64k16<T, 64>(both, a[1], b.at(kMatrix), true);
    ptx::wgmma_commit();
    ptx::wgmma_m64k16<T, 32>(last, a[1], b.at(kMatrix + 4 * kNStep), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
#pragma unroll
    for (int i = 0; i < 32; ++i) out[t * 48 + i] = __float_as_uint(both[i]);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 16; ++i) out[t * 48 + 32 + i] = __float_as_uint(last[i]);
#endif
}

// 128 threads, launched with 168 registers each as if they were a third of a block: the warpgroup gives most
// of them back and takes them again, and what the rest held is still there.
static __global__ void __launch_bounds__(128, 3) registers_kernel(const uint32_t* in, uint32_t* out) {
#if ROSAQ_SM90A
    const int t = threadIdx.x;
    uint32_t kept[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) kept[i] = in[t * 8 + i];
    ptx::fewer_registers<40>();
#pragma unroll
    for (int i = 0; i < 8; ++i) kept[i] = kept[i] * 3u + static_cast<uint32_t>(i);
    __syncthreads();  // the ISA wants the warps to meet between two of these
    ptx::more_registers<168>();
#pragma unroll
    for (int i = 0; i < 8; ++i) out[t * 8 + i] = kept[i] ^ kept[(i + 1) % 8];
#endif
}

struct Case {
    const char* name;
    void (*kernel)(const uint32_t*, uint32_t*);
    unsigned grid, block, smem_bytes;
};

constexpr Case kCases[] = {
    {"cp_async", cp_async_kernel, 1, 32, 2304},
    {"ldmatrix", ldmatrix_kernel, 1, 32, 512},
    {"mma_f16", mma_kernel<__half>, 1, 32, 0},
    {"mma_bf16", mma_kernel<__nv_bfloat16>, 1, 32, 0},
    {"mma_f16_integers", mma_kernel<__half>, 1, 32, 0},
    {"mma_bf16_integers", mma_kernel<__nv_bfloat16>, 1, 32, 0},
    {"bits", bits_kernel, 1, 256, 0},
    {"pair_f16", pair_kernel<__half2>, 1, 256, 0},
    {"pair_bf16", pair_kernel<__nv_bfloat162>, 1, 256, 0},
    {"round", round_kernel, 1, 256, 0},
    {"shuffle", shuffle_kernel, 1, 32, 0},
    {"message", message_kernel, 4, 64, 0},
    {"named_barrier", named_barrier_kernel, 1, 96, 0},
    {"dependent_launch", dependent_launch_kernel, 1, 64, 0},
    {"bulk", bulk_kernel, 1, 64, 128},
    {"wgmma_f16", wgmma_kernel<__half>, 1, 128, 4768},
    {"wgmma_bf16", wgmma_kernel<__nv_bfloat16>, 1, 128, 4768},
    {"wgmma_f16_integers", wgmma_kernel<__half>, 1, 128, 4768},
    {"wgmma_bf16_integers", wgmma_kernel<__nv_bfloat16>, 1, 128, 4768},
    {"registers", registers_kernel, 1, 128, 0},
};

}  // namespace conformance
