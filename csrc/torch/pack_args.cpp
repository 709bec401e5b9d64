#include "pack_args.h"

namespace rosaq::bind {

PackedWeight check_disk_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                               const std::optional<Tensor>& zeros, int64_t bits) {
    check_bits(op, bits);
    check_beside(op, "scales", scales, qweight);
    check_beside(op, "zeros", zeros, qweight);
    check_dtype(op, "qweight", qweight, {ScalarType::Int});
    check_dtype(op, "scales", scales, {ScalarType::Half, ScalarType::BFloat16});
    ROSAQ_CHECK(qweight.dim() == 2, op, ": qweight: got shape ", shape_text(qweight),
                ", need [n, k * bits / 32]");
    const int64_t n = qweight.size(0), words = qweight.size(1), k = words / bits * kBlockK;
    ROSAQ_CHECK(n > 0 && n % 8 == 0, op, ": qweight: got ", n, " rows, need a positive multiple of 8");
    ROSAQ_CHECK(words > 0 && words % bits == 0, op, ": qweight: got ", words,
                " words per row, need a positive multiple of ", bits, " (k is a multiple of 32)");
    ROSAQ_CHECK(scales.dim() == 2 && scales.size(0) == n && scales.size(1) > 0, op, ": scales: got shape ",
                shape_text(scales), ", need [", n, ", k / group_size]");
    const int64_t groups = scales.size(1);
    ROSAQ_CHECK(k % groups == 0 && k / groups % kBlockK == 0, op, ": scales: got ", groups, " groups for k ",
                k, ", need a group size k / groups that is a multiple of 32");
    if (zeros.has_value()) {
        check_dtype(op, "zeros", *zeros, {ScalarType::Byte});
        check_shape(op, "zeros", *zeros, {n, groups});
    }
    PackedWeight w;
    w.n = n, w.k = k, w.group_size = k / groups, w.bits = static_cast<int>(bits);
    w.symmetric = !zeros.has_value();
    w.scale_dtype = dtype_of(scales.scalar_type());
    return w;
}

void check_codes(const char* op, const Tensor& codes, int64_t bits) {
    check_bits(op, bits);
    check_dtype(op, "codes", codes, {ScalarType::Byte});
    ROSAQ_CHECK(codes.dim() == 2 && codes.size(1) % kBlockK == 0, op, ": codes: got shape ",
                shape_text(codes), ", need [n, k] with k a multiple of 32");
}

void check_qweight(const char* op, const Tensor& qweight, int64_t bits) {
    check_bits(op, bits);
    check_dtype(op, "qweight", qweight, {ScalarType::Int});
    ROSAQ_CHECK(qweight.dim() == 2 && qweight.size(1) % bits == 0, op, ": qweight: got shape ",
                shape_text(qweight), ", need [n, k * bits / 32] with k a multiple of 32");
}

}  // namespace rosaq::bind
