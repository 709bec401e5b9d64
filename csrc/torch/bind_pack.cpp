// prepack, unprepack, pack, unpack on the CPU.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "../cpu/pack.h"
#include "../cpu/pages.h"
#include "pack_args.h"

namespace rosaq::bind {

namespace {

constexpr int64_t kRowGrain = 16;

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType type) {
    const std::vector<int64_t> shape(sizes);
    return torch::stable::empty(shape, type);
}

// A blob of a huge page and more starts on one: up to there it would lie in 4 KB pages. The memory before it
// is never touched, so it takes addresses only.
Tensor empty_blob(int64_t bytes) {
    constexpr int64_t page = cpu::kHugePageBytes;
    if (page == 0 || bytes < page) return empty_cpu({bytes}, ScalarType::Byte);
    Tensor room = empty_cpu({bytes + page}, ScalarType::Byte);
    const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(room.const_data_ptr()));
    Tensor blob = torch::stable::narrow(room, 0, round_up(at, page) - at, bytes);
    cpu::ask_huge_pages(blob.mutable_data_ptr(), bytes);
    return blob;
}

}  // namespace

PackedWeight parse_blob(const char* op, const Tensor& packed) {
    check_cpu(op, "packed", packed);
    check_dtype(op, "packed", packed, {ScalarType::Byte});
    ROSAQ_CHECK(packed.dim() == 1 && packed.is_contiguous(), op, ": packed: got shape ", shape_text(packed),
                packed.is_contiguous() ? "" : " (not contiguous)",
                ", need a contiguous 1-D blob from rosaq::prepack");
    const int64_t bytes = packed.numel();
    ROSAQ_CHECK(bytes >= kHeaderBytes, op, ": packed: got ", bytes, " bytes, need at least the ",
                kHeaderBytes, "-byte header");
    const auto* data = static_cast<const uint8_t*>(packed.const_data_ptr());
    PackedHeader h;
    std::memcpy(&h, data, sizeof h);
    ROSAQ_CHECK(std::memcmp(h.magic, kMagic, sizeof kMagic) == 0, op,
                ": packed: got bytes that do not start with the rosaq mark, need a blob from rosaq::prepack");
    ROSAQ_CHECK(h.layout_version == kLayoutVersion, op, ": packed: got layout version ", h.layout_version,
                ", need ", kLayoutVersion, " (prepack the weight again with this version of rosaq)");
    const bool sane = (h.bits == 3 || h.bits == 4) && h.symmetric <= 1 && h.scale_dtype <= 1 && h.n > 0 &&
                      h.k > 0 && h.n < int64_t{1} << 31 && h.k < int64_t{1} << 31 && h.group_size > 0 &&
                      h.group_size % kBlockK == 0 && h.k % h.group_size == 0;
    ROSAQ_CHECK(sane, op, ": packed: got a damaged header (bits ", h.bits, ", n ", h.n, ", k ", h.k,
                ", group_size ", h.group_size, "), need a blob from rosaq::prepack");
    PackedWeight w;
    w.panels = data + kHeaderBytes;
    w.n = h.n, w.k = h.k, w.group_size = h.group_size;
    w.bits = static_cast<int>(h.bits);
    w.symmetric = h.symmetric == 1;
    w.scale_dtype = static_cast<DType>(h.scale_dtype);
    w.layout = panel_layout(w.n, w.k, w.bits, w.group_size, w.symmetric);
    ROSAQ_CHECK(bytes == w.layout.total_bytes && h.total_bytes == bytes, op, ": packed: got ", bytes,
                " bytes, need ", w.layout.total_bytes, " for n ", w.n, ", k ", w.k, ", ", w.bits, " bits");
    return w;
}

