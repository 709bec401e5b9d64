"""Orthogonal matrices: random ones, principal axes, and the shared online block."""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq.rotation.hadamard import hadamard, has_hadamard

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
_KRYLOV_STEPS, _SPARE_AXES = 12, 4
_BLOCK_BUDGET = 0.05  # bits per weight; at 0.074 a block of 64 gained nothing over one of 32 (576 x 1536)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """R [n, n] float64, R Rᵀ = I: a randomised Hadamard matrix where one can be constructed, else Haar-distributed.

    Hadamard entries all have magnitude 1/sqrt(n), so no weight column keeps an outlier; Haar is near that.
    """
    if has_hadamard(n):
        signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
        mixed: Tensor = signs[:, None] * hadamard(n) / n**0.5
        return mixed
    gauss = torch.randn(n, n, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(gauss)
    haar: Tensor = basis * torch.sign(torch.diagonal(upper))  # without the signs QR is not uniform over rotations
    return haar


def principal_axes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-decomposition of second moments [k, k] float64: (values [k] descending, axes [k, k] as columns).

    The sign of every axis is fixed (its largest entry is positive), so the result does not depend on the LAPACK used.
    """
    values, axes = torch.linalg.eigh(gram)
    return values.flip(0), _signed(axes.flip(1))


def leading_axes(gram: Tensor, count: int) -> Tensor:
    """The first `count` principal axes of second moments [k, k] float64, as orthonormal columns [k, count].

    From a Krylov space where that is much smaller than gram: for 2 of 1536 axes a sixteenth of the time. Axes that
    stand out are exact to many digits; where eigenvalues are nearly equal it is some basis that holds as much energy
    within two per cent.
    """
    k, block = len(gram), count + _SPARE_AXES
    if _KRYLOV_STEPS * block * 3 >= k:
        return principal_axes(gram)[1][:, :count]
    new = torch.randn(k, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gram.device)
    space = new[:, :0]
    for _ in range(_KRYLOV_STEPS):
        space = torch.cat([space, torch.linalg.qr(new)[0]], 1)
        new = gram @ space[:, -block:]
        for _ in range(2):  # once leaves what was rounded
            new = new - space @ (space.T @ new)
    space = torch.linalg.qr(space)[0]  # orthonormal even where gram has fewer directions than the space
    inside = torch.linalg.eigh(space.T @ gram @ space)[1].flip(1)
    return _signed(space @ inside[:, :count])


def _signed(axes: Tensor) -> Tensor:
    """`axes` themselves, each turned so that its largest entry is positive: a copy would be another [k, k]."""
    largest = axes.abs().argmax(0)
    return axes.mul_(torch.sign(axes[largest, torch.arange(axes.shape[1], device=axes.device)]))


def pca_random_tail(axes: Tensor, num_principal: int, generator: torch.Generator) -> Tensor:
    """R = [U_r | U_rest · random] [k, k] float64 of principal axes U: the first r, an incoherent basis of the rest.

    The tail is mixed so that GPTQ's error feedback has correlations to use: in exact principal axes the second
    moments are diagonal and GPTQ is round to nearest.
    """
    tail = axes[:, num_principal:]
    mixed = tail @ random_orthogonal(tail.shape[1], generator).to(tail.device)
    return torch.cat([axes[:, :num_principal], mixed], dim=1)


def shared_hadamard_block(in_features: int, out_features: int) -> Tensor:
    """One Hadamard block [1, b, b] float16 for t = x · blockdiag(block, ..., block): b is the largest power of 2 up to
    128 that divides in_features and costs at most 0.05 bit per weight of the linear it is stored with.

    Rounded to float16 as stored: 1/sqrt(b) is exact only for even powers of 2, so weights must be rotated with the
    inverse of the stored block (`inverse_transpose`), not with the ideal one.
    """
    if in_features % _SMALLEST_BLOCK:
        raise ValueError(f"hadamard block: got in_features {in_features}, need a multiple of {_SMALLEST_BLOCK}")
    size, budget = _SMALLEST_BLOCK, _BLOCK_BUDGET * in_features * out_features
    while size < _LARGEST_BLOCK and in_features % (2 * size) == 0 and 16 * (2 * size) ** 2 <= budget:
        size *= 2
    block: Tensor = hadamard(size) / size**0.5
    return block.to(torch.float16)[None]


def inverse_transpose(rotation: Tensor) -> Tensor:
    """R⁻ᵀ of every block [B, b, b] in float64: with t = x R, the weight W becomes W R⁻ᵀ (equal to W R only for an
    exactly orthogonal R)."""
    inverse: Tensor = torch.linalg.inv(rotation.double())
    return inverse.transpose(-1, -2)


def rotate_blocks(x: Tensor, rotation: Tensor) -> Tensor:
    """x [..., k] · blockdiag(rotation [B, b, b]) -> [..., k], in x's dtype; B is k / b, or 1 to share the block."""
    blocks = x.unflatten(-1, (-1, rotation.shape[-1]))
    rot = rotation.to(x.dtype)
    rotated: Tensor = blocks @ rot[0] if rot.shape[0] == 1 else torch.einsum("...ij,ijk->...ik", blocks, rot)
    return rotated.flatten(-2)
