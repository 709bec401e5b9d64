"""Rounding inside a panel: a few columns that hear of each other one by one, all rows at once.

The loops over columns here define what is computed; the ops of `rosaq.ops` do it in one kernel, since a loop costs
some eight small operations a column. Which of the two runs is no matter of quality: every product, sum and quotient is
rounded on its own and in the order of the columns, so they agree to the last bit.

Panels are [p, n] float32, row j being column j of the weight: columns are read one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq import ops
from rosaq.quantizers.grid import Grid, from_codes, to_codes

MAX_PANEL = ops.MAX_PANEL


def round_panel(columns: Tensor, factor: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """GPTQ of columns [p, n] with one grid [n] and factor [p, p], whose upper triangle counts -> (codes, errors),
    both [p, n]. Column i is rounded once columns[i] -= factor[j, i] * errors[j] for all j < i, and errors[i] is what it
    lost by that, divided by factor[i, i]. By the op where this build has kernels for the device, else by the loop."""
    if ops.has_kernels(columns.device):
        return ops.round_panel(columns, factor, grid.scale, grid.zero, bits)
    return round_by_columns(columns, factor, grid, bits)


def round_by_columns(columns: Tensor, factor: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """`round_panel`, column after column."""
    columns, codes, errors = columns.clone(), torch.empty_like(columns), torch.empty_like(columns)
    for j, column in enumerate(columns):
        codes[j] = to_codes(column, grid, bits)
        errors[j] = (column - from_codes(codes[j], grid)) / factor[j, j]
        columns[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return codes, errors


def sweep_panel(slope: Tensor, codes: Tensor, gram: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Coordinate descent over codes [p, n] with a grid [p, n], slope [p, n], half the gradient of the loss, and gram
    [p, p] -> (codes, moves), both [p, n]. Column i takes its best codes once slope[i] += gram[j, i] * moves[j] for all
    j < i, and moves[i] is how far its weights go. By the op where this build has kernels for the device, else by the
    loop."""
    if ops.has_kernels(slope.device):
        return ops.sweep_panel(slope, codes, gram, grid.scale, grid.zero, bits)
    return sweep_by_columns(slope, codes, gram, grid, bits)


def sweep_by_columns(slope: Tensor, codes: Tensor, gram: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """`sweep_panel`, column after column."""
    slope, codes, moves = slope.clone(), codes.clone(), torch.empty_like(codes)
    for j, code in enumerate(codes):
        step = Grid(grid.scale[j], grid.zero[j])
        best = to_codes(from_codes(code, step) - slope[j] / gram[j, j], step, bits)
        moves[j] = (best - code) * step.scale
        codes[j] = best
        slope[j + 1 :] += gram[j, j + 1 :, None] * moves[j]
    return codes, moves
