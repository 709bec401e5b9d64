"""Quantise one block, site by site, on the stream of tokens that the blocks before it (already quantised) produce."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, importance_summary, naming
from rosaq.config import LinearFormat
from rosaq.layout import dense_weight
from rosaq.models import Family, Site
from rosaq.pipeline.budget import SiteChoice
from rosaq.pipeline.moments import SiteMoments
from rosaq.pipeline.site import SHARED, LinearReport, SitePlan
from rosaq.quantizers import RowFeedback
from rosaq.rotation import BlockRotations, rotate_blocks
from rosaq.specs import Recipe
from rosaq.tuning import Sequences, TunedBlock, TunedLinear, TuningTokens, tune_block

Tensors = dict[str, Tensor]


def formats(
    recipe: Recipe, model: BlockModel, rotations: BlockRotations, choices: dict[str, SiteChoice]
) -> dict[str, LinearFormat]:
    """The format of every linear of a block, by its path inside the block."""
    sizes, result = model.linear_sizes(), dict[str, LinearFormat]()
    for site in model.family.sites:
        plan = SitePlan(site, recipe, choices[site.name], rotations.online.get(site.name))
        result |= dict.fromkeys(site.linears, plan.format(sizes[site.linears[0]][0]))
    return result


@dataclass(frozen=True)
class BlockTask:
    """One block to quantise. weights: folded and rotated, float32, not changed. dtype: of what stays in 16 bits.
    of_outputs: {linear: second moments [n, n] of the gradient of the predictions at its output}, for feedback between
    rows; of the linears that have it."""

    model: BlockModel
    index: int
    weights: Tensors
    recipe: Recipe
    rotations: BlockRotations
    choices: dict[str, SiteChoice]
    seed: int
    dtype: torch.dtype
    of_outputs: Tensors = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model.family.block_prefix(self.index)

    def plan(self, site: Site) -> SitePlan:
        """Of one of the block's sites."""
        return SitePlan(site, self.recipe, self.choices[site.name], self.rotations.online.get(site.name))


@dataclass(frozen=True)
class Streams:
    """Tokens that enter a block, batches [batch, length, d]. moments: of the model that `recipe.moments` names, for the
    second moments; quantised: of the quantised model, for tuning. Empty where the recipe needs none. counts: how often
    each token occurs in the calibration text, batches [batch, length]."""

    moments: list[Tensor]
    quantised: list[Tensor]
    counts: list[Tensor]


@dataclass(frozen=True)
class BlockResult:
    """stored: the tensors of the block's linears, as in the checkpoint, and the norms' gains where they were tuned.
    reports: one per linear. loss: of the block before and after tuning, None without. outputs: of the dense block, if
    the second moments were measured on its tokens. importance: a summary of the tokens' weights. expert_tokens: how
    many tokens were routed to each expert, None without a mixture."""

    stored: Tensors
    reports: list[LinearReport]
    loss: tuple[float, float] | None
    outputs: list[Tensor]
    importance: dict[str, Any] | None
    expert_tokens: list[int] | None


def quantize_block(task: BlockTask, streams: Streams) -> BlockResult:
    """Quantise the linears of one block, and tune it if the recipe says so.

    On the dense stream one forward pass serves all sites. On the quantised one they are true-sequential: each site's
    second moments come from a forward pass through the quantised sites before it.
    """
    model, recipe, weights = task.model, task.recipe, task.weights
    fmts = formats(recipe, model, task.rotations, task.choices)
    current = online(weights, model.family, task.rotations)
    moments = SiteMoments(model, task.index, task.rotations, recipe.importance, streams.counts)
    outputs, made, loss = list[Tensor](), dict[str, Tensors](), None
    if recipe.moments == "dense":
        outputs = moments.measure(current, streams.moments, model.family.sites, to_the_end=True)
    for _, stage in groupby(model.family.sites, key=lambda site: site.stage):
        sites = list(stage)
        if streams.moments and sites[0].name not in moments.grams:
            moments.measure(current, streams.moments, sites)
        for site in sites:
            made |= _quantize_site(site, task, moments.grams.get(site.name))
        for linear in (linear for site in sites for linear in site.linears):
            current[f"{linear}.weight"] = dense_weight(made[linear], fmts[linear])
    gains: Tensors = {}
    if recipe.tune.steps:
        made, gains, loss = _tune(task, streams.quantised, outputs, moments.importance, made, fmts)
    grams = moments.grams
    reports = [
        _report(task, site, linear, grams.get(site.name), made[linear])
        for site in model.family.sites
        for linear in site.linears
    ]
    stored = {f"{linear}.{name}": tensor for linear, tensors in made.items() for name, tensor in tensors.items()}
    biases = {f"{linear}.bias" for linear in made} & weights.keys()
    stored |= {name: _stored_bias(weights[name], task.name + name) for name in sorted(biases)}
    summary = importance_summary(moments.importance)
    return BlockResult(stored | gains, reports, loss, outputs, summary, moments.expert_tokens())


