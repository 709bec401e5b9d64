"""Quantise one block, site by site, on the stream of tokens that the blocks before it (already quantised) produce."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, importance_summary, token_importance
from rosaq.config import LinearFormat, SalientKind
from rosaq.layout import dense_weight
from rosaq.models import Family, Site
from rosaq.pipeline.budget import SiteChoice
from rosaq.pipeline.moments import SiteMoments
from rosaq.quantizers import (
    NotPositiveDefiniteError,
    energy_index,
    quantize_in_axes,
    quantize_weight,
    quantize_with_basis,
)
from rosaq.rotation import BlockRotations, rotate_blocks
from rosaq.specs import Recipe
from rosaq.tuning import TunedBlock, TunedLinear, TuningTokens, tune_block

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LinearReport:
    """One quantised linear. sqnr_db: signal to quantisation noise of its output on the calibration tokens, in dB
    (of its weights where `measured_on` is "weights": a recipe without calibration)."""

    name: str
    bits: int
    num_salient: int
    bits_per_weight: float
    sqnr_db: float
    measured_on: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def formats(
    recipe: Recipe, model: BlockModel, rotations: BlockRotations, choices: dict[str, SiteChoice]
) -> dict[str, LinearFormat]:
    """The format of every linear of a block, by its path inside the block."""
    quant, sizes = recipe.quant, model.linear_sizes()
    result: dict[str, LinearFormat] = {}
    for site in model.family.sites:
        bits, count = choices[site.name].bits, choices[site.name].num_salient
        kind: SalientKind = "basis" if count and recipe.salient.is_basis(site.reads) else "index"
        fmt = LinearFormat(bits, quant.group_size, quant.symmetric, count, kind)
        if site.name in rotations.online:
            size = rotations.online[site.name].shape
            fmt = replace(fmt, rotation_blocks=size[0], rotation_size=size[1])
        elif recipe.rotation.is_dense(site.reads):
            fmt = replace(fmt, rotation_blocks=1, rotation_size=sizes[site.linears[0]][0])
        result |= dict.fromkeys(site.linears, fmt)
    return result


@dataclass(frozen=True)
class BlockTask:
    """One block to quantise. weights: folded and rotated, float32, not changed. dtype: of what stays in 16 bits."""

    model: BlockModel
    index: int
    weights: Tensors
    recipe: Recipe
    rotations: BlockRotations
    choices: dict[str, SiteChoice]
    seed: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.model.family.block_prefix(self.index)


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
    # once per block, before any of its linears is quantised
    importance = [
        token_importance(model, task.index, current, hidden, recipe.importance, counts)
        for hidden, counts in zip(streams.moments, streams.counts, strict=True)
    ]
    moments = SiteMoments(model, task.index, task.rotations, recipe.importance)
    outputs, made, loss = list[Tensor](), dict[str, Tensors](), None
    if recipe.moments == "dense":
        outputs = moments.measure(current, streams.moments, importance, model.family.sites, to_the_end=True)
    for _, stage in groupby(model.family.sites, key=lambda site: site.stage):
        sites = list(stage)
        if streams.moments and sites[0].name not in moments.grams:
            moments.measure(current, streams.moments, importance, sites)
        for site in sites:
            try:
                made |= _quantize_site(site, task, moments.grams.get(site.name))
            except NotPositiveDefiniteError as error:
                raise NotPositiveDefiniteError(f"{task.name}{site.linears[0]}: {error}") from error
        for linear in (linear for site in sites for linear in site.linears):
            current[f"{linear}.weight"] = dense_weight(made[linear], fmts[linear])
    gains: Tensors = {}
    if recipe.tune.steps:
        made, gains, loss = _tune(task, streams.quantised, outputs, importance, made, fmts)
    grams = moments.grams
    reports = [
        _report(task, site, linear, fmts[linear], grams.get(site.name), made[linear])
        for site in model.family.sites
        for linear in site.linears
    ]
    stored = {f"{linear}.{name}": tensor for linear, tensors in made.items() for name, tensor in tensors.items()}
    biases = {f"{linear}.bias" for linear in made} & weights.keys()
    stored |= {name: _stored_bias(weights[name], task.name + name) for name in sorted(biases)}
    summary = importance_summary(importance)
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
    """(what each linear stores, the norms' gains as stored, loss before and after) of the tuned block."""
    model, spec = task.model, task.recipe.tune
    inputs = torch.cat(stream)
    weight = None if importance[0] is None else torch.cat([w for w in importance if w is not None])
    weight = None if weight is None else weight.view(inputs.shape[:2])
    linears = {name: TunedLinear(task.weights[f"{name}.weight"], made[name], fmts[name]) for name in made}
    gains = {name: task.weights[name] for name in model.family.gains}
    others = {n: t for n, t in task.weights.items() if n not in gains and n.removesuffix(".weight") not in linears}
    block = TunedBlock(linears, gains, others, task.dtype, gain_offset=model.family.gain_offset)
    tokens = TuningTokens(inputs, torch.cat(targets), weight)
    loss = tune_block(model, task.index, block, tokens, spec, task.seed * 2**16 + task.index)
    tuned = {name: linear.stored() for name, linear in linears.items()}
    return tuned, {name: gain.detach().to(task.dtype) for name, gain in block.gains().items()}, loss


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
    """Quantise the linears of a site as one stacked matrix (rows are independent), and cut the result."""
    rotation, weights = task.rotations.online.get(site.name), task.weights
    w = torch.cat([weights[f"{linear}.weight"] for linear in site.linears])
    count = task.choices[site.name].num_salient
    quant = replace(task.recipe.quant, bits=task.choices[site.name].bits)
    if task.recipe.rotation.is_dense(site.reads):
        assert gram is not None
        tensors = quantize_in_axes(w, gram, quant, count)
    elif count and task.recipe.salient.is_basis(site.reads):
        assert gram is not None
        tensors = quantize_with_basis(w, gram, quant, count)
    else:
        index = salient_index(site, gram, task.recipe, count) if count else None
        tensors = quantize_weight(w, gram, quant, index)
    if rotation is not None:
        tensors["rotation"] = rotation
    shared = ("salient_index", "salient_basis", "rotation")
    sizes = [weights[f"{linear}.weight"].shape[0] for linear in site.linears]
    cut = {name: tensor.split(sizes) for name, tensor in tensors.items() if name not in shared}
    return {
        linear: {name: cut[name][i].clone() if name in cut else tensor for name, tensor in tensors.items()}
        for i, linear in enumerate(site.linears)
    }


def salient_index(site: Site, gram: Tensor | None, recipe: Recipe, count: int) -> Tensor:
    """The channels of a site's input that stay in 16 bits, ascending int64 [count]."""
    return salient_order(site, gram, recipe, count).sort().values


def salient_order(site: Site, gram: Tensor | None, recipe: Recipe, count: int) -> Tensor:
    """The same channels in the order in which more of them would be kept: of any count, the first ones of this."""
    if recipe.salient.by == "eigenvalue" and site.reads == "residual" and "pca" in recipe.rotation.residual:
        return torch.arange(count)  # the folded rotation puts the principal axes first
    assert gram is not None
    index = energy_index(gram, count)  # in principal axes of the heads the channel energies are the eigenvalues
    return index[torch.diagonal(gram)[index].argsort(descending=True, stable=True)]


def of_linear(tensors: Tensors, linear: str) -> Tensors:
    """Of a block's tensors those of one linear, under their own names, without its bias."""
    own = {name.removeprefix(f"{linear}."): t for name, t in tensors.items() if name.startswith(f"{linear}.")}
    own.pop("bias", None)
    return own


def _report(
    task: BlockTask, site: Site, linear: str, fmt: LinearFormat, gram: Tensor | None, tensors: Tensors
) -> LinearReport:
    w = task.weights[f"{linear}.weight"]
    is_rotated = not task.recipe.rotation.is_dense(site.reads)  # before the codes were made, and its gram too
    wide, error = w.double(), (dense_weight(tensors, fmt, rotated=is_rotated) - w).double()
    if gram is None:
        signal, noise = wide.square().sum(), error.square().sum()
    else:
        signal, noise = ((wide @ gram) * wide).sum(), ((error @ gram) * error).sum()
    return LinearReport(
        name=task.name + linear,
        bits=fmt.bits,
        num_salient=fmt.num_salient,
        bits_per_weight=8 * sum(t.nbytes for t in tensors.values()) / w.numel(),
        sqnr_db=float(10 * torch.log10(signal / noise.clamp_min(1e-300))),
        measured_on="weights" if gram is None else "outputs",
    )
