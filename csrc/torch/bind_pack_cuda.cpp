// prepack, unprepack, pack, unpack on CUDA. None is on the way of a token: unprepack and pack look at data
// and wait.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../launch/launch.h"
#include "cuda_context.h"
#include "cuda_weight.h"
#include "pack_args.h"

namespace rosaq::bind {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor empty_on(const Tensor& device_of, std::initializer_list<int64_t> sizes, ScalarType type) {
    const std::vector<int64_t> shape(sizes);
    return torch::stable::empty(shape, type, std::nullopt, device_of.device());
}

cuda::DiskWeight disk_of(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros) {
    const auto data = [](const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
    return {static_cast<uint32_t*>(data(qweight)), static_cast<uint16_t*>(data(scales)),
            zeros.has_value() ? static_cast<uint8_t*>(data(*zeros)) : nullptr};
}

Tensor prepack(const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros, int64_t bits) {
    const char* op = "rosaq::prepack";
    check_is_cuda(op, "qweight", qweight);
    CudaWeight w;
    w.packed = check_disk_weight(op, qweight, scales, zeros, bits);
    ROSAQ_CHECK(cuda::is_group_size(w.packed.group_size, w.packed.k), op, ": scales: got a group size of ",
                w.packed.group_size, " for k ", w.packed.k, ", need 32, 64, 128 or k on CUDA");
    check_cuda_size(op, w.packed.n, w.packed.k);
    w.layout = cuda::blob_layout(w.packed.n, w.packed.k, w.packed.bits, w.packed.group_size,
                                 w.packed.symmetric, static_cast<uint32_t>(w.packed.scale_dtype));
    const int device = qweight.get_device_index();
    const DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(op, device);
    device_facts(op, device);
    launch_counters(op, device, stream);  // allocated here rather than by the first token

    const Tensor q = dense(qweight), s = dense(scales);
    const std::optional<Tensor> z = dense(zeros);
    Tensor packed = empty_on(qweight, {w.layout.total_bytes}, ScalarType::Byte);
    auto* blob = static_cast<uint8_t*>(packed.mutable_data_ptr());
    const PackedHeader header = cuda_header(w);
    check_cuda(op, cudaMemsetAsync(blob, 0, cuda::kHeaderBytes, stream), "header");
    check_cuda(op, cudaMemcpyAsync(blob, &header, sizeof header, cudaMemcpyHostToDevice, stream), "header");
    check_cuda(op, cuda::prepack(disk_of(q, s, z), w.shape(), w.packed.bits, blob, stream),
               "prepack_codes_kernel");
    return packed;
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> unprepack(const Tensor& packed) {
    const char* op = "rosaq::unprepack";
    const int device = packed.get_device_index();
    const DeviceGuard guard(device);
    const CudaWeight w = read_cuda_blob(op, packed);
    const cuda::BlobShape shape = w.shape();
    Tensor qweight = empty_on(packed, {shape.n, shape.k / kBlockK * w.packed.bits}, ScalarType::Int);
    Tensor scales =
        empty_on(packed, {shape.n, shape.groups},
                 w.packed.scale_dtype == DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16);
    std::optional<Tensor> zeros;
    if (!shape.symmetric) zeros = empty_on(packed, {shape.n, shape.groups}, ScalarType::Byte);
    check_cuda(op,
               cuda::unprepack(w.blob, shape, w.packed.bits, disk_of(qweight, scales, zeros),
                               current_stream(op, device)),
               "unprepack_codes_kernel");
    return {qweight, scales, zeros};
}

Tensor pack(const Tensor& codes, int64_t bits) {
    const char* op = "rosaq::pack";
    check_codes(op, codes, bits);
    const int device = codes.get_device_index();
    const DeviceGuard guard(device);
    const int64_t n = codes.size(0), k = codes.size(1);
    const Tensor c = dense(codes);
    if (n * k != 0) {
        const Tensor top = torch::stable::to(torch::stable::amax(torch::stable::flatten(c), 0, false),
                                             torch::stable::Device(torch::headeronly::DeviceType::CPU));
        const int largest = *static_cast<const uint8_t*>(top.const_data_ptr());
        ROSAQ_CHECK(largest >> bits == 0, op, ": codes: got ", largest, ", need 0 to ", (1 << bits) - 1);
    }
    Tensor qweight = empty_on(codes, {n, k / kBlockK * bits}, ScalarType::Int);
    check_cuda(op,
               cuda::pack_codes(static_cast<uint8_t*>(const_cast<void*>(c.const_data_ptr())),
                                static_cast<uint32_t*>(qweight.mutable_data_ptr()), n * k / kBlockK,
                                static_cast<int>(bits), current_stream(op, device)),
               "disk_codes_kernel");
    return qweight;
}

Tensor unpack(const Tensor& qweight, int64_t bits) {
    const char* op = "rosaq::unpack";
    check_qweight(op, qweight, bits);
    const int device = qweight.get_device_index();
    const DeviceGuard guard(device);
    const int64_t n = qweight.size(0), k = qweight.size(1) / bits * kBlockK;
    const Tensor q = dense(qweight);
    Tensor codes = empty_on(qweight, {n, k}, ScalarType::Byte);
    check_cuda(op,
               cuda::unpack_codes(static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                  static_cast<uint32_t*>(const_cast<void*>(q.const_data_ptr())),
                                  n * k / kBlockK, static_cast<int>(bits), current_stream(op, device)),
               "disk_codes_kernel");
    return codes;
}

}  // namespace
}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CUDA, m) {
    m.impl("prepack", TORCH_BOX(&rosaq::bind::prepack));
    m.impl("unprepack", TORCH_BOX(&rosaq::bind::unprepack));
    m.impl("pack", TORCH_BOX(&rosaq::bind::pack));
    m.impl("unpack", TORCH_BOX(&rosaq::bind::unpack));
}
