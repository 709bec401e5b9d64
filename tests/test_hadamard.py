"""Hadamard matrices by construction: orthogonal at every size that is offered, refused elsewhere."""

import pytest
import torch

from rosaq.rotation import hadamard, has_hadamard

SIZES = [1, 2, 4, 8, 12, 20, 28, 36, 44, 64, 76, 96, 128, 144, 148, 576, 896, 960]


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_rows_are_orthogonal_and_binary(n):
    h = hadamard(n)
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.equal(h.T @ h, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 10, 18, 52, 92, 0, -4])
def test_hadamard_refuses_sizes_without_a_construction(n):
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"got size {n}"):
        hadamard(n)


def test_real_hidden_sizes_have_a_matrix():
    assert all(has_hadamard(n) for n in (576, 896, 960, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 11008, 14336))
