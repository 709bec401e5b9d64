// How csrc/cpu asks for threads without knowing whose they are: csrc/torch passes a runner over torch's
// thread pool.
#pragma once

#include <cstdint>

namespace rosaq::cpu {

struct Parallel {
    using Range = void (*)(int64_t begin, int64_t end, void* context);
    // Calls range on disjoint pieces that cover [0, count), at least `grain` long where possible, maybe at
    // once.
    void (*run)(int64_t count, int64_t grain, Range range, void* context);

    template <class F>
    void operator()(int64_t count, int64_t grain, F f) const {
        run(
            count, grain,
            [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
    }
};

}  // namespace rosaq::cpu
