// Reading from memory with all threads at once, and nothing else: the roofline of one token. Built and called
// by timing.py.
//
//     g++ -O3 -march=native -fopenmp -shared -fPIC read_bandwidth.cpp -o read_bandwidth.so
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

typedef uint64_t Line
    __attribute__((vector_size(64), may_alias));  // a cache line: one load where registers are as wide

// `threads` ranges of `bytes_per_thread` (a multiple of 256) of ones, each first written by its thread so
// that the pages are its own. Null where there is not as much memory.
extern "C" uint64_t* open_memory(int threads, size_t bytes_per_thread) {
    const size_t bytes = bytes_per_thread * static_cast<size_t>(threads);
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);  // as the packed weights ask for them
#endif
    auto* const words = static_cast<uint64_t*>(memory);
    const size_t count = bytes_per_thread / sizeof(uint64_t);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        uint64_t* const mine = words + static_cast<size_t>(t) * count;
        std::fill(mine, mine + count, uint64_t{1});
    }
    return words;
}

// The sum of all words, which is their number if all were read. With kAhead lines are asked for before they
// are loaded, which is faster where cores share their way to memory and slower where one has it alone.
template <size_t kAhead>
static uint64_t read_words(const uint64_t* words, int threads, size_t bytes_per_thread) {
    const size_t count = bytes_per_thread / sizeof(uint64_t);
    uint64_t total = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(+ : total)
    for (int t = 0; t < threads; ++t) {
        const uint64_t* const mine = words + static_cast<size_t>(t) * count;
        Line sum0{}, sum1{}, sum2{}, sum3{};
        for (size_t i = 0; i < count; i += 32) {
            const Line* const lines = reinterpret_cast<const Line*>(mine + i);
            for (size_t line = 0; kAhead != 0 && line < 4; ++line)
                __builtin_prefetch(reinterpret_cast<const char*>(lines + line) + kAhead, 0, 0);
            sum0 += lines[0], sum1 += lines[1], sum2 += lines[2], sum3 += lines[3];
        }
        const Line sum = (sum0 + sum1) + (sum2 + sum3);
        for (int lane = 0; lane < 8; ++lane) total += sum[lane];
    }
    return total;
}

extern "C" uint64_t read_memory(const uint64_t* words, int threads, size_t bytes_per_thread, bool ahead) {
    return ahead ? read_words<8192>(words, threads, bytes_per_thread)
                 : read_words<0>(words, threads, bytes_per_thread);
}

extern "C" void close_memory(uint64_t* words, int threads, size_t bytes_per_thread) {
    munmap(words, bytes_per_thread * static_cast<size_t>(threads));
}
