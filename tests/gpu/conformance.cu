// Runs a case of conformance_kernels.cuh on the GPU.
#include <cstring>

#include "conformance_kernels.cuh"

namespace {

const char* last_error = "";

bool failed(cudaError_t error) {
    if (error == cudaSuccess) return false;
    last_error = cudaGetErrorString(error);
    return true;
}

int run(const conformance::Case& c, const uint32_t* in, size_t in_words, uint32_t* out, size_t out_words) {
    uint32_t *g_in = nullptr, *g_out = nullptr;
    int result = 1;
    if (!failed(cudaMalloc(&g_in, in_words * 4)) && !failed(cudaMalloc(&g_out, out_words * 4)) &&
        !failed(cudaMemcpy(g_in, in, in_words * 4, cudaMemcpyHostToDevice)) &&
        !failed(cudaMemset(g_out, 0, out_words * 4))) {
        c.kernel<<<c.grid, c.block, c.smem_bytes>>>(g_in, g_out);
        if (!failed(cudaGetLastError()) &&
            !failed(cudaMemcpy(out, g_out, out_words * 4, cudaMemcpyDeviceToHost)))
            result = 0;
    }
    cudaFree(g_in);
    cudaFree(g_out);
    return result;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* conformance_error() {
    return last_error;
}

extern "C" __attribute__((visibility("default"))) int conformance_run(const char* name, const uint32_t* in,
                                                                      size_t in_words, uint32_t* out,
                                                                      size_t out_words) {
    for (const conformance::Case& c : conformance::kCases)
        if (std::strcmp(c.name, name) == 0) return run(c, in, in_words, out, out_words);
    last_error = "no such case";
    return 1;
}
