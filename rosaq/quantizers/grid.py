"""The integer grid of a group: scale, zero point, and the search for a tighter range.

Scales are rounded to float16 (as stored) before any code is chosen, so the codes belong to the stored grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosaq.config import QuantSpec

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros must not divide by zero
_SHRINK_STEPS = 24
_SHRINK_TO = 0.4  # smallest share of the full range that the search tries


class Grid(NamedTuple):
    """scale, zero: float32 [n, groups] (scale float16-representable, zero an integer in [0, 2**bits - 1])."""

    scale: Tensor
    zero: Tensor


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> Grid:
    top = 2**spec.bits - 1
    if spec.symmetric:
        zero = torch.full_like(low, 2 ** (spec.bits - 1))
        # codes reach -2**(b-1) below zero but only 2**(b-1) - 1 above, so the upper side sets the step
        scale = torch.maximum(high, -low) / (2 ** (spec.bits - 1) - 1)
    else:
        scale = (high - low) / top
    scale = scale.to(torch.float16).float().clamp_min(_SMALLEST_SCALE)
    if not spec.symmetric:
        zero = (-low / scale).round().clamp(0, top)
    return Grid(scale, zero)


def empty_grid(n: int, groups: int, spec: QuantSpec) -> Grid:
    """A grid [n, groups] that maps every code near zero: what a group without bulk columns keeps."""
    zero = torch.full((n, groups), float(2 ** (spec.bits - 1)))
    return Grid(torch.full((n, groups), _SMALLEST_SCALE), zero)


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
    best = _grid(low, high, spec)
    if not spec.clip:
        return best
    error = _error(w, best, spec.bits, importance)
    for step in range(1, _SHRINK_STEPS + 1):
        share = 1 - (1 - _SHRINK_TO) * step / _SHRINK_STEPS
        grid = _grid(low * share, high * share, spec)
        candidate = _error(w, grid, spec.bits, importance)
        better = candidate < error
        error = torch.where(better, candidate, error)
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
    return best


def _error(w: Tensor, grid: Grid, bits: int, importance: Tensor | None) -> Tensor:
    wide = Grid(grid.scale[..., None], grid.zero[..., None])
    square = (from_codes(to_codes(w, wide, bits), wide) - w).square_()
    return (square if importance is None else square * importance).sum(-1)
