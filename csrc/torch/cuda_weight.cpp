#include "cuda_weight.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda_context.h"

namespace rosaq::bind {
namespace {

// "ROSAQpkC": not the mark of a CPU blob, so neither is taken for the other.
constexpr char kCudaMagic[8] = {'R', 'O', 'S', 'A', 'Q', 'p', 'k', 'C'};

void check_blob_tensor(const char* op, const Tensor& packed) {
    check_dtype(op, "packed", packed, {ScalarType::Byte});
    ROSAQ_CHECK(packed.dim() == 1 && packed.is_contiguous(), op, ": packed: got shape ", shape_text(packed),
                packed.is_contiguous() ? "" : " (not contiguous)",
                ", need a contiguous 1-D blob from rosaq::prepack");
    const uintptr_t rest = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 128;
    ROSAQ_CHECK(rest == 0, op, ": packed: got an address ", rest,
                " bytes past a multiple of 128, need the tensor that rosaq::prepack returned, not a view "
                "into another");
}

}  // namespace

CudaWeight parse_cuda_blob(const char* op, const Tensor& packed, int64_t n, int64_t k, int64_t bits,
                           int64_t group_size, bool symmetric) {
    check_bits(op, bits);
    check_blob_tensor(op, packed);
    if (group_size == -1) group_size = k;
    ROSAQ_CHECK(n > 0 && n % 8 == 0, op, ": out_features: got ", n, ", need a positive multiple of 8");
    ROSAQ_CHECK(k > 0 && k % 32 == 0, op, ": x: got k ", k, ", need a positive multiple of 32");
    ROSAQ_CHECK(cuda::is_group_size(group_size, k) && k % group_size == 0, op, ": group_size: got ",
                group_size, " for k ", k, ", need 32, 64, 128 or k on CUDA");
    check_cuda_size(op, n, k);
    CudaWeight w;
    w.packed.n = n, w.packed.k = k, w.packed.group_size = group_size;
    w.packed.bits = static_cast<int>(bits), w.packed.symmetric = symmetric;
    int64_t need[2];
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
        const auto layout =
            cuda::blob_layout(n, k, w.packed.bits, group_size, symmetric, static_cast<uint32_t>(dtype));
        need[dtype == DType::kBFloat16] = layout.total_bytes;
        if (packed.numel() != layout.total_bytes) continue;
        w.packed.scale_dtype = dtype;
        w.layout = layout;
        w.blob = static_cast<const uint8_t*>(packed.const_data_ptr());
        return w;
    }
    ROSAQ_CHECK(false, op, ": packed: got ", packed.numel(), " bytes, need ", need[0],
                " (float16 scales) or ", need[1], " (bfloat16) for n ", n, ", k ", k, ", ", bits,
                " bits, group_size ", group_size, symmetric ? ", symmetric" : ", asymmetric", ", layout ",
                cuda::kLayoutVersion, "; prepack the weight on this device with this version of rosaq");
    return w;
}

CudaWeight read_cuda_blob(const char* op, const Tensor& packed) {
    check_blob_tensor(op, packed);
    ROSAQ_CHECK(packed.numel() > cuda::kHeaderBytes, op, ": packed: got ", packed.numel(),
                " bytes, need more than the ", cuda::kHeaderBytes, "-byte header");
    PackedHeader h;
    const cudaStream_t stream = current_stream(op, packed.get_device_index());
    check_cuda(op, cudaMemcpyAsync(&h, packed.const_data_ptr(), sizeof h, cudaMemcpyDeviceToHost, stream),
               "header");
    check_cuda(op, cudaStreamSynchronize(stream), "header");
    ROSAQ_CHECK(std::memcmp(h.magic, kCudaMagic, sizeof kCudaMagic) == 0, op,
                ": packed: got bytes that do not start with the mark of a CUDA blob, need one from "
                "rosaq::prepack on a "
                "CUDA device");
    ROSAQ_CHECK(h.layout_version == cuda::kLayoutVersion, op, ": packed: got layout version ",
                h.layout_version, ", need ", cuda::kLayoutVersion,
                " (prepack the weight again with this version of rosaq)");
    return parse_cuda_blob(op, packed, h.n, h.k, h.bits, h.group_size, h.symmetric == 1);
}

PackedHeader cuda_header(const CudaWeight& w) {
    PackedHeader h{};
    std::memcpy(h.magic, kCudaMagic, sizeof kCudaMagic);
    h.layout_version = cuda::kLayoutVersion;
    h.bits = static_cast<uint32_t>(w.packed.bits);
    h.symmetric = w.packed.symmetric ? 1 : 0;
    h.scale_dtype = static_cast<uint32_t>(w.packed.scale_dtype);
    h.n = w.packed.n, h.k = w.packed.k, h.group_size = w.packed.group_size;
    h.total_bytes = w.layout.total_bytes;
    return h;
}

}  // namespace rosaq::bind
