"""The only file with float tolerances. One rule: an op may lose at most twice what plain PyTorch loses in x's dtype.

The error of a column is its root mean square over the tokens, as a share of the root mean square of all of y: a mean
over columns would let one wrong column of thousands pass, and a column's own size is near zero when there is one token.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
# Never below a few units in the last place: plain PyTorch is sometimes exact by luck, with one token above all.
# Two engines, float32, the same kernel: attention and norms are summed in another order.
LOGPROB = 1e-3
FLOORS = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def worst_column_error(got: Tensor, want: Tensor) -> float:
    """Largest column error of got [..., n] against want float64 [..., n], relative to the RMS of want; 0 if empty."""
    if want.numel() == 0:
        return 0.0
    error = (got.double() - want).reshape(-1, want.size(-1)).pow(2).mean(0).sqrt().max()
    return float(error / want.pow(2).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny))


def assert_as_good_as(got: Tensor, plain: Tensor, want: Tensor) -> None:
    """got may be at most FACTOR times as wrong as `plain`, PyTorch's own result in got's dtype."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == plain.dtype, f"dtype {got.dtype}, want {plain.dtype}"
    limit = max(FACTOR * worst_column_error(plain, want), FLOORS[got.dtype])
    worst = worst_column_error(got, want)
    assert worst <= limit, f"worst column error {worst:.2e}, limit {limit:.2e}"


def assert_close_in(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """got equals want up to the rounding of `dtype` (the floor of the rule above)."""
    worst = worst_column_error(got, want.double())
    assert worst <= FLOORS[dtype], f"worst column error {worst:.2e}, limit {FLOORS[dtype]:.2e}"


def assert_panel_close(got: Tensor, want: Tensor) -> None:
    """What the rows of a panel pass on, float32: a column hears of up to 127 others, and each of them did before it."""
    limit = 8 * FLOORS[torch.float32]
    worst = worst_column_error(got, want)
    assert worst <= limit, f"worst column error {worst:.2e}, limit {limit:.2e}"


def assert_tight(got: Tensor, want: Tensor) -> None:
    """float64 algebra: equal up to a few thousand roundings of float64, relative to the largest magnitude."""
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= 2.0**-40, f"error {error:.2e}, limit {2.0**-40:.2e}"


def assert_same_function(got: Tensor, want: Tensor, stored_in: torch.dtype = torch.float32) -> None:
    """Two ways to compute a block or a model: equal up to the roundings of many layers, each a floor of `stored_in`."""
    limit = 16 * FLOORS[stored_in]
    worst = worst_column_error(got, want.double())
    assert worst <= limit, f"worst column error {worst:.2e}, limit {limit:.2e}"


def assert_mma_close(got: Tensor, want: Tensor) -> None:
    """One m16n8k16 product of standard normals: 17 terms, which a tensor core may cut at 2^-23."""
    limit = 2.0**-18
    worst = float((got.double() - want.double()).abs().max())
    assert worst <= limit, f"worst error {worst:.2e}, limit {limit:.2e}"


def assert_gram_close(got: Tensor, want: Tensor) -> None:
    """Second moments: an entry may be wrong by 2**-20 of the geometric mean of its two channels' energies."""
    energy = torch.diagonal(want).double().sqrt()
    worst = ((got.double() - want.double()).abs() / torch.outer(energy, energy)).max()
    assert worst <= 2.0**-20, f"error {worst:.2e}, limit {2.0**-20:.2e}"


def assert_int8_close(got: Tensor, want: Tensor) -> None:
    """Activations rounded to 127 levels of a chunk's largest: 6.5e-3 of y's norm for normal x, measured.

    Over all of y, since a column of one token scatters; one wrong column of 40 would be 0.16.
    """
    limit = 2.0**-6
    error = float((got.double() - want).norm() / want.norm())
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"


def assert_same_quality(got: float, want: float, *, bf16: bool = False) -> None:
    """A divergence of one device is no worse than that of another: by a tenth, or where calibration multiplies in
    bfloat16 by three tenths. Measured on the CPU on models this small, attention fused or not: 0.4 % and 12 %."""
    limit = (1.3 if bf16 else 1.1) * want
    assert 0 < got <= limit, f"divergence {got:.4g}, limit {limit:.4g}"
