// Launches of kernels/rounding.cuh.
#include "../kernels/rounding.cuh"
#include "launch.h"

namespace rosaq::cuda {
namespace {

template <class Row>
cudaError_t launch(const RoundingArgs& args, cudaStream_t stream) {
    if (args.n == 0) return cudaSuccess;
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(args.n, kRoundingRows));
    rounding_kernel<Row><<<blocks, kRoundingRows, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t round_panel(const RoundingArgs& args, cudaStream_t stream) {
    return launch<RoundRow>(args, stream);
}

cudaError_t sweep_panel(const RoundingArgs& args, cudaStream_t stream) {
    return launch<SweepRow>(args, stream);
}

}  // namespace rosaq::cuda
