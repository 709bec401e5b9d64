"""GPTQ: columns are rounded one after another, and every rounding error is compensated by the columns still to come.

The loss is tr(D G Dᵀ) with D = Ŵ - W and G the (weighted) second moments of the inputs. With U the upper Cholesky
factor of G⁻¹, rounding column j leaves the error e = (w_j - ŵ_j) / U_jj, and the best update of the later columns is
W[:, j+1:] -= e U[j, j+1:] (Frantar et al. 2023). Salient columns come last: they are never rounded, so they receive
the corrections of all the others, a least-squares fit for nothing.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rosaq.quantizers.grid import Grid, empty_grid, fit_grid
from rosaq.quantizers.panels import MAX_PANEL, round_panel
from rosaq.specs import QuantSpec

_MAX_DOUBLINGS = 6  # of the damping
_LEAST_DAMPING = 1e-8


class NotPositiveDefiniteError(ValueError):
    """The second moments could not be inverted even with much more damping than asked for."""


def damping_term(mean: Tensor, damping: float) -> Tensor:
    """What is added to a diagonal whose bulk has this mean: the share `damping` of it. Never 0, not even in float32,
    which a channel that is always 0 would be divided by."""
    return (max(damping, _LEAST_DAMPING) * mean).clamp_min(torch.finfo(torch.float32).tiny)


def damped_copies(gram: Tensor, mean: Tensor, damping: float) -> Iterator[Tensor]:
    """Damped copies of gram [k, k], whose bulk's diagonal has this mean, for whoever finds out whether they are
    positive definite: after the first each with twice the damping of the one before and a RuntimeWarning, at most 6
    times. NotPositiveDefiniteError after the last."""
    if not torch.isfinite(mean) or mean < 0:
        raise NotPositiveDefiniteError(f"gram: got a mean diagonal of {mean.item()}, need a finite positive number")
    share = max(damping, _LEAST_DAMPING)
    for doubling in range(_MAX_DOUBLINGS + 1):
        if doubling:
            share *= 2
            message = f"gram [{len(gram)}, {len(gram)}] is not positive definite: damping doubled to {share:.3g}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        yield _damped(gram, damping_term(mean, share))  # kept by nobody here: the largest matrices of a run
    raise NotPositiveDefiniteError(
        f"gram [{gram.shape[0]}, {gram.shape[0]}] is not positive definite with damping up to {share:.3g}: "
        "calibrate on more tokens, or raise damping"
    )


def _damped(gram: Tensor, term: Tensor) -> Tensor:
    copy = gram.clone()
    torch.diagonal(copy).add_(term)
    return copy


def inverse_factor(gram: Tensor, num_bulk: int, damping: float) -> Tensor:
    """Upper Cholesky factor U [k, k] float64 of (gram + damping)⁻¹, the first `num_bulk` columns being the bulk.

    The damping is a share of the bulk's mean diagonal: with a few huge salient directions in the mean, one per cent
    of it would swamp the small ones. If the factorisation still fails, damping is doubled, from a fresh copy and with a
    RuntimeWarning, at most 6 times.
    """
    for damped in damped_copies(gram, torch.diagonal(gram)[:num_bulk].mean(), damping):
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped  # the largest matrices of a run: no more of them at once than it takes
        if info.item() == 0:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info.item() == 0:
                return torch.as_tensor(upper)
    raise AssertionError("damped_copies raises where it has no more")


class Panel(NamedTuple):
    """Bulk columns [start, stop), whose errors later panels hear of in one matrix product, and the groups (first
    column, end column, group) that they belong to."""

    start: int
    stop: int
    groups: list[tuple[int, int, int]]


def _panels(group_of: Tensor) -> Iterator[Panel]:
    """Cut the bulk columns so that every group begins with up-to-date columns: a panel is several whole groups, or
    a piece of one long group."""
    ids, counts = torch.unique_consecutive(group_of, return_counts=True)
    ends = counts.cumsum(0)
    lists = (ids.tolist(), counts.tolist(), ends.tolist())
    groups = [(end - count, end, group) for group, count, end in zip(*lists, strict=True)]
    pending: list[tuple[int, int, int]] = []
    for group in groups:
        if pending and group[1] - pending[0][0] > MAX_PANEL:
            yield Panel(pending[0][0], pending[-1][1], pending)
            pending = []
        pending.append(group)
        if group[1] - group[0] > MAX_PANEL:
            cuts = [*range(group[0], group[1], MAX_PANEL), group[1]]
            for start, stop in itertools.pairwise(cuts):
                yield Panel(start, stop, pending)
            pending = []
    if pending:
        yield Panel(pending[0][0], pending[-1][1], pending)


def _by_energy(energy: Tensor, salient: Tensor, group_size: int) -> Tensor:
    """The bulk columns, int64, in the order they are rounded: groups of much energy first, and within a group columns
    of much energy first, because what is rounded early is compensated by all that follows. A group stays together, so
    its grid is fitted when its columns are up to date, and the order leaves no trace in the checkpoint.

    energy [k], salient bool [k]. Equal energies keep the order of the columns.
    """
    bulk = torch.nonzero(~salient).flatten()
    of_group = energy.masked_fill(salient, 0).view(-1, group_size).sum(1)
    inside = bulk[energy[bulk].argsort(descending=True, stable=True)]
    place = of_group.argsort(descending=True, stable=True).argsort()  # of two with equal energy, one is the first
    return inside[place[inside // group_size].argsort(stable=True)]


class Columns(NamedTuple):
    """The order of the columns and how errors pass between them: bulk int64, as they are rounded; kept int64, the
    salient ones; factor [k, k] float32 in that order."""

    bulk: Tensor
    kept: Tensor
    factor: Tensor


def order_columns(gram: Tensor, spec: QuantSpec, group_size: int, salient: Tensor) -> Columns:
    """What `round_columns` needs of gram [k, k] float64, whatever rows it is to round; salient bool [k]."""
    bulk, kept = _by_energy(torch.diagonal(gram), salient, group_size), torch.nonzero(salient).flatten()
    order = torch.cat([bulk, kept])
    return Columns(bulk, kept, inverse_factor(gram[order][:, order], len(bulk), spec.damping).float())


def gptq(w: Tensor, gram: Tensor, spec: QuantSpec, group_size: int, salient: Tensor) -> tuple[Tensor, Grid, Tensor]:
    """w [n, k] float32, gram [k, k] float64, salient bool [k] -> (codes [n, k], grid [n, k / group_size], salient
    weights [n, r] float32, corrected: all that those columns hold). Codes of salient columns are the zero point, or
    half a step below."""
    return round_columns(w, order_columns(gram, spec, group_size, salient), spec, group_size)


def round_columns(w: Tensor, given: Columns, spec: QuantSpec, group_size: int) -> tuple[Tensor, Grid, Tensor]:
    """`gptq` of rows w [n, k] once the columns are in order."""
    n, k = w.shape
    bulk, kept, factor = given
    importance = torch.diagonal(factor) ** -2.0  # the loss that a unit error in a column leaves after feedback

    work = w[:, torch.cat([bulk, kept])].contiguous()
    grid = empty_grid(n, k // group_size, spec, w.device)
    codes = torch.empty(k, n, device=w.device)  # columns are written one by one
    for panel in _panels(bulk // group_size):
        columns = work[:, panel.start : panel.stop].T.contiguous()
        errors = torch.empty_like(columns)
        for first, end, group in panel.groups:
            if first >= panel.start:  # the group begins here, with its columns up to date
                inside = columns[first - panel.start : end - panel.start].T
                w_group = inside if end <= panel.stop else work[:, first:end]
                fitted = fit_grid(w_group[:, None], spec, importance[None, first:end])
                grid.scale[:, group], grid.zero[:, group] = fitted.scale[:, 0], fitted.zero[:, 0]
            own = slice(max(first, panel.start), min(end, panel.stop))  # columns of the group in this panel
            here = slice(own.start - panel.start, own.stop - panel.start)
            step = Grid(grid.scale[:, group], grid.zero[:, group])
            codes[bulk[own]], errors[here] = round_panel(columns[here], factor[own, own], step, spec.bits)
            columns[here.stop :].addmm_(factor[own, own.stop : panel.stop].T, errors[here], alpha=-1)
        work[:, panel.stop :].addmm_(errors.T, factor[panel.start : panel.stop, panel.stop :], alpha=-1)
    codes[kept] = grid.zero[:, kept // group_size].T.floor()
    return codes.T.contiguous(), grid, work[:, len(bulk) :]
