"""The float64 oracle against sums written out by hand, and the rule that judges kernels by it."""

from __future__ import annotations

import pytest
import torch
from cases import make_linear, random_rotation
from tolerances import assert_as_good_as, assert_close_in

from rosaq import reference


def test_reference_is_the_equation_written_out() -> None:
    linear = make_linear(8, 64, 3, 32, symmetric=False)
    rotation = random_rotation(2, 32).transpose(1, 2).contiguous()
    index, c, bias = torch.tensor([40, 3], dtype=torch.int32), torch.randn(8, 2).half(), torch.randn(8)
    x = torch.randn(3, 64)
    got = reference.fused_gemm(
        x, linear.qweight, linear.scales, linear.zeros, 3, c, salient_index=index, rotation=rotation, bias=bias
    )
    w = linear.dequantized(torch.float64)
    for m in range(3):
        t = [
            sum(float(x[m, j // 32 * 32 + i]) * float(rotation[j // 32, i, j % 32]) for i in range(32))
            for j in range(64)
        ]
        for n in range(8):
            y = sum(t[j] * float(w[n, j]) for j in range(64)) + t[40] * float(c[n, 0]) + t[3] * float(c[n, 1])
            assert_close_in(got[m, n : n + 1], torch.tensor([y + float(bias[n])]), torch.float32)


def test_shared_rotation_is_the_block_repeated() -> None:
    linear, x, shared = make_linear(8, 96), torch.randn(2, 96), random_rotation(1, 32)
    args = (x, linear.qweight, linear.scales, None, 4)
    one = reference.fused_gemm(*args, rotation=shared)
    assert torch.equal(one, reference.fused_gemm(*args, rotation=shared.expand(3, 32, 32)))


def test_basis_of_unit_vectors_is_an_index() -> None:
    linear, x, c = make_linear(8, 64), torch.randn(2, 5, 64), torch.randn(8, 2)
    args = (x, linear.qweight, linear.scales, None, 4, c)
    index = torch.tensor([9, 60], dtype=torch.int32)
    basis = torch.eye(64)[:, index]
    by_index = reference.fused_gemm(*args, salient_index=index)
    assert by_index.shape == (2, 5, 8)
    assert torch.equal(by_index, reference.fused_gemm(*args, salient_basis=basis))


def test_the_rule_sees_one_wrong_column_of_thousands() -> None:
    want = torch.randn(4, 4096, dtype=torch.float64)
    got = want.half()
    assert_as_good_as(got, want.half(), want)
    got[:, 17] *= 1.1
    with pytest.raises(AssertionError, match="worst column error"):
        assert_as_good_as(got, want.half(), want)
