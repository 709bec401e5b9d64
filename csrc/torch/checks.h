// Argument checks. Every message names op, argument, what it got and what it needs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include "../common/params.h"

namespace rosaq::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Also for the result of torch's C functions (0 where they succeed): torch's own macro for that is not called
// the same in 2.11 as in 2.13.
#define ROSAQ_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline std::string shape_text(const Tensor& t) {
    std::ostringstream out;
    out << '[';
    for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
    out << ']';
    return out.str();
}

inline const char* dtype_text(ScalarType type) {
    return torch::headeronly::toString(type);
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
    ROSAQ_CHECK(t.is_cpu(), op, ": ", name,
                ": got a tensor that is not on the CPU, need one beside the other arguments");
}

inline void check_is_cuda(const char* op, const char* name, const Tensor& t) {
    ROSAQ_CHECK(t.is_cuda(), op, ": ", name, ": got a tensor on the CPU, need it beside the CUDA tensors");
}

inline std::string device_text(const Tensor& t) {
    return t.is_cpu() ? "the CPU" : "device " + std::to_string(t.get_device_index());
}

// Raises unless t, if there is one, is on the device of x.
inline void check_beside(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
    if (!t.has_value()) return;
    const bool same = t->is_cpu() == x.is_cpu() && t->is_cuda() == x.is_cuda() &&
                      (x.is_cpu() || t->get_device_index() == x.get_device_index());
    ROSAQ_CHECK(same, op, ": ", name, ": got a tensor on ", device_text(*t), ", need it beside x on ",
                device_text(x));
}

// Text is made only where a check fails: a stream costs as much as a small product.
inline void check_dtype(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<ScalarType> allowed) {
    for (const ScalarType type : allowed)
        if (t.scalar_type() == type) return;
    std::ostringstream need;
    for (const ScalarType type : allowed) need << (need.tellp() > 0 ? ", " : "") << dtype_text(type);
    ROSAQ_CHECK(false, op, ": ", name, ": got dtype ", dtype_text(t.scalar_type()), ", need ", need.str());
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> want) {
    bool same = t.dim() == static_cast<int64_t>(want.size());
    int64_t i = 0;
    for (const int64_t size : want) same = same && t.size(i++) == size;
    if (same) return;
    std::ostringstream need;
    for (const int64_t size : want) need << (need.tellp() > 0 ? ", " : "") << size;
    ROSAQ_CHECK(false, op, ": ", name, ": got shape ", shape_text(t), ", need [", need.str(), "]");
}

inline void check_bits(const char* op, int64_t bits) {
    ROSAQ_CHECK(bits == 3 || bits == 4, op, ": bits: got ", bits, ", need 3 or 4");
}

inline DType dtype_of(ScalarType type) {
    return type == ScalarType::Half       ? DType::kFloat16
           : type == ScalarType::BFloat16 ? DType::kBFloat16
                                          : DType::kFloat32;
}

// The tensor itself or a contiguous copy of it.
inline Tensor dense(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

inline Buffer buffer_of(const Tensor& t) {
    return {t.const_data_ptr(), dtype_of(t.scalar_type())};
}

// The weight described by a blob's header. Checks that it is one, is whole, and is of this layout version.
PackedWeight parse_blob(const char* op, const Tensor& packed);

}  // namespace rosaq::bind
