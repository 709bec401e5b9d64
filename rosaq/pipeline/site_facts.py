"""Measure what `budget` needs to know of every site: one sweep of a few sequences through the dense, rotated model and
back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, Tokens, output_sensitivity
from rosaq.models import Site
from rosaq.pipeline.block import formats, online
from rosaq.pipeline.budget import SiteChoice, SiteFacts, spectrum_of, squared_steps
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site import salient_order
from rosaq.rotation import rotate_blocks
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]


def measure_sites(
    model: BlockModel,
    recipe: Recipe,
    rotations: Rotations,
    rotated: Callable[[int], Tensors],
    final: tuple[Tensor, Tensor],
    hidden: Tensor,
    seed: int,
) -> list[dict[str, SiteFacts]]:
    """{stage: its facts} of every block.

    The second moments of experts are added up over all of them: each expert keeps directions of its own, but a few
    sequences are too few to tell one expert's spectrum. So what is predicted is an upper bound: their own directions
    hold at least what common ones hold.

    rotated(i): the weights of block i, folded and rotated. final: gain [d] and head [vocab, d] of the rotated stream.
    hidden [batch, length, d]: after the embedding, in the rotated stream; memory holds it once per block.
    """

    def running(index: int) -> Tensors:
        return online(rotated(index), model.family, rotations.of_block(index))

    facts: list[dict[str, SiteFacts]] = []
    for found in output_sensitivity(model, running, *final, hidden, torch.Generator().manual_seed(seed)):
        weights, of_block = rotated(found.index), {}
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
            sensitivity = total / hidden[..., 0].numel()
            of_block[stage] = _facts(sites, model, recipe, rotations, found.index, weights, gram.mean(), sensitivity)
        facts.append(of_block)
    return facts[::-1]


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
