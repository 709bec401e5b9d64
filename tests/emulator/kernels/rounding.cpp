// round_panel and sweep_panel of csrc/launch, on the emulator instead of a stream.
#include "kernels/rounding.cuh"

#include "common/macros.h"
#include "emulator/c_api.h"
#include "emulator/emulator.h"

namespace {

using namespace rosaq;
using emu::LaunchOptions;

template <class Row>
int run(const LaunchOptions& options, const RoundingArgs& args) {
    return emu::guarded([&] {
        const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(args.n, cuda::kRoundingRows));
        emu::launch(cuda::rounding_kernel<Row>, dim3(blocks), dim3(cuda::kRoundingRows), 0, options, args);
    });
}

}  // namespace

extern "C" {

int round_panel(const LaunchOptions* options, int64_t p, int64_t n, int64_t bits, const float* columns,
                const float* factor, const float* scale, const float* zero, float* codes, float* errors) {
    return run<cuda::RoundRow>(
        *options, {p, n, static_cast<int>(bits), columns, factor, scale, zero, nullptr, codes, errors});
}

int sweep_panel(const LaunchOptions* options, int64_t p, int64_t n, int64_t bits, const float* slope,
                const float* known, const float* gram, const float* scale, const float* zero, float* codes,
                float* moves) {
    return run<cuda::SweepRow>(*options,
                               {p, n, static_cast<int>(bits), slope, gram, scale, zero, known, codes, moves});
}
}