def _stored_bias(bias: Tensor, name: str) -> Tensor:
    """A bias as the format has it, float16 whatever the model's dtype; ValueError where float16 cannot hold it."""
    stored = bias.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise ValueError(f"{name}: got values up to {bias.abs().max().item():.3g}, need at most 65504 (float16)")
    return stored


def _tune(
    task: BlockTask,
    stream: list[Tensor],
    targets: list[Tensor],
    importance: list[Tensor | None],
    made: dict[str, Tensors],
    fmts: dict[str, LinearFormat],
) -> tuple[dict[str, Tensors], Tensors, tuple[float, float]]:
    """(what each linear stores, the norms' gains as stored, loss before and after) of the tuned block; it stays as it
    was, with a warning, where that made it worse: a few steps on few tokens can."""
    model, spec = task.model, task.recipe.tune
    weight = None if importance[0] is None else torch.cat([w for w in importance if w is not None])
    weight = None if weight is None else weight.view(-1, stream[0].shape[1])
    linears = {name: TunedLinear(task.weights[f"{name}.weight"], made[name], fmts[name]) for name in made}
    gains = {name: task.weights[name] for name in model.family.gains}
    others = {
        n: (_stored_bias(t, task.name + n) if n.removesuffix(".bias") in linears else t.to(task.dtype)).float()
        for n, t in task.weights.items()
        if n not in gains and n.removesuffix(".weight") not in linears
    }
    block = TunedBlock(linears, gains, others, task.dtype, gain_offset=model.family.gain_offset)
    tokens = TuningTokens(Sequences(stream), Sequences(targets), weight)
    before, after = tune_block(model, task.index, block, tokens, spec, task.seed * 2**16 + task.index)
    if after > before:
        warnings.warn(
            f"{task.name[:-1]}: tuning raised its loss from {before:.3g} to {after:.3g}: it stays as it was",
            stacklevel=2,
        )
        return made, {}, (before, before)
    tuned = {name: linear.stored() for name, linear in linears.items()}
    return tuned, {name: gain.detach().to(task.dtype) for name, gain in block.gains().items()}, (before, after)


def online(weights: Tensors, family: Family, rotations: BlockRotations) -> Tensors:
    """A copy of a rotated block's weights as plain modules run them: the online rotation is inside the weights."""
    result = dict(weights)
    for site in family.sites:
        if site.name in rotations.online:
            back = rotations.online[site.name].float().transpose(-1, -2)
            for linear in site.linears:
                result[f"{linear}.weight"] = rotate_blocks(weights[f"{linear}.weight"], back)
    return result


def _quantize_site(site: Site, task: BlockTask, gram: Tensor | None) -> dict[str, Tensors]:
    """Quantise the linears of a site as one stacked matrix (rows of one linear do not hear of another's), and cut the
    result."""
    own = [task.weights[f"{linear}.weight"] for linear in site.linears]
    known = [task.of_outputs.get(linear) for linear in site.linears]
    with naming(task.name + site.linears[0]):
        heard = any(h is not None for h in known)
        feedback = RowFeedback(known, [len(w) for w in own], task.recipe.rows.parts) if heard else None
    tensors = task.plan(site).quantize(torch.cat(own), gram, task.name + site.linears[0], feedback)
    cut = {name: tensor.split([len(w) for w in own]) for name, tensor in tensors.items() if name not in SHARED}
    return {
        linear: {name: cut[name][i].clone() if name in cut else tensor for name, tensor in tensors.items()}
        for i, linear in enumerate(site.linears)
    }


def _report(task: BlockTask, site: Site, linear: str, gram: Tensor | None, tensors: Tensors) -> LinearReport:
    plan, w = task.plan(site), task.weights[f"{linear}.weight"]
    return plan.report(task.name + linear, tensors, w.numel(), plan.energies(w, tensors, gram), gram)


def of_linear(tensors: Tensors, linear: str) -> Tensors:
    """Of a block's tensors those of one linear, under their own names, without its bias."""
    own = {name.removeprefix(f"{linear}."): t for name, t in tensors.items() if name.startswith(f"{linear}.")}
    own.pop("bias", None)
    return own


def runnable(tensors: Tensors, fmts: dict[str, LinearFormat]) -> Tensors:
    """Stored tensors of a block -> the dense float32 weights they stand for, as the block's code wants them."""
    weights = {f"{name}.weight": dense_weight(of_linear(tensors, name), fmt) for name, fmt in fmts.items()}
    return weights | {
        n: t.float() for n, t in tensors.items() if n.rpartition(".")[0] not in fmts or n.endswith(".bias")
    }
