// What threads of different blocks tell each other: acquire, release, fences and atomics. The value of a flag
// carries what its writer published; a reader learns of it by acquiring, or by a fence after a relaxed read.
#include <cstring>

#include "cuda_vocabulary.h"
#include "instructions.h"
#include "machine.h"

namespace emu {
namespace {

bool is_checked() {
    return machine->launch.checked;
}

void check_word(const void* address, size_t bytes, AccessKind kind, const char* name, Site site) {
    check_aligned(address, bytes, name, site);
    check_access(address, bytes, kind, site);
}

// Others may run before any atomic access.
void let_others_run(const char* name, Site site) {
    if (machine->random() % 2 == 0) yield(name, site);
}

// A relaxed read-modify-write of T.
template <class T, class Update>
T update(T* address, const char* name, Site site, Update new_value) {
    let_others_run(name, site);
    check_word(address, sizeof(T), AccessKind::kAtomicWrite, name, site);
    if (is_checked()) {
        Thread& me = self();
        Message& flag = machine->published[address];
        merge(me.clock.pending_acquire, flag);
        merge(flag, me.clock.fenced);
    }
    const T before = *address;
    const T after = new_value(before);
    if (std::memcmp(&before, &after, sizeof(T)) != 0) progress();
    std::memcpy(static_cast<void*>(address), &after, sizeof(T));
    return before;
}

int add(int* gmem, int v, bool acquires, const char* name, Site site) {
    return update(gmem, name, site, [&](int before) {
        if (is_checked()) {
            Message& flag = machine->published[gmem];
            if (acquires) absorb(self(), flag);
            merge(flag, publish(self()));
        }
        return before + v;
    });
}

}  // namespace

int ld_acquire(const int* gmem) {
    const Site site = EMU_SITE;
    yield("ld.acquire", site);
    check_word(gmem, 4, AccessKind::kAtomicRead, "ld.acquire", site);
    Thread& me = self();
    if (is_checked()) absorb(me, machine->published[gmem]);
    if (me.polled != gmem || me.polled_value != *gmem) progress();
    me.polled = gmem;
    me.polled_value = *gmem;
    return *gmem;
}

void st_release(int* gmem, int v) {
    const Site site = EMU_SITE;
    let_others_run("st.release", site);
    check_word(gmem, 4, AccessKind::kAtomicWrite, "st.release", site);
    if (is_checked()) machine->published[gmem] = publish(self());
    progress();
    *gmem = v;
}

void red_add_release(int* gmem, int v) {
    add(gmem, v, false, "red.release.add", EMU_SITE);
}

int atom_add_acq_rel(int* gmem, int v) {
    return add(gmem, v, true, "atom.acq_rel.add", EMU_SITE);
}

void fence_acq_rel_gpu() {
    if (!is_checked()) return;
    Clock& clock = self().clock;
    absorb(self(), clock.pending_acquire);
    clock.pending_acquire.clear();
    clock.fenced = publish(self());
}

// Orders within a block, where only barriers count here: a kernel that relies on it races for the checker.
void fence_block() {}

void nanosleep(unsigned) {
    yield("nanosleep", EMU_SITE);
}

uint4 ld_global_nc_16(const void* gmem) {
    const Site site = EMU_SITE;
    check_aligned(gmem, 16, "ld.global.nc", site);
    if (is_checked()) check_constant(gmem, 16, site);
    uint4 v;
    std::memcpy(&v, gmem, sizeof v);
    return v;
}

template <class T>
T atomic_add(T* address, T v) {
    return update(address, "atomicAdd", EMU_SITE, [&](T before) { return before + v; });
}
template <class T>
T atomic_max(T* address, T v) {
    return update(address, "atomicMax", EMU_SITE, [&](T before) { return before < v ? v : before; });
}
template <class T>
T atomic_min(T* address, T v) {
    return update(address, "atomicMin", EMU_SITE, [&](T before) { return v < before ? v : before; });
}
template <class T>
T atomic_exchange(T* address, T v) {
    return update(address, "atomicExch", EMU_SITE, [&](T) { return v; });
}
template <class T>
T atomic_compare_and_swap(T* address, T expected, T v) {
    return update(address, "atomicCAS", EMU_SITE, [&](T before) { return before == expected ? v : before; });
}

#define EMU_INTEGER_ATOMICS(T)            \
    template T atomic_add<T>(T*, T);      \
    template T atomic_max<T>(T*, T);      \
    template T atomic_min<T>(T*, T);      \
    template T atomic_exchange<T>(T*, T); \
    template T atomic_compare_and_swap<T>(T*, T, T);
EMU_INTEGER_ATOMICS(int)
EMU_INTEGER_ATOMICS(unsigned)
EMU_INTEGER_ATOMICS(unsigned long long)
#undef EMU_INTEGER_ATOMICS
template float atomic_add<float>(float*, float);
template double atomic_add<double>(double*, double);
template __half atomic_add<__half>(__half*, __half);
template __half2 atomic_add<__half2>(__half2*, __half2);
template __nv_bfloat16 atomic_add<__nv_bfloat16>(__nv_bfloat16*, __nv_bfloat16);
template __nv_bfloat162 atomic_add<__nv_bfloat162>(__nv_bfloat162*, __nv_bfloat162);

}  // namespace emu
