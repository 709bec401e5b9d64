"""Round to nearest: every weight to the closest point of its group's grid."""

from __future__ import annotations

from torch import Tensor

from rosaq.quantizers.grid import Grid, fit_grid, to_codes
from rosaq.specs import QuantSpec


def rtn(w: Tensor, spec: QuantSpec, group_size: int) -> tuple[Tensor, Grid]:
    """w [n, k] float32 -> (codes [n, k] float32 integers, grid [n, k / group_size])."""
    groups = w.unflatten(1, (-1, group_size))
    grid = fit_grid(groups, spec)
    codes = to_codes(groups, Grid(grid.scale[..., None], grid.zero[..., None]), spec.bits)
    return codes.flatten(1), grid
