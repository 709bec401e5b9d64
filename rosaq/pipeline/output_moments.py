"""Second moments of the gradient of the predictions at the outputs of a block's linears, for `RowFeedback`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rosaq.calibrate import Gram, SiteGradients, Tokens, naming
from rosaq.models import Family
from rosaq.quantizers import inverse_factor
from rosaq.rotation import BlockRotations, inverse_transpose

Tensors = dict[str, Tensor]


class OutputMoments:
    """H [n, n] of the output of every linear of some sites of one block: the mean of g gᵀ over tokens, g the gradient.

    A token counts by its leverage xᵀ G⁻¹ x, G the second moments of the inputs: what an error that GPTQ leaves does to
    it. Without that an attention sink is most of the moments of v_proj (0.35 to 0.9 of them in
    SmolLM2-135M, 0.06 to 0.54 of k_proj's), while the codes hardly move its output, because G is full of it.

    block: path of the block, for errors. damping: of G, as of the rounding of the columns. held: the dtype in which
    tokens wait until all are there.
    """

    def __init__(self, block: str, damping: float, held: torch.dtype) -> None:
        self._block, self._damping, self._held = block, damping, held
        self._parts: dict[str, list[SiteGradients]] = {}

    def add(self, found: SiteGradients) -> None:
        """More tokens of one of the sites."""
        slopes = {name: slope.to(self._held) for name, slope in found.slopes.items()}
        self._parts.setdefault(found.site.name, []).append(replace(found, x=found.x.to(self._held), slopes=slopes))

    def moments(self) -> Tensors:
        """{linear: H [n, n] float32}, of all tokens added, which are let go; without the linears of an expert that no
        token was routed to. NotPositiveDefiniteError naming the linear where no damping makes a G invertible."""
        result = {}
        for name in list(self._parts):
            parts = self._parts.pop(name)
            with naming(self._block + parts[0].site.linears[0]):
                leverage = _leverage([part.x.float() for part in parts], self._damping)
            for linear in parts[0].site.linears:
                gram = Gram(parts[0].slopes[linear].shape[1], leverage[0].device)
                with naming(f"{self._block}{linear}: gradients"):
                    for part, weight in zip(parts, leverage, strict=True):
                        gram.add_tokens(Tokens(part.slopes[linear].float(), weight))
                result[linear] = gram.mean().float()
        return result


def in_other_basis(moments: Tensors, family: Family, before: BlockRotations, after: BlockRotations) -> Tensors:
    """Moments {linear: H [n, n]} of a block that was rotated by `before`, as those of the same block rotated by
    `after`, float64: outputs of writers are in the basis of the stream, values in those of their heads."""
    found = {name: h.double() for name, h in moments.items()}
    if before.residual is not None and after.residual is not None and after.residual is not before.residual:
        turn = before.residual.T @ after.residual
        found |= {name: turn.T @ h @ turn for name, h in found.items() if name in family.writers}
    if (
        before.values is not None
        and after.values is not None
        and after.values is not before.values
        and (family.value in found)
    ):
        # v' = v M, so the gradient is multiplied by M⁻ᵀ
        turn = torch.block_diag(*inverse_transpose(torch.linalg.inv(before.values) @ after.values))
        found[family.value] = turn.T @ found[family.value] @ turn
    return found


def _leverage(parts: list[Tensor], damping: float) -> list[Tensor]:
    """xᵀ G⁻¹ x / k of every token of parts [tokens, k], G their damped second moments. The smaller half of the channels
    is the bulk that damping is a share of: whichever are salient, they are not there."""
    gram = Gram(parts[0].shape[1], parts[0].device)
    for x in parts:
        gram.add_tokens(Tokens(x))
    found = gram.mean()
    order = torch.diagonal(found).argsort(stable=True)
    factor = inverse_factor(found[order][:, order], max(1, len(found) // 2), damping)
    factor = factor[:, order.argsort()].float()  # Fᵀ F is the inverse
    return [(x @ factor.T).square().mean(1) for x in parts]
