// wgmma, the matrix product of Hopper's warpgroups (sm_90a alone has it): wrappers as in ptx.cuh.
//
// A warpgroup is four warps, the first a multiple of four. d and a belong to the tensor cores from the
// instruction on until a wait that covers it: whoever reads or writes them before gets whatever is there.
#pragma once

#include "ptx.cuh"

// Not declared for other architectures, so that using them there is a compile error.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ROSAQ_SM90A 1
#else
#define ROSAQ_SM90A 0
#endif

#if ROSAQ_SM90A
namespace rosaq::ptx {

// A matrix [n, 16] of 16-bit numbers in shared memory, k contiguous, without swizzle: pieces of 8 rows x 16
// bytes, 128 bytes each, the second 8 k `k_step` bytes behind the first, the next 8 rows `n_step`. All are
// multiples of 16.
class WgmmaMatrix {
  public:
#ifdef ROSAQ_EMULATE
    using Bits = emu::WgmmaMatrix;
#else
    using Bits = uint64_t;
#endif

    ROSAQ_DEVICE WgmmaMatrix(const void* smem, int k_step, int n_step)
        : bits_(descriptor(smem, k_step, n_step)) {}

    // The one that lies `bytes` further on.
    ROSAQ_DEVICE WgmmaMatrix at(int bytes) const {
        WgmmaMatrix other = *this;
#ifdef ROSAQ_EMULATE
        other.bits_.data += bytes;
#else
        other.bits_ += static_cast<uint64_t>(bytes >> 4);
#endif
        return other;
    }

    ROSAQ_DEVICE Bits bits() const { return bits_; }

  private:
    ROSAQ_DEVICE static Bits descriptor(const void* smem, int k_step, int n_step) {
#ifdef ROSAQ_EMULATE
        return {static_cast<const char*>(smem), k_step, n_step};
#else
        const auto field = [](uint32_t bytes, int shift) {
            return static_cast<uint64_t>(bytes >> 4 & 0x3fffu) << shift;
        };
        return field(smem_address(smem), 0) | field(static_cast<uint32_t>(k_step), 16) |
               field(static_cast<uint32_t>(n_step), 32);
#endif
    }

    Bits bits_;
};

// Orders the warpgroup's own accesses to registers before the products that follow.
ROSAQ_DEVICE void wgmma_fence() {
#ifndef ROSAQ_EMULATE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

ROSAQ_DEVICE void wgmma_commit() {
    ROSAQ_PTX(emu::wgmma_commit(), "wgmma.commit_group.sync.aligned;" :: : "memory");
}

// Until at most N groups of the warpgroup are under way.
template <int N>
ROSAQ_DEVICE void wgmma_wait() {
    ROSAQ_PTX(emu::wgmma_wait(N), "wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// By all warps of a warpgroup: from here on each of its threads has kCount registers, given back or taken.
template <int kCount>
ROSAQ_DEVICE void fewer_registers() {
#ifndef ROSAQ_EMULATE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
ROSAQ_DEVICE void more_registers() {
#ifndef ROSAQ_EMULATE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// What was done to these registers has been done before the products that follow; to be called ahead of
// wgmma_fence, or the compiler puts moves behind it.
template <int N>
ROSAQ_DEVICE void settle(float (&registers)[N]) {
#ifndef ROSAQ_EMULATE
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
#endif
}
template <int N>
ROSAQ_DEVICE void settle(uint32_t (&registers)[N][4]) {
#ifndef ROSAQ_EMULATE
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
#endif
}

// d [64, n] = a [64, 16] b^T + (adds ? d : 0) with float32 accumulation, T __half or __nv_bfloat16, b [n,
// 16]. Warp w of the warpgroup holds rows 16 w and on, a as mma_m16n8k16 takes it; d[4 t + j] is register j
// of columns 8 t and on, as mma_m16n8k16 gives it.
template <class T, int kN>
ROSAQ_DEVICE void wgmma_m64k16(float (&d)[kN / 2], const uint32_t (&a)[4], const WgmmaMatrix& b, bool adds);

#ifdef ROSAQ_EMULATE
#define ROSAQ_WGMMA(T, kIsBf16, kN, ...)                                                                    \
    template <>                                                                                             \
    ROSAQ_DEVICE void wgmma_m64k16<T, kN>(float (&d)[kN / 2], const uint32_t (&a)[4], const WgmmaMatrix& b, \
                                          bool adds) {                                                      \
        emu::wgmma(d, kN, a, b.bits(), adds, kIsBf16);                                                      \
    }
#else
#define ROSAQ_WGMMA(T, kIsBf16, kN, type, d_list, a_list, b_operand, adds_operand, ...)                     \
    template <>                                                                                             \
    ROSAQ_DEVICE void wgmma_m64k16<T, kN>(float (&d)[kN / 2], const uint32_t (&a)[4], const WgmmaMatrix& b, \
                                          bool adds) {                                                      \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds_operand                                       \
                     ", 0;\n"                                                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " {" d_list           \
                     "}, {" a_list "}, " b_operand ", p, 1, 1, 0;\n}"                                       \
                     : __VA_ARGS__                                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()),                           \
                       "r"(static_cast<int>(adds)));                                                        \
    }
#endif

#define ROSAQ_WGMMA_32(T, kIsBf16, type)                                                             \
    ROSAQ_WGMMA(T, kIsBf16, 32, type,                                                                \
                "%0, %1, %2, %3, %4, %5, %6, %7, "                                                   \
                "%8, %9, %10, %11, %12, %13, %14, %15",                                              \
                "%16, %17, %18, %19", "%20", "%21", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),  \
                "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), \
                "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]))
ROSAQ_WGMMA_32(__half, false, "f16")
ROSAQ_WGMMA_32(__nv_bfloat16, true, "bf16")

#define ROSAQ_WGMMA_64(T, kIsBf16, type)                                                                   \
    ROSAQ_WGMMA(T, kIsBf16, 64, type,                                                                      \
                "%0, %1, %2, %3, %4, %5, %6, %7, "                                                         \
                "%8, %9, %10, %11, %12, %13, %14, %15, "                                                   \
                "%16, %17, %18, %19, %20, %21, %22, %23, "                                                 \
                "%24, %25, %26, %27, %28, %29, %30, %31",                                                  \
                "%32, %33, %34, %35", "%36", "%37", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),        \
                "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),       \
                "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
                "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
                "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]))
ROSAQ_WGMMA_64(__half, false, "f16")
ROSAQ_WGMMA_64(__nv_bfloat16, true, "bf16")

}  // namespace rosaq::ptx
#endif
