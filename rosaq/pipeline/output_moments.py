"""Second moments of the gradient of the predictions at the outputs of a block's linears, for `RowFeedback`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, SiteInput, Tokens
from rosaq.models import Site
from rosaq.quantizers import NotPositiveDefiniteError, inverse_factor
from rosaq.rotation import BlockRotations, rotate_blocks

Tensors = dict[str, Tensor]
_SEQUENCES_AT_ONCE = 2  # what autograd keeps of a block is many times their hidden states


class OutputMoments:
    """H [n, n] float64 of the output of every linear of one block: the mean of g gᵀ over tokens, g the gradient.

    A token counts by its leverage xᵀ G⁻¹ x, G the second moments of the inputs: what an error that GPTQ leaves does to
    it. Without that an attention sink is most of the moments of v_proj (0.35 to 0.9 of them in
    SmolLM2-135M, 0.06 to 0.54 of k_proj's), while the codes hardly move its output, because G is full of it.

    grams: {site name: G [k, k] float64}, in the online basis. damping: as of the rounding of the columns. sites: that
    are measured.

    Raises NotPositiveDefiniteError naming the linear where no damping makes a G invertible.
    """

    def __init__(
        self,
        model: BlockModel,
        index: int,
        rotations: BlockRotations,
        grams: Tensors,
        damping: float,
        sites: Iterable[Site],
    ) -> None:
        self._model, self._index, self._rotations, self._sites = model, index, rotations, tuple(sites)
        self._factors: Tensors = {}
        for site in self._sites:
            try:
                self._factors[site.name] = _inverse_factor(grams[site.name], damping)
            except NotPositiveDefiniteError as error:
                raise NotPositiveDefiniteError(
                    f"{model.family.block_prefix(index)}{site.linears[0]}: {error}"
                ) from error

    def measure(self, weights: Tensors, stream: list[Tensor], gradients: list[Tensor]) -> Tensors:
        """{linear: H}, of the block with `weights`; without the linears of an expert that no token was routed to.

        stream, gradients: batches [batch, length, d] of what enters the block and of the gradient at its output, the
        first ones of this rank; where a batch of gradients is shorter its first sequences count.
        """
        sums: dict[str, Gram] = {}
        for given, slope in zip(stream, gradients, strict=False):
            both = (given[: len(slope)].split(_SEQUENCES_AT_ONCE), slope.float().split(_SEQUENCES_AT_ONCE))
            for hidden, gradient in zip(*both, strict=True):
                self._add(weights, hidden, gradient, sums)
        sizes = self._model.linear_sizes()
        linears = {name: sizes[name] for site in self._sites for name in site.linears}
        for name, (_, n) in linears.items():  # in one order on every rank, whatever its tokens were routed to
            sums.setdefault(name, Gram(n, self._model.device)).sum_over_ranks()
        return {name: sums.pop(name).mean() for name in linears if sums[name].has_tokens}

    def _add(self, weights: Tensors, hidden: Tensor, gradient: Tensor, sums: dict[str, Gram]) -> None:
        leaf = hidden.clone().requires_grad_()
        out, outputs, inputs = self._model.forward_with_outputs(self._index, weights, leaf)
        wanted = {name: outputs[name] for site in self._sites for name in site.linears if name in outputs}
        slopes = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), gradient), strict=True))
        for site in self._sites:
            if site.name not in inputs:  # of an expert without tokens
                continue
            leverage = self._leverage(site, inputs[site.name])
            for name in site.linears:
                own = slopes[name].float().flatten(0, -2)
                sums.setdefault(name, Gram(own.shape[1], own.device)).add_tokens(Tokens(own, leverage))

    def _leverage(self, site: Site, given: SiteInput) -> Tensor:
        x = given.x.float()
        if site.name in self._rotations.online:
            x = rotate_blocks(x, self._rotations.online[site.name])
        return (x @ self._factors[site.name].T).square().mean(1)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """F [k, k] float32 with Fᵀ F the inverse of the damped second moments. The smaller half of the channels is the bulk
    that damping is a share of: whichever are salient, they are not there."""
    order = torch.diagonal(gram).argsort(stable=True)
    factor = inverse_factor(gram[order][:, order], max(1, len(gram) // 2), damping)
    return factor[:, order.argsort()].float()
