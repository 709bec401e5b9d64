"""What `budget` needs to know of the sites of a block, from one pass of a few sequences through it and back."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, SiteGradients, Tokens, naming
from rosaq.models import Site
from rosaq.pipeline.block import formats
from rosaq.pipeline.budget import SiteChoice, SiteFacts, grids_of, spectrum_of, squared_steps
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site import salient_order
from rosaq.rotation import rotate_blocks
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]
# Of the loss of query, key and value, by feedback between rows: on held-back tokens 0.33 to 0.8 of it, block by block.
# Of the other linears' it is 0.8 and more, which is not counted (DESIGN.md, "Recipes").
LEFT_BY_ROWS = 0.65


class SiteMeter:
    """The facts of all sites of block `index`, from gradients of tokens that come in parts.

    The second moments of experts are added up over all of them: each expert keeps directions of its own, but a few
    sequences are too few to tell one expert's spectrum. So what is predicted is an upper bound: their own directions
    hold at least what common ones hold.
    """

    def __init__(self, model: BlockModel, recipe: Recipe, rotations: Rotations, index: int) -> None:
        self._model, self._recipe, self._rotations, self._index = model, recipe, rotations, index
        self._grams: dict[str, Gram] = {}
        self._costs: dict[str, float] = {}
        self._of_rows: Tensors = {}

    def add(self, found: SiteGradients) -> None:
        """More tokens of one of the sites."""
        stage, turned = found.site.stage, self._rotations.online.get(found.site.name)
        cost = found.squares()  # of errors of variance 1 in all outputs
        x = found.x if turned is None else rotate_blocks(found.x.float(), turned)
        self._costs[stage] = self._costs.get(stage, 0.0) + float(cost.double().sum())
        with naming(self._model.family.block_prefix(self._index) + found.site.linears[0]):
            self._grams.setdefault(stage, Gram(x.shape[1], x.device)).add_tokens(Tokens(x, cost))
        for name, slope in found.slopes.items():
            squares = slope.double().square().sum(0)
            self._of_rows[name] = squares + self._of_rows.get(name, torch.zeros_like(squares))

    def costs_of_rows(self, num_tokens: int) -> Tensors:
        """{linear: [n] bfloat16}: the mean squared gradient at each output, 0 for an expert that no token went to.
        Eight bits of it, because hundreds of steps follow, in which the last bits of sums would decide."""
        sizes = self._model.linear_sizes()
        found = {name: self._of_rows.get(name, torch.zeros(n)) for name, (_, n) in sizes.items()}
        return {name: (squares / num_tokens).bfloat16() for name, squares in found.items()}

    def _like_noise(self, site: Site) -> Tensor:
        k, _ = self._model.linear_sizes()[site.linears[0]]
        return torch.eye(k, dtype=torch.float64, device=self._model.device)

    def facts(self, weights: Tensors, num_tokens: int) -> dict[str, SiteFacts]:
        """{stage: its facts} of the block with `weights`, folded and rotated; num_tokens: that went through it."""
        result = {}
        for stage, group in groupby(self._model.family.sites, key=lambda site: site.stage):
            sites, sensitivity = list(group), self._costs[stage] / num_tokens
            if self._recipe.rows.is_at(stage) and self._model.family.value in sites[0].linears:
                sensitivity *= LEFT_BY_ROWS
            with naming(self._model.family.block_prefix(self._index) + sites[0].linears[0]):
                # errors that reach no prediction (a block that adds nothing) tell nothing of the tokens
                gram = self._grams[stage].mean() if sensitivity else self._like_noise(sites[0])
                result[stage] = _facts(
                    sites, self._model, self._recipe, self._rotations, self._index, weights, gram, sensitivity
                )
        return result


def _facts(
    sites: list[Site],
    model: BlockModel,
    recipe: Recipe,
    rotations: Rotations,
    index: int,
    weights: Tensors,
    gram: Tensor,
    sensitivity: float,
) -> SiteFacts:
    site = sites[0]
    most = min(recipe.most_salient_at(site.reads), len(gram) // 4)
    order = None
    if not recipe.salient.is_basis(site.reads):
        order = salient_order(site, gram, recipe, most)
    kept, log_rest, energy = spectrum_of(gram, most, recipe.quant.damping, order)
    own = [weights[f"{linear}.weight"] for each in sites for linear in each.linears]
    base = formats(
        recipe,
        model,
        rotations.of_block(index),
        {s.name: SiteChoice(recipe.quant.bits, 1, recipe.quant.group_size) for s in model.family.sites},
    )
    return SiteFacts(
        sizes=tuple((w.shape[1], w.shape[0]) for w in own),
        base=base[site.linears[0]],
        sensitivity=sensitivity,
        squared_step=squared_steps(own, grids_of(recipe, len(gram)), recipe.quant.symmetric),
        kept=kept,
        log_rest=log_rest,
        energy=energy,
    )
