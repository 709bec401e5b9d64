// The arguments of prepack, pack and unpack, checked once for every backend.
#pragma once

#include "checks.h"

namespace rosaq::bind {

// n, k, group size, bits, symmetry and scale dtype of a weight in the disk layout; raises unless the tensors
// make one.
PackedWeight check_disk_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                               const std::optional<Tensor>& zeros, int64_t bits);

void check_codes(const char* op, const Tensor& codes, int64_t bits);
void check_qweight(const char* op, const Tensor& qweight, int64_t bits);

}  // namespace rosaq::bind
