"""Improve a finished quantisation without a single bit more: refit what is continuous, then revisit the codes.

Both steps lower the same loss tr(D G Dᵀ), D = Ŵ - W, so alternating them can only help. GPTQ decides every code once,
knowing only the errors before it; here a code is chosen again knowing all the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq.quantizers.grid import Grid, from_codes
from rosaq.quantizers.panels import MAX_PANEL, sweep_panel

_PULL = 1e-6  # of each diagonal: keeps a group whose codes are all zero points at its current scale


def refine(
    w: Tensor,
    gram: Tensor,
    codes: Tensor,
    grid: Grid,
    salient_weight: Tensor,
    salient: Tensor,
    bits: int,
    rounds: int,
) -> tuple[Tensor, Grid, Tensor]:
    """`rounds` of refitting scales and salient weights, and a sweep over all codes; ends with a refit.

    w [n, k] float32, gram [k, k] float64 with its damping, codes [n, k] float32 integers, salient bool [k]
    -> (codes, grid, salient weights) of the same shapes; the zero points stay.
    """
    target = w.double() @ gram
    for _ in range(rounds):
        grid, salient_weight = refit_scales(target, gram, codes, grid, salient_weight, salient)
        codes = sweep_codes(w, gram, codes, grid, salient_weight, salient, bits)
    grid, salient_weight = refit_scales(target, gram, codes, grid, salient_weight, salient)
    return codes, grid, salient_weight


def _widened(grid: Grid, k: int) -> Grid:
    """The grid per column instead of per group: [n, k]."""
    size = k // grid.scale.shape[1]
    return Grid(grid.scale.repeat_interleave(size, 1), grid.zero.repeat_interleave(size, 1))


def stored_weight(codes: Tensor, grid: Grid, salient_weight: Tensor, salient: Tensor) -> Tensor:
    """The [n, k] float32 weight that codes [n, k], their grid and salient weights [n, r] stand for, once stored."""
    w_hat = from_codes(codes, _widened(grid, codes.shape[1]))
    w_hat[:, salient] += beside_codes(codes, grid, salient_weight, salient).float()
    return w_hat


def beside_codes(codes: Tensor, grid: Grid, salient_weight: Tensor, salient: Tensor) -> Tensor:
    """What is stored of salient weights [n, r], float16 [n, r]: all but what the codes of those columns stand for (0,
    or half a step where the zero point lies between two codes)."""
    index = torch.nonzero(salient).flatten()
    group = index // (codes.shape[1] // grid.scale.shape[1])
    return (salient_weight - from_codes(codes[:, index], Grid(grid.scale[:, group], grid.zero[:, group]))).half()


def refit_scales(
    target: Tensor, gram: Tensor, codes: Tensor, grid: Grid, salient_weight: Tensor, salient: Tensor
) -> tuple[Grid, Tensor]:
    """Scales [n, groups] and salient weights [n, r] that minimise the loss for the given codes: one small
    least-squares problem a row, groups + r unknowns. A scale that would change its sign keeps its value.

    target [n, k] float64: W G. Some rows at once: their problems together hold a third of the
    weight's numbers at most.
    """
    n, k = codes.shape
    rows = max(1, n * k // (3 * (grid.scale.shape[1] + int(salient.sum())) ** 2))
    whole = (target, codes, grid.scale, grid.zero, salient_weight)
    found = [
        _refit_rows(own, gram, code, Grid(scale, zero), weight, salient)
        for own, code, scale, zero, weight in zip(*(tensor.split(rows) for tensor in whole), strict=True)
    ]
    return Grid(torch.cat([scale for scale, _ in found]), grid.zero), torch.cat([weight for _, weight in found])


def _refit_rows(
    target: Tensor, gram: Tensor, codes: Tensor, grid: Grid, salient_weight: Tensor, salient: Tensor
) -> tuple[Tensor, Tensor]:
    """(scales, salient weights) of some rows, as `refit_scales`."""
    n, k = codes.shape
    groups, index = grid.scale.shape[1], torch.nonzero(salient).flatten()
    size, r = k // groups, len(index)
    steps = (codes - _widened(grid, k).zero).double()  # [n, k]: the weight in units of its scale
    steps[:, index] = 0
    matrix = torch.empty(n, groups + r, groups + r, dtype=torch.float64, device=codes.device)
    for group in range(groups):
        columns = slice(group * size, (group + 1) * size)
        product = steps[:, columns] @ gram[columns, group * size :]  # [n, k] from here on: the matrix is symmetric
        cross = (product * steps[:, group * size :]).view(n, groups - group, size).sum(-1)
        matrix[:, group, group:groups] = matrix[:, group:groups, group] = cross
    # group by group, [n, groups, r]: a product that broadcasts over the rows would copy the second moments for each
    onto = torch.einsum("ngs,gsr->ngr", steps.view(n, groups, size), gram[:, index].view(groups, size, r))
    matrix[:, :groups, groups:], matrix[:, groups:, :groups] = onto, onto.transpose(1, 2)
    matrix[:, groups:, groups:] = gram[index][:, index]
    right = torch.cat([(target * steps).view(n, groups, size).sum(-1), target[:, index]], 1)
    pull = _PULL * torch.diagonal(matrix, dim1=1, dim2=2).clamp_min(1e-30)
    current = torch.cat([grid.scale.double(), salient_weight.double()], 1)
    torch.diagonal(matrix, dim1=1, dim2=2).add_(pull)
    solved = torch.linalg.solve(matrix, (right + pull * current)[..., None])[..., 0]
    scale = solved[:, :groups].to(torch.float16).float()
    ratio = scale / grid.scale  # of one sign: a symmetric grid's scale may be negative
    fits = (ratio >= 1 / 4) & (ratio <= 4)  # anything else is a row without information
    return torch.where(fits, scale, grid.scale), solved[:, groups:].float()


def sweep_codes(
    w: Tensor, gram: Tensor, codes: Tensor, grid: Grid, salient_weight: Tensor, salient: Tensor, bits: int
) -> Tensor:
    """One pass of coordinate descent: every bulk code becomes the best one given all others. Returns new codes."""
    narrow, group_size = gram.float(), w.shape[1] // grid.scale.shape[1]
    w_hat = stored_weight(codes, grid, salient_weight, salient)
    slope = narrow @ (w_hat - w).T  # half the gradient of the loss, [k, n] as all below: columns are read one by one
    codes, scale, zero = (tensor.T.contiguous() for tensor in (codes, *grid))
    for columns in torch.nonzero(~salient).flatten().split(MAX_PANEL):
        group = columns // group_size
        links = narrow[columns]
        codes[columns], moves = sweep_panel(
            slope[columns], codes[columns], links[:, columns], Grid(scale[group], zero[group]), bits
        )
        slope.addmm_(links.T, moves)
    return codes.T.contiguous()
