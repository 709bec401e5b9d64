"""What `budget` needs to know of the sites of a block, from one pass of a few sequences through it and back."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from rosaq.calibrate import BLOCK, BlockModel, Gram, Sensitivity, Tokens
from rosaq.models import Site
from rosaq.pipeline.block import formats
from rosaq.pipeline.budget import SiteChoice, SiteFacts, spectrum_of, squared_steps
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site import salient_order
from rosaq.rotation import rotate_blocks
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]
# Of the loss of query, key and value, by feedback between rows: on held-back tokens 0.33 to 0.8 of it, block by block.
# What the gradient tells of the other sites' rows is within a few per cent of nothing (DESIGN.md, "Recipes").
LEFT_BY_ROWS = 0.65


def site_facts(
    found: Sensitivity, model: BlockModel, recipe: Recipe, rotations: Rotations, weights: Tensors
) -> dict[str, SiteFacts]:
    """{stage: its facts} of one block, with weights folded and rotated.

    The second moments of experts are added up over all of them: each expert keeps directions of its own, but a few
    sequences are too few to tell one expert's spectrum. So what is predicted is an upper bound: their own directions
    hold at least what common ones hold.
    """
    facts = {}
    for stage, group in groupby(model.family.sites, key=lambda site: site.stage):
        sites, total = list(group), 0.0
        first = weights[f"{sites[0].linears[0]}.weight"]
        gram = Gram(first.shape[1], first.device)
        for site in sites:
            # errors of variance 1 in all outputs cost |g|²
            cost = torch.stack([found.squares[name] for name in site.linears]).sum(0).flatten()
            total += float(cost.double().sum())
            if site.name in found.inputs:  # else no token was routed to this expert
                given, turned = found.inputs[site.name], rotations.online.get(site.name)
                x = given.x if turned is None else rotate_blocks(given.x.float(), turned)
                gram.add_tokens(Tokens(x, given.of_tokens(cost)))
        sensitivity = total / found.squares[BLOCK].numel()
        if recipe.has_row_feedback and model.family.value in sites[0].linears:
            sensitivity *= LEFT_BY_ROWS
        facts[stage] = _facts(sites, model, recipe, rotations, found.index, weights, gram.mean(), sensitivity)
    return facts


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
    most = min(recipe.budget.most, len(gram) // 4) if recipe.salient.count_at(site.reads) else 0
    order = None
    if not recipe.salient.is_basis(site.reads):
        order = salient_order(site, gram, recipe, most)
    kept, log_rest, energy = spectrum_of(gram, most, recipe.quant.damping, order)
    own = [weights[f"{linear}.weight"] for each in sites for linear in each.linears]
    base = formats(
        recipe,
        model,
        rotations.of_block(index),
        {s.name: SiteChoice(recipe.quant.bits, 1) for s in model.family.sites},
    )
    return SiteFacts(
        sizes=tuple((w.shape[1], w.shape[0]) for w in own),
        base=base[site.linears[0]],
        sensitivity=sensitivity,
        squared_step=squared_steps(own, recipe.quant, recipe.budget.widths),
        kept=kept,
        log_rest=log_rest,
        energy=energy,
    )
