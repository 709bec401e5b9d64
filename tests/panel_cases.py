"""Panels to round, and what must hold of a rounded one: shared by the tests of the CPU, the emulator and the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tolerances import assert_panel_close
from torch import Tensor

from rosaq.quantizers.grid import Grid, from_codes, to_codes
from rosaq.quantizers.panels import round_by_columns, sweep_by_columns

SIZES = [(p, n) for p in (1, 7, 16, 33, 128) for n in (1, 8, 100, 576)]
# Of a step of the grid: nearer to the middle between two codes the rounding of float32 may decide.
HAIR = 2.0**-12

# Arguments that are right, to make one of them wrong.
ROUND: dict[str, Any] = {
    "columns": torch.zeros(4, 8),
    "factor": torch.eye(4),
    "scale": torch.ones(8),
    "zero": torch.zeros(8),
    "bits": 3,
}
SWEEP: dict[str, Any] = {
    "slope": torch.zeros(4, 8),
    "codes": torch.zeros(4, 8),
    "gram": torch.eye(4),
    "scale": torch.ones(4, 8),
    "zero": torch.zeros(4, 8),
    "bits": 3,
}


@dataclass
class Panel:
    """Second moments, their inverse's factor, and columns with a grid each; `round_panel` has the first one's."""

    columns: Tensor
    factor: Tensor
    gram: Tensor
    codes: Tensor
    grid: Grid
    bits: int

    @property
    def round_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        return self.columns, self.factor, self.grid.scale[0], self.grid.zero[0], self.bits

    @property
    def sweep_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """The columns are the slope here: any numbers will do."""
        return self.columns, self.codes, self.gram, *self.grid, self.bits

    def rounded(self) -> tuple[Tensor, Tensor]:
        """By the loop over columns."""
        columns, factor, scale, zero, bits = self.round_args
        return round_by_columns(columns, factor, Grid(scale, zero), bits)

    def swept(self) -> tuple[Tensor, Tensor]:
        return sweep_by_columns(self.columns, self.codes, self.gram, self.grid, self.bits)


def make_panel(p: int, n: int, bits: int = 3) -> Panel:
    x = torch.randn(3 * p + 8, p) * torch.linspace(0.3, 2, p)
    gram = x.T @ x / len(x) + 0.1 * torch.eye(p)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).contiguous()
    scale = 4 * (0.5 + torch.rand(p, n)) / 2**bits
    scale[:, ::3] *= -1  # as in symmetric grids
    grid = Grid(scale, torch.randint(0, 2**bits, (p, n)).float())
    return Panel(torch.randn(p, n), factor, gram, torch.randint(0, 2**bits, (p, n)).float(), grid, bits)


def check_codes(codes: Tensor, wanted: Tensor, grid: Grid, bits: int) -> None:
    """codes are the nearest to `wanted` float64, but where it lies in the middle between two up to a hair."""
    place = wanted / grid.scale + grid.zero
    best = to_codes(wanted, grid, bits)
    off = ((place - place.floor() - 0.5).abs() > HAIR) & (codes != best)
    assert not off.any(), f"codes {codes[off][:4].tolist()} at {place[off][:4].tolist()}"
    assert torch.all((codes - best).abs() <= 1)


def check_rounded(panel: Panel, codes: Tensor, errors: Tensor) -> None:
    """codes and errors [p, n] against float64, which follows the codes that were chosen."""
    columns, factor = panel.columns.double(), panel.factor.double()
    grid = Grid(panel.grid.scale[0].double(), panel.grid.zero[0].double())
    want = torch.empty_like(columns)
    for j in range(len(columns)):
        column = columns[j].clone()
        check_codes(codes[j].double(), column, grid, panel.bits)
        want[j] = (column - from_codes(codes[j].double(), grid)) / factor[j, j]
        columns[j + 1 :] -= torch.outer(factor[j, j + 1 :], want[j])
    assert_panel_close(errors, want)


def check_swept(panel: Panel, codes: Tensor, moves: Tensor) -> None:
    """The same of a sweep."""
    slope, gram = panel.columns.double(), panel.gram.double()
    want = torch.empty_like(slope)
    for j in range(len(slope)):
        grid = Grid(panel.grid.scale[j].double(), panel.grid.zero[j].double())
        before = from_codes(panel.codes[j].double(), grid)
        check_codes(codes[j].double(), before - slope[j] / gram[j, j], grid, panel.bits)
        want[j] = from_codes(codes[j].double(), grid) - before
        slope[j + 1 :] += torch.outer(gram[j, j + 1 :], want[j])
    assert_panel_close(moves, want)
