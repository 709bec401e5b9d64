// Bytes per second that `threads` threads read together from memory: the roofline of one token. Built by
// timing.py.
//
//     g++ -O3 -march=native -fopenmp -shared -fPIC read_bandwidth.cpp -o read_bandwidth.so
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>

typedef uint64_t Line
    __attribute__((vector_size(64), may_alias));  // a cache line: one load where registers are as wide

extern "C" double read_bytes_per_second(int threads, size_t bytes_per_thread, int rounds) {
    const size_t bytes = bytes_per_thread * static_cast<size_t>(threads);
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0.0;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);  // as the packed weights ask for them
#endif
    auto* const words = static_cast<uint64_t*>(memory);
    const size_t count = bytes_per_thread / sizeof(uint64_t);
    double best = 0.0;
    uint64_t total = 0;
    for (int round = 0; round <= rounds;
         ++round) {  // the first one writes, so that every thread's pages are its own
        const auto start = std::chrono::steady_clock::now();
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(+ : total)
        for (int t = 0; t < threads; ++t) {
            uint64_t* const mine = words + static_cast<size_t>(t) * count;
            if (round == 0) std::fill(mine, mine + count, uint64_t{1});
            Line sum0{}, sum1{}, sum2{}, sum3{};
            for (size_t i = 0; i < count; i += 32) {
                const Line* const lines = reinterpret_cast<const Line*>(mine + i);
                sum0 += lines[0], sum1 += lines[1], sum2 += lines[2], sum3 += lines[3];
            }
            const Line sum = (sum0 + sum1) + (sum2 + sum3);
            for (int lane = 0; lane < 8; ++lane) total += sum[lane];
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        if (round > 0) best = std::max(best, static_cast<double>(bytes) / took.count());
    }
    munmap(memory, bytes);
    return total == count * static_cast<size_t>(threads) * static_cast<size_t>(rounds + 1) ? best : 0.0;
}
