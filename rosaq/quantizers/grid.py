"""The integer grid of a group: scale, zero point, and the search for a tighter range.

Scales are rounded to float16 (as stored) before any code is chosen, so the codes belong to the stored grid.

A symmetric grid has one level more below zero than above it, and its scale may be negative: then the extra level is on
the upper side. The sign costs nothing (float16 has one) and lets a group put the level where its long tail is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosaq.specs import QuantSpec

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros must not divide by zero
_SHRINK_STEPS = 24
_SHRINK_TO = 0.4  # smallest share of the full range that the search tries


class Grid(NamedTuple):
    """scale, zero: float32 [n, groups] (scale float16-representable and not 0, negative only in symmetric grids; zero
    in [0, 2**bits - 1], whole or, with `QuantSpec.half_zeros`, a multiple of 1/2)."""

    scale: Tensor
    zero: Tensor


def _grids(low: Tensor, high: Tensor, spec: QuantSpec) -> list[Grid]:
    """The grids that reach from `low` <= 0 to `high` >= 0: one; for symmetric grids one of either sign; with half zeros
    one more, whose levels stand evenly around 0, as a row without outliers wants them."""
    top = 2**spec.bits - 1
    if not spec.symmetric:
        scale = _stored((high - low) / top)
        if spec.half_zeros:
            exact = -low / scale
            return [
                Grid(scale, exact.mul(2).round().div(2).clamp(0, top)),
                Grid(_stored(torch.maximum(-low, high) * 2 / top), torch.full_like(low, top / 2)),
            ]
        return [Grid(scale, (-low / scale).round().clamp(0, top))]
    below, above = 2 ** (spec.bits - 1), 2 ** (spec.bits - 1) - 1  # levels on either side of zero
    zero = torch.full_like(low, below)
    upright = _stored(torch.maximum(-low / below, high / above))
    mirrored = _stored(torch.maximum(high / below, -low / above))
    return [Grid(upright, zero), Grid(-mirrored, zero)]


def _stored(scale: Tensor) -> Tensor:
    return scale.to(torch.float16).float().clamp_min(_SMALLEST_SCALE)


def empty_grid(n: int, groups: int, spec: QuantSpec, device: torch.device) -> Grid:
    """A grid [n, groups] that maps every code near zero: what a group without bulk columns keeps."""
    zero = torch.full((n, groups), float(2 ** (spec.bits - 1)), device=device)
    return Grid(torch.full_like(zero, _SMALLEST_SCALE), zero)


def to_codes(w: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest codes, float32 integers in [0, 2**bits - 1]; w broadcasts against the grid."""
    return (w / grid.scale + grid.zero).round_().clamp_(0, 2**bits - 1)


def from_codes(codes: Tensor, grid: Grid) -> Tensor:
    """(codes - zero) * scale, the stored meaning of a code."""
    return (codes - grid.zero) * grid.scale


def fit_grid(w: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Grid:
    """The grid of groups w [n, groups, group_size] float32: min and max, or (spec.clip) the shrunken range with the
    least squared error, weighted by importance [groups, group_size] (second moments of the inputs) if given."""
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)  # zero stays representable
    best, *others = _grids(low, high, spec)
    for other in others:  # without clipping the finer of the grids that hold everything
        is_finer = other.scale.abs() < best.scale
        best = Grid(torch.where(is_finer, other.scale, best.scale), torch.where(is_finer, other.zero, best.zero))
    if not spec.clip:
        return best
    error = _error(w, best, spec.bits, importance)
    for step in range(1, _SHRINK_STEPS + 1):
        share = 1 - (1 - _SHRINK_TO) * step / _SHRINK_STEPS
        for grid in _grids(low * share, high * share, spec):
            candidate = _error(w, grid, spec.bits, importance)
            better = candidate < error
            error = torch.where(better, candidate, error)
            best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
    return best


def _error(w: Tensor, grid: Grid, bits: int, importance: Tensor | None) -> Tensor:
    wide = Grid(grid.scale[..., None], grid.zero[..., None])
    square = (from_codes(to_codes(w, wide, bits), wide) - w).square_()
    return (square if importance is None else square * importance).sum(-1)
