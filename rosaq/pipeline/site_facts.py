"""Measure what `budget` needs to know of every site: one pass over a few sequences of the dense, rotated model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, Tokens, output_sensitivity
from rosaq.models import Site
from rosaq.pipeline.block import formats, online, salient_order
from rosaq.pipeline.budget import SiteChoice, SiteFacts, spectrum_of, squared_steps
from rosaq.pipeline.rotations import Rotations
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
    """{site name: its facts} of every block.

    rotated(i): the weights of block i, folded and rotated. final: gain [d] and head [vocab, d] of the rotated stream.
    hidden [batch, length, d]: after the embedding, in the rotated stream; memory holds it once per block.
    """

    def running(index: int) -> Tensors:
        return online(rotated(index), model.family, rotations.of_block(index))

    squares = output_sensitivity(model, running, *final, hidden, torch.Generator().manual_seed(seed))
    facts: list[dict[str, SiteFacts]] = []
    for index in range(model.sizes.num_blocks):
        weights = rotated(index)
        inputs, out = model.inputs_of(index, running(index), hidden, model.family.sites, stop=False)
        assert out is not None
        found = {}
        for site in model.family.sites:
            # an error's cost is |g|² / n on average over its direction in the n outputs
            costs = [squares[index][name] / len(weights[f"{name}.weight"]) for name in site.linears]
            cost = torch.stack(costs).sum(0).flatten()
            x, turned = inputs[site.name].x, rotations.online.get(site.name)
            gram = Gram(x.shape[-1])
            gram.add_tokens(Tokens(x if turned is None else rotate_blocks(x, turned), cost))
            found[site.name] = _facts(site, model, recipe, rotations, index, weights, gram.mean(), float(cost.mean()))
        facts.append(found)
        hidden = out
    return facts


def _facts(
    site: Site,
    model: BlockModel,
    recipe: Recipe,
    rotations: Rotations,
    index: int,
    weights: Tensors,
    gram: Tensor,
    sensitivity: float,
) -> SiteFacts:
    most = min(recipe.budget.most, len(gram) // 4) if recipe.salient.count_at(site.reads) else 0
    order = None
    if not recipe.salient.is_basis(site.reads):
        order = salient_order(site, gram, recipe, most)
    kept, log_rest, energy = spectrum_of(gram, most, recipe.quant.damping, order)
    own = [weights[f"{linear}.weight"] for linear in site.linears]
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
