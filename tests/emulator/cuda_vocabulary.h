// The CUDA words that kernels use plainly, for g++: what NVIDIA's headers leave out on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "nvidia_headers.h"

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#endif

namespace emu {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* dynamic_shared();
void* static_shared(const void* declaration, size_t bytes, size_t alignment);

void syncthreads();
int syncthreads_or(int predicate);
void syncwarp(uint32_t mask);
enum class ShuffleKind { kIdx, kUp, kDown, kXor };
uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int operand, int width);
uint32_t ballot(uint32_t mask, bool predicate);
void fence_block();
void fence_acq_rel_gpu();

// Relaxed, in shared or global memory; return what was there before. Instantiated for the types that CUDA
// has.
template <class T>
T atomic_add(T* address, T v);
template <class T>
T atomic_max(T* address, T v);
template <class T>
T atomic_min(T* address, T v);
template <class T>
T atomic_exchange(T* address, T v);
template <class T>
T atomic_compare_and_swap(T* address, T expected, T v);

__half2 hfma2(__half2 a, __half2 b, __half2 c);
__nv_bfloat162 hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c);

}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
constexpr int warpSize = 32;

#define ROSAQ_DYN_SMEM(name) unsigned char* const name = emu::dynamic_shared()
#define ROSAQ_SHARED(name, ...)                     \
    using name##_type = __VA_ARGS__;                \
    static const char name##_declaration = 0;       \
    name##_type& name = *static_cast<name##_type*>( \
        emu::static_shared(&name##_declaration, sizeof(name##_type), alignof(name##_type)))

#define EMU_INLINE inline __attribute__((always_inline))

EMU_INLINE void __syncthreads() {
    emu::syncthreads();
}
EMU_INLINE int __syncthreads_or(int predicate) {
    return emu::syncthreads_or(predicate);
}
EMU_INLINE void __syncwarp(uint32_t mask = 0xffffffffu) {
    emu::syncwarp(mask);
}
EMU_INLINE void __threadfence() {
    emu::fence_acq_rel_gpu();
}
EMU_INLINE void __threadfence_block() {
    emu::fence_block();
}

template <class T>
EMU_INLINE T emu_shuffle(emu::ShuffleKind kind, uint32_t mask, T value, int operand, int width) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emu::shuffle(kind, mask, bits, operand, width);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
EMU_INLINE T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
    return emu_shuffle(emu::ShuffleKind::kIdx, mask, value, lane, width);
}
template <class T>
EMU_INLINE T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return emu_shuffle(emu::ShuffleKind::kUp, mask, value, static_cast<int>(delta), width);
}
template <class T>
EMU_INLINE T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return emu_shuffle(emu::ShuffleKind::kDown, mask, value, static_cast<int>(delta), width);
}
template <class T>
EMU_INLINE T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
    return emu_shuffle(emu::ShuffleKind::kXor, mask, value, lane_mask, width);
}
EMU_INLINE uint32_t __ballot_sync(uint32_t mask, int predicate) {
    return emu::ballot(mask, predicate != 0);
}
EMU_INLINE int __any_sync(uint32_t mask, int predicate) {
    return emu::ballot(mask, predicate != 0) != 0;
}
EMU_INLINE int __all_sync(uint32_t mask, int predicate) {
    return emu::ballot(mask, predicate == 0) == 0;
}

template <class T>
EMU_INLINE T atomicAdd(T* address, std::common_type_t<T> v) {
    return emu::atomic_add<T>(address, v);
}
template <class T>
EMU_INLINE T atomicMax(T* address, std::common_type_t<T> v) {
    return emu::atomic_max<T>(address, v);
}
template <class T>
EMU_INLINE T atomicMin(T* address, std::common_type_t<T> v) {
    return emu::atomic_min<T>(address, v);
}
template <class T>
EMU_INLINE T atomicExch(T* address, std::common_type_t<T> v) {
    return emu::atomic_exchange<T>(address, v);
}
template <class T>
EMU_INLINE T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> v) {
    return emu::atomic_compare_and_swap<T>(address, expected, v);
}

template <class T>
EMU_INLINE T __ldg(const T* address) {
    return *address;
}
template <class T>
EMU_INLINE T __ldcg(const T* address) {
    return *address;
}
template <class T>
EMU_INLINE T __ldcs(const T* address) {
    return *address;
}
template <class T>
EMU_INLINE void __stcg(T* address, T v) {
    *address = v;
}
template <class T>
EMU_INLINE void __stcs(T* address, T v) {
    *address = v;
}

EMU_INLINE int min(int a, int b) {
    return a < b ? a : b;
}
EMU_INLINE unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
EMU_INLINE int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
EMU_INLINE float min(float a, float b) {
    return fminf(a, b);
}
EMU_INLINE int max(int a, int b) {
    return a < b ? b : a;
}
EMU_INLINE unsigned max(unsigned a, unsigned b) {
    return a < b ? b : a;
}
EMU_INLINE int64_t max(int64_t a, int64_t b) {
    return a < b ? b : a;
}
EMU_INLINE float max(float a, float b) {
    return fmaxf(a, b);
}

template <class To, class From>
EMU_INLINE To emu_bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps every bit");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
EMU_INLINE uint32_t __float_as_uint(float v) {
    return emu_bit_cast<uint32_t>(v);
}
EMU_INLINE int __float_as_int(float v) {
    return emu_bit_cast<int>(v);
}
EMU_INLINE float __uint_as_float(uint32_t v) {
    return emu_bit_cast<float>(v);
}
EMU_INLINE float __int_as_float(int v) {
    return emu_bit_cast<float>(v);
}
EMU_INLINE float __fadd_rn(float a, float b) {
    return a + b;
}
EMU_INLINE float __fsub_rn(float a, float b) {
    return a - b;
}
EMU_INLINE float __fmul_rn(float a, float b) {
    return a * b;
}
EMU_INLINE float __fdiv_rn(float a, float b) {
    return a / b;
}
EMU_INLINE int __popc(uint32_t v) {
    return __builtin_popcount(v);
}
EMU_INLINE int __ffs(int v) {
    return __builtin_ffs(v);
}
EMU_INLINE int __clz(int v) {
    return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v));
}
EMU_INLINE uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>(((uint64_t{high} << 32) | low) >> (shift & 31));
}
EMU_INLINE uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((((uint64_t{high} << 32) | low) << (shift & 31)) >> 32);
}

EMU_INLINE __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return emu::hfma2(a, b, c);
}
EMU_INLINE __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return emu::hfma2(a, b, c);
}
EMU_INLINE __half __hfma(__half a, __half b, __half c) {
    return __low2half(emu::hfma2(__half2half2(a), __half2half2(b), __half2half2(c)));
}
EMU_INLINE __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __low2bfloat16(
        emu::hfma2(__bfloat162bfloat162(a), __bfloat162bfloat162(b), __bfloat162bfloat162(c)));
}
