"""Error feedback from row to row, beside GPTQ's from column to column.

What rounding costs the model is about tr(H D G Dᵀ): D = Ŵ - W, G the second moments of the inputs, H those of the
gradient of the predictions at the outputs (a Kronecker approximation of the Fisher information; YAQA, Tseng et al.
2025). With H = I rows are independent. Where it is not, as between the rows of one attention head, rows that are still
to come can make up for what is wrong in those that are rounded already, by GPTQ's own algebra, with H in place of G.
Rows are rounded in parts: within one of them they do not hear of each other, so a part costs one run of GPTQ and not
as many as it has rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq.quantizers.gptq import inverse_factor

# A share of the mean diagonal, 20 times that of the inputs: gradients have heavy tails, so a few thousand tokens tell
# their covariance badly, and the Kronecker form is no more than an approximation.
_DAMPING = 0.2


class RowFeedback:
    """Which rows of stacked weights are rounded together, and what the later ones have to make up for.

    moments: H [n, n] float64 of each of the stacked matrices, up to a factor; None where nothing is known of one: its
    rows are independent. num_parts: of every matrix; rows with much gradient come first, because what is rounded early
    is compensated by all that follows.
    """

    def __init__(self, moments: list[Tensor | None], sizes: list[int], num_parts: int) -> None:
        self._orders: list[Tensor] = []
        self._factors: list[Tensor | None] = []
        self._cuts: list[list[int]] = []
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._num_parts = num_parts
        device = next((h.device for h in moments if h is not None), None)
        for h, size in zip(moments, sizes, strict=True):
            if h is not None and h.shape != (size, size):
                raise ValueError(f"moments: got shape {tuple(h.shape)}, need ({size}, {size}) to match weight [n, k]")
            self._cuts.append([size * part // num_parts for part in range(num_parts + 1)])
            if h is None:
                self._orders.append(torch.arange(size, device=device))
                self._factors.append(None)
                continue
            order = torch.diagonal(h).argsort(descending=True, stable=True)
            self._orders.append(order)
            self._factors.append(inverse_factor(h[order][:, order], size, _DAMPING))

    def parts(self) -> list[Tensor]:
        """The rows of each part, int64, in the order in which parts are rounded; together they are all rows."""
        stacked = [order + start for order, start in zip(self._orders, self._starts, strict=True)]
        return [
            torch.cat([rows[cuts[part] : cuts[part + 1]] for rows, cuts in zip(stacked, self._cuts, strict=True)])
            for part in range(self._num_parts)
        ]

    def carry(self, work: Tensor, part: int, error: Tensor) -> None:
        """Correct the rows of work [n, k] that are still to come, in place, for error [rows of the part, k]: what was
        wanted of the rows of part number `part` less what they became."""
        sizes = [cuts[part + 1] - cuts[part] for cuts in self._cuts]
        for i, own in enumerate(error.split(sizes)):
            factor, first, end = self._factors[i], *self._cuts[i][part : part + 2]
            if factor is None or not len(own) or end == len(factor):
                continue
            # the inverse of H is factorᵀ · factor, so -H_ll⁻¹ H_lp of GPTQ's derivation is factor_plᵀ · factor_pp⁻ᵀ
            inner = torch.linalg.solve_triangular(factor[first:end, first:end].T, own.double(), upper=False)
            change = factor[first:end, end:].T @ inner
            work[self._starts[i] + self._orders[i][end:]] -= change.to(work.dtype)