Tensor prepack(const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros, int64_t bits) {
    const char* op = "rosaq::prepack";
    check_cpu(op, "qweight", qweight);
    PackedWeight w = check_disk_weight(op, qweight, scales, zeros, bits);
    w.layout = panel_layout(w.n, w.k, w.bits, w.group_size, w.symmetric);

    const Tensor q = dense(qweight), s = dense(scales);
    const std::optional<Tensor> z = dense(zeros);
    Tensor packed = empty_blob(w.layout.total_bytes);
    auto* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
    const PackedHeader header = cpu::make_header(w);
    std::memcpy(data, &header, sizeof header);
    const cpu::DiskWeight disk{static_cast<const uint32_t*>(q.const_data_ptr()),
                               static_cast<const uint16_t*>(s.const_data_ptr()),
                               z.has_value() ? static_cast<const uint8_t*>(z->const_data_ptr()) : nullptr};
    torch::stable::parallel_for(0, w.layout.num_panels, 1, [&](int64_t begin, int64_t end) {
        cpu::prepack_panels(disk, w, data + kHeaderBytes, begin, end);
    });
    return packed;
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> unprepack(const Tensor& packed) {
    const PackedWeight w = parse_blob("rosaq::unprepack", packed);
    const int64_t groups = w.layout.groups;
    Tensor qweight = empty_cpu({w.n, w.k / kBlockK * w.bits}, ScalarType::Int);
    Tensor scales =
        empty_cpu({w.n, groups}, w.scale_dtype == DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16);
    std::optional<Tensor> zeros;
    if (!w.symmetric) zeros = empty_cpu({w.n, groups}, ScalarType::Byte);
    const cpu::MutableDiskWeight disk{
        static_cast<uint32_t*>(qweight.mutable_data_ptr()), static_cast<uint16_t*>(scales.mutable_data_ptr()),
        zeros.has_value() ? static_cast<uint8_t*>(zeros->mutable_data_ptr()) : nullptr};
    torch::stable::parallel_for(0, w.layout.num_panels, 1, [&](int64_t begin, int64_t end) {
        cpu::unprepack_panels(w, disk, begin, end);
    });
    return {qweight, scales, zeros};
}

Tensor pack(const Tensor& codes, int64_t bits) {
    const char* op = "rosaq::pack";
    check_cpu(op, "codes", codes);
    check_codes(op, codes, bits);
    const int64_t n = codes.size(0), k = codes.size(1);
    const Tensor c = dense(codes);
    const auto* in = static_cast<const uint8_t*>(c.const_data_ptr());
    uint8_t all = 0;
    for (int64_t i = 0; i < n * k; ++i) all = static_cast<uint8_t>(all | in[i]);
    if (all >> bits != 0)
        for (int64_t i = 0; i < n * k; ++i)
            ROSAQ_CHECK(in[i] >> bits == 0, op, ": codes: got ", int{in[i]}, " at [", i / k, ", ", i % k,
                        "], need 0 to ", (1 << bits) - 1);
    Tensor qweight = empty_cpu({n, k / kBlockK * bits}, ScalarType::Int);
    auto* out = static_cast<uint32_t*>(qweight.mutable_data_ptr());
    torch::stable::parallel_for(0, n, kRowGrain, [&](int64_t begin, int64_t end) {
        cpu::pack_rows(in, out, k, static_cast<int>(bits), begin, end);
    });
    return qweight;
}

Tensor unpack(const Tensor& qweight, int64_t bits) {
    const char* op = "rosaq::unpack";
    check_cpu(op, "qweight", qweight);
    check_qweight(op, qweight, bits);
    const int64_t n = qweight.size(0), k = qweight.size(1) / bits * kBlockK;
    const Tensor q = dense(qweight);
    Tensor codes = empty_cpu({n, k}, ScalarType::Byte);
    const auto* in = static_cast<const uint32_t*>(q.const_data_ptr());
    auto* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
    torch::stable::parallel_for(0, n, kRowGrain, [&](int64_t begin, int64_t end) {
        cpu::unpack_rows(in, out, k, static_cast<int>(bits), begin, end);
    });
    return codes;
}

}  // namespace rosaq::bind

STABLE_TORCH_LIBRARY_IMPL(rosaq, CPU, m) {
    m.impl("prepack", TORCH_BOX(&rosaq::bind::prepack));
    m.impl("unprepack", TORCH_BOX(&rosaq::bind::unprepack));
    m.impl("pack", TORCH_BOX(&rosaq::bind::pack));
    m.impl("unpack", TORCH_BOX(&rosaq::bind::unpack));
}
